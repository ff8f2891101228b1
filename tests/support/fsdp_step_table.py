"""Script of tests/probes/sharded/test_step_table_of_fsdp.py: the step table under FSDP2."""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

sys.path.insert(0, str(Path(__file__).parents[1]))

from lightning_normgeo import NormGrowthMonitor, OrthogonalityMonitor
from support import step_table as table
from support.fsdp_models import BATCH, Divided, Zoo, divided_trainer, group_norms, samples
from support.fsdp_scenarios import State
from support.processes import leave_group
from support.projects import OPTIMIZERS, Rows, same

Cell = tuple[str, str]
Report = dict[str, Any]


class Shared(Divided):
    """A model with an optimizer of the table, sharded in two parts, since each further part slows every step."""

    network: tuple[Any, list[str]] = Zoo, ["up"]

    def __init__(self, name: str, dtype: torch.dtype) -> None:
        super().__init__(*self.network, lambda module: OPTIMIZERS[name](module.net.parameters()), dtype)
        self.optimizer = OPTIMIZERS[name]


class Overflowing(table.Overflow, Shared):
    pass


class ByHand(table.TwoByHand, Shared):
    pass


class Alike(Shared):
    """A model with the same batches on all processes: the mean gradient is exact even in coarse precision."""

    def train_dataloader(self) -> Any:
        return DataLoader(TensorDataset(*samples(self.dtype_of_data)), batch_size=BATCH)


class Narrow(Shared):
    """A model in bfloat16 whose spectral vectors stay in float32, as torch's spectral normalization requires."""

    network = group_norms, ["0"]

    def divide(self, net: nn.Module) -> None:
        from torch.distributed.fsdp import MixedPrecisionPolicy

        self.settings["mp_policy"] = MixedPrecisionPolicy(torch.bfloat16)
        super().divide(net)


PROJECTS = {"scaler": Overflowing, "manual": ByHand, "bf16-mixed": Alike, "bf16-policy": Narrow}
LOOPS = {
    **{name: table.LOOPS[name] for name in ("plain", "clip-norm", "clip-value", "accumulate", "scaler", "bf16-mixed")},
    "bf16-policy": table.Loop(wide=False),
    "manual": table.LOOPS["manual"],
}
"""All loops except the compiled ones and those with fused optimizers."""
CELLS: list[Cell] = [(name, loop) for loop in LOOPS for name in OPTIMIZERS]
QUICK: list[Cell] = [(name, loop) for name, loop in CELLS if loop == "plain" or name in ("sgd", "adamw")]
"""Every optimizer in the plain loop, and every loop with two of them; the other combinations take a minute."""


def train(devices: int, cell: Cell, *callbacks: pl.Callback, dtype: torch.dtype, logger: Any = False) -> None:
    name, loop = cell
    run = divided_trainer(devices, *callbacks, **{"steps": table.STEPS, **LOOPS[loop].settings()}, logger=logger)
    run.fit(PROJECTS.get(loop, Shared)(name, dtype))


def observed(devices: int, cell: Cell, *callbacks: pl.Callback, wide: bool) -> Any:
    """Return every logged row of a training with monitors."""
    rows, monitors = Rows(), [NormGrowthMonitor(layers="*", cumulative=True), OrthogonalityMonitor(layers="*")]
    dtype = torch.float64 if wide else torch.float32
    train(devices, cell, *monitors, *callbacks, dtype=dtype, logger=rows)
    return rows.rows


def report(cell: Cell) -> Report:
    """Train without monitors, with monitors, and in float64 if that makes a difference."""
    bare, state = State(), State()
    train(2, cell, bare, dtype=torch.float32)
    found = {"float32": observed(2, cell, state, wide=False)}
    if LOOPS[cell[1]].wide:
        found["float64"] = observed(2, cell, wide=True)
    return {"unchanged": bool(bare.states) and same(bare.states, state.states), "rows": found}


if __name__ == "__main__":
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    chosen = {"quick": QUICK, "rest": [cell for cell in CELLS if cell not in QUICK]}[sys.argv[2]]
    found = {"-".join(cell): report(cell) for cell in chosen}
    rank = torch.distributed.get_rank()
    Path(sys.argv[1], f"rank{rank}.json").write_text(json.dumps(found))
    leave_group()
