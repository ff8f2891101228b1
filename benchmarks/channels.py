"""Cost of measuring and masking channels, over that of a plain forward pass, measured side by side.

``python benchmarks/channels.py`` prints for each network the processor time of ``channel_table`` over that of a forward
pass of its batch, and of one masked pass over an unmasked one, medians of interleaved repetitions.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import torchvision
from torch import nn

from lightning_normgeo.channels import channel_table, masked_channels

NETWORKS = ("resnet18", "vgg11_bn", "mobilenet_v2")


def seconds(action: Callable[[], object]) -> float:
    start = time.process_time()
    action()
    return time.process_time() - start


def forward(network: nn.Module, images: torch.Tensor) -> None:
    with torch.no_grad():
        network(images)


def ratios(name: str, samples: int, size: int, repeats: int) -> tuple[float, float, float]:
    """Return the seconds of a forward pass, and the ratios of a table and of a masked pass to it."""
    torch.manual_seed(0)
    network = getattr(torchvision.models, name)(num_classes=10).eval()
    images = torch.randn(samples, 3, size, size)
    table = channel_table(network, images)  # also warms up
    keep = {layer: torch.arange(len(found)) % 3 > 0 for layer, found in table.layers.items()}

    def masked() -> None:
        with masked_channels(network, keep):
            forward(network, images)

    plain, tables, passes = [], [], []
    for _ in range(repeats):
        plain.append(seconds(lambda: forward(network, images)))
        tables.append(seconds(lambda: channel_table(network, images)))
        passes.append(seconds(masked))
    base = statistics.median(plain)
    return base, statistics.median(tables) / base, statistics.median(passes) / base


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--size", type=int, default=64, help="height and width of the images")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    for name in NETWORKS:
        base, table, masked = ratios(name, options.samples, options.size, options.repeats)
        print(f"{name:14} {1e3 * base:7.1f} ms   channel_table × {table:.2f}   masked pass × {masked:.3f}", flush=True)


if __name__ == "__main__":
    main()
