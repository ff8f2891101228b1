"""Benchmark of the search for scale symmetries over public architectures, and generator of a page about them.

Run it as a plain script: ``python benchmarks/scale_symmetries.py [part of a name ...]``. For each architecture of
torchvision, timm and transformers, as far as these are installed, it prints the nodes of the graph, the generators, the
share of the parameters by role, the seconds of the search on one thread, the largest charge, and the operations that
are not understood. The charge is that of a generator relative to Σ|s_i|·‖W_i‖·‖∇W_i‖, and to a thousandth of the
largest such sum at least, since a generator without a gradient has nothing but rounding errors. It is computed in
double precision with ε = 0; parameters that are constant at the start of training are drawn anew. Models that compute
their normalizations in single precision, as those of transformers do, have larger charges.

With ``--page`` it writes docs/reference/architectures.md, which needs all three packages.
"""

from __future__ import annotations

import argparse
import gc
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from lightning_normgeo import swap_norm
from lightning_normgeo.normalization.autograd.tracing import traced_graph
from lightning_normgeo.symmetries import Symmetries
from lightning_normgeo.symmetries.search import symmetries_in

Model = tuple[nn.Module, Any]
TORCHVISION = (
    "vgg11_bn resnet18 resnet50 resnext50_32x4d densenet121 googlenet mobilenet_v2 mobilenet_v3_small "
    "shufflenet_v2_x0_5 squeezenet1_1 mnasnet0_5 efficientnet_b0 regnet_y_400mf convnext_tiny swin_t swin_v2_t vit_b_32"
)
TIMM = {  # sizes of images
    "vit_tiny_patch16_224": 32,
    "deit3_small_patch16_224": 32,
    "eva02_tiny_patch14_224": 28,
    "mixer_s32_224": 224,
    "convmixer_768_32": 56,
    "convnextv2_atto": 64,
    "nf_resnet50": 64,
    "resnetv2_50d_gn": 64,
    "repvgg_a0": 64,
    "ghostnet_050": 64,
    "dla34": 64,
    "seresnet50": 64,
    "ecaresnet26t": 64,
    "mobilenetv4_conv_small": 64,
    "edgenext_xx_small": 64,
    "mobilevit_xxs": 64,
    "poolformer_s12": 64,
    "xcit_nano_12_p16_224": 64,
}
WITH_SIZE = ("vit_", "deit", "eva02")


NORMALIZATIONS = ("gn", "ln", "in", "wn", "ws", "sn", "none")
PAGE = Path(__file__).resolve().parents[1] / "docs" / "reference" / "architectures.md"
_SHOWN = ("torchvision vit_b_32", "transformers GPT-2", "transformers Llama", "resnet18 with gn")
_HEAD = """# Scale symmetries of known architectures

What `scale_symmetries` finds in networks that people train, [what it means](../theory/symmetries.md). *Generators* is
the number of independent symmetries. *Shares* are those of the parameters, in percent, by role: without effect /
invariant alone / invariant jointly / rescaling / none. *Search* is the processor time on one thread. The *largest
charge* is measured in float64 with ε = 0, relative to the charge if its terms did not cancel; it is rounding if all
symmetries are true, and larger where a model computes its normalizations in float32, as the language models of
transformers do. Operations that are *not understood* may hide symmetries; none is claimed through them. Written by
`python benchmarks/scale_symmetries.py --page`.

"""


class AttentionUNet(nn.Module):
    """A U-Net with group normalization, SiLU and self-attention in the middle, as in diffusion models."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.norms = nn.ModuleList(nn.GroupNorm(8, width) for _ in range(3))
        self.down = nn.Conv2d(width, width, 3, stride=2, padding=1)
        self.attention = nn.MultiheadAttention(width, 4, batch_first=True)
        self.up = nn.ConvTranspose2d(width, width, 2, stride=2)
        self.last = nn.GroupNorm(8, 2 * width)
        self.out = nn.Conv2d(2 * width, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Return an image of the size of x."""
        x = self.stem(x)
        y = self.down(F.silu(self.norms[0](x)))
        tokens = self.norms[1](y).flatten(2).transpose(1, 2)
        y = y + self.attention(tokens, tokens, tokens, need_weights=False)[0].transpose(1, 2).view_as(y)
        y = torch.cat([x, self.up(F.silu(self.norms[2](y)))], 1)
        image: Tensor = self.out(F.silu(self.last(y)))
        return image


def swapped_model(norm: str) -> Model:
    import torchvision

    network = torchvision.models.resnet18()
    swap_norm(network, norm)
    return network, torch.randn(4, 3, 64, 64)


def torchvision_model(name: str) -> Model:
    import torchvision

    extra = {"aux_logits": False, "init_weights": False} if name == "googlenet" else {}
    extra |= {"image_size": 64} if name.startswith("vit") else {}
    model = torchvision.models.get_model(name, weights=None, **extra)
    return model, torch.randn(4, 3, 64, 64)


def timm_model(name: str, size: int) -> Model:
    import timm

    extra = {"img_size": size} if name.startswith(WITH_SIZE) else {}
    return timm.create_model(name, **extra), torch.randn(4 if size < 100 else 2, 3, size, size)


def language_model(name: str) -> Model:
    import transformers as hf

    small = {"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 4, "vocab_size": 100}
    wide = small | {"intermediate_size": 128}
    builders: dict[str, Callable[[], nn.Module]] = {
        "GPT-2": lambda: hf.GPT2LMHeadModel(hf.GPT2Config(n_embd=64, n_head=4, n_layer=4, vocab_size=100)),
        "Llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**wide, num_key_value_heads=2)),
        "Mistral": lambda: hf.MistralForCausalLM(hf.MistralConfig(**wide, num_key_value_heads=2)),
        "Qwen3": lambda: hf.Qwen3ForCausalLM(hf.Qwen3Config(**wide, num_key_value_heads=2, head_dim=16)),
        "Mixtral": lambda: hf.MixtralForCausalLM(
            hf.MixtralConfig(**wide, num_key_value_heads=2, num_local_experts=4, experts_implementation="eager")
        ),
        "BERT": lambda: hf.BertForMaskedLM(hf.BertConfig(**wide)),
        "ViT": lambda: hf.ViTForImageClassification(
            hf.ViTConfig(
                hidden_size=64, num_attention_heads=4, num_hidden_layers=4, intermediate_size=128, image_size=32
            )
        ),
        "T5": lambda: hf.T5EncoderModel(
            hf.T5Config(d_model=64, num_heads=4, num_layers=4, d_ff=128, d_kv=16, vocab_size=100)
        ),
    }
    model = builders[name]()
    if name == "ViT":
        return model, {"pixel_values": torch.randn(2, 3, 32, 32)}
    extra = {} if name in ("BERT", "ViT", "T5") else {"use_cache": False}
    return model, {"input_ids": torch.randint(3, 100, (2, 8)), **extra}


def architectures() -> Iterator[tuple[str, Callable[[], Model]]]:
    """Yield names of architectures, and functions that build them with random weights and an input."""
    for name in TORCHVISION.split():
        yield f"torchvision {name}", lambda name=name: torchvision_model(name)
    for norm in NORMALIZATIONS:
        yield f"resnet18 with {norm}", lambda norm=norm: swapped_model(norm)
    yield "U-Net with attention", lambda: (AttentionUNet(), torch.randn(4, 3, 16, 16))
    if find_spec("timm"):
        for name, size in TIMM.items():
            yield f"timm {name}", lambda name=name, size=size: timm_model(name, size)
    if find_spec("transformers"):
        for name in ("GPT-2", "Llama", "Mistral", "Qwen3", "Mixtral", "BERT", "ViT", "T5"):
            yield f"transformers {name}", lambda name=name: language_model(name)


def prepare(model: nn.Module, data: Any) -> Model:
    """Return a model and its input in double precision, without ε and without constant parameters."""
    for layer in model.modules():
        for name in ("eps", "variance_epsilon", "epsilon"):
            if isinstance(getattr(layer, name, None), float):
                setattr(layer, name, 1e-60)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.numel() and (parameter.ndim < 2 or bool((parameter == parameter.flatten()[0]).all())):
                parameter.add_(torch.randn_like(parameter) * 0.1)
    as_double = lambda x: x.double() if x.is_floating_point() else x  # noqa: E731
    return model.double().train(), pytree.tree_map_only(Tensor, as_double, data)


def random_loss(outputs: Any) -> Tensor:
    """Return a random function of all outputs."""
    leaves = [leaf for leaf in pytree.tree_leaves(outputs) if isinstance(leaf, Tensor) and leaf.requires_grad]
    return torch.stack([(torch.randn_like(leaf) * F.softplus(leaf)).sum() for leaf in leaves]).sum()


def largest_charge(found: Symmetries, model: nn.Module, data: Any) -> float:
    """Return the largest charge of a generator relative to the lengths of weights and gradients."""
    if not len(found):
        return 0.0
    model.zero_grad()
    random_loss(model(**data) if isinstance(data, dict) else model(data)).backward()
    parameters = dict(model.named_parameters())
    gradients = {name: p.grad for name, p in parameters.items() if p.grad is not None}
    weight_sq = found.slice_sums({name: p.detach().square() for name, p in parameters.items()})
    gradient_sq = found.slice_sums({name: gradient.square() for name, gradient in gradients.items()})
    scale = abs(found.exponents) @ np.sqrt(weight_sq * gradient_sq)
    return float((np.abs(found.charges(parameters)) / np.maximum(scale, 1e-3 * scale.max())).max())


def row(build: Callable[[], Model]) -> list[str]:
    """Return the cells of the table for one architecture."""
    torch.manual_seed(0)
    model, data = prepare(*build())
    graph = traced_graph(model, data)
    nodes, start = len(graph.order), time.process_time()
    found = symmetries_in(graph, model)
    seconds = time.process_time() - start
    del graph
    shares = " / ".join(f"{100 * share:.0f}" for share in found.shares.values())
    unknown = ", ".join(f"{name} ×{count}" for name, count in found.unknown.items())
    charge = largest_charge(found, model, data)
    return [str(nodes), f"{len(found):,}", shares, f"{seconds:.2f}", f"{charge:.0e}", unknown]


def table(wanted: Sequence[str]) -> Iterator[str]:
    """Yield the lines of the table."""
    yield "| architecture | nodes | generators | shares | search [s] | largest charge | not understood |"
    yield "|---|---|---|---|---|---|---|"
    for name, build in architectures():
        if wanted and not any(part in name for part in wanted):
            continue
        try:
            cells = row(build)
        except Exception as error:
            cells = ["failed", f"{type(error).__name__}: {str(error).splitlines()[0][:80]}", "", "", "", ""]
        yield f"| {name} | {' | '.join(cells)} |"
        gc.collect()


def families(name: str) -> str:
    """Return the printed symmetries of one architecture."""
    torch.manual_seed(0)
    model, data = prepare(*dict(architectures())[name]())
    return str(symmetries_in(traced_graph(model, data), model))


def page() -> str:
    """Return the page of the documentation."""
    shown = [f"\n## {name}\n\n```text\n{families(name)}\n```\n" for name in _SHOWN]
    return "".join([_HEAD, "\n".join(table(())), "\n", *shown])


def main() -> None:
    """Print the table, or write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="parts of names; default: all")
    parser.add_argument("--page", action="store_true", help="write docs/reference/architectures.md")
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    if args.page:
        PAGE.write_text(page(), encoding="utf-8")
        return
    print("shares of parameters in %: without effect / invariant alone / invariant jointly / rescaling / none\n")
    for line in table(args.names):
        print(line, flush=True)


if __name__ == "__main__":
    main()
