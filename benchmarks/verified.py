"""Decisions under attack that differ from those of float32, in bfloat16 and with decisions verified in float32.

Run it as a plain script: ``python benchmarks/verified.py [--weights FILE --images FILE] [--eps 1 2]``. All attacks run
three times on the same images, in float32, in bfloat16 and in bfloat16 with verified decisions. A decision is whether a
sample is classified correctly. Choose radii at which part of the samples stand: where none does, none can differ.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from results import Result
from rich.console import Console
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from lightning_normgeo import evaluate_robustness
from lightning_normgeo.robustness import RobustnessReport
from robustness import parser_of, prepare

_COLUMNS = (
    "eps",
    "semantics",
    "attack",
    "accuracy",
    "bf16 differs",
    "verified differs",
    "broken by float32 only / verified only",
    "repeated",
    "changed near / at random",
)


def compared(name: str, full: RobustnessReport, half: RobustnessReport, verified: RobustnessReport) -> tuple[str, ...]:
    """Return the cells of an attack: numbers of decisions that differ from float32's, and what was repeated."""
    own, rough, checked = (report.decisions.of(name).correct for report in (full, half, verified))
    only_own, only_verified = int((checked & ~own).sum()), int((own & ~checked).sum())
    differing = int((own != rough).sum()), only_own + only_verified
    cells = (name, f"{100 * full[name].accuracy:.1f} %", *map(str, differing), f"{only_own} / {only_verified}")
    if name not in verified.verified:
        return (*cells, "", "")
    found = verified.verified[name]
    share = 100 * (found.near + found.audited) / found.n
    changed = f"{found.near_changed} of {found.near} / {found.audited_changed} of {found.audited}"
    return (*cells, f"{share:.1f} %", changed)


def table(options: Any, net: Any, images: Tensor, labels: Tensor) -> Result:
    """Return the decisions of every attack at every radius and with both semantics."""
    data = DataLoader(TensorDataset(images, labels), options.batch_size)
    rows = []
    for eps in options.radii:
        for semantics in ("final", "any"):
            full, half, verified = (
                evaluate_robustness(
                    net,
                    data,
                    eps=eps / 255,
                    steps=options.steps,
                    semantics=semantics,
                    attacks=options.attacks,
                    autocast=autocast,
                    progress=False,
                )
                for autocast in (None, "bf16", "bf16-verified")
            )
            rows += [(f"{eps:g}/255", semantics, *compared(name, full, half, verified)) for name in full]
    return Result(f"Decisions of {len(labels)} samples, {options.arch}, {options.steps} steps", _COLUMNS, rows)


def main() -> None:
    """Run the comparison and print its table."""
    parser = parser_of(__doc__, samples=1000, batch_size=200)
    parser.add_argument("--eps", type=float, nargs="+", default=[1, 2], help="radii, in units of 1/255", dest="radii")
    parser.add_argument("--attacks", nargs="+", default=["bim", "pgd", "bim_l2"])
    options = parser.parse_args()
    options.eps = options.radii[0] / 255
    torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore")
    task = prepare(options)
    result = table(options, task.net, task.images, task.labels)
    print(result.markdown())
    Console(stderr=True).print(f"{torch.get_num_threads()} threads, torch {torch.__version__}, {options.device}")


if __name__ == "__main__":
    main()
