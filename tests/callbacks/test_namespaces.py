"""``lightning.pytorch`` and ``pytorch_lightning``: the callbacks work with Trainers and command lines of both.

What depends on the order of imports is checked in a process that has imported neither. This file is its script.
"""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from support.fork_server import ForkServer

NAMESPACES = ("lightning.pytorch", "pytorch_lightning")
CONFIG = Path(__file__).resolve().parents[2] / "configs" / "callbacks.yaml"
EARLY = "from lightning_normgeo import OrthogonalityMonitor; early = OrthogonalityMonitor()"
ORDERS = {
    "both, then callbacks": "import lightning.pytorch, pytorch_lightning, lightning_normgeo.callbacks",
    "both the other way, then a class": f"import pytorch_lightning, lightning.pytorch; {EARLY}",
    "lightning, an instance, pytorch_lightning": f"import lightning.pytorch; {EARLY}; import pytorch_lightning",
    "pytorch_lightning, an instance, lightning": f"import pytorch_lightning; {EARLY}; import lightning.pytorch",
    "an instance, then both": f"{EARLY}; import lightning.pytorch, pytorch_lightning",
    "callbacks, then both the other way": "import lightning_normgeo.callbacks, pytorch_lightning, lightning.pytorch",
    "package, then both": "import lightning_normgeo, lightning.pytorch, pytorch_lightning",
    "record, an instance, lightning": f"from lightning_normgeo import RecordLogger; {EARLY}; import lightning.pytorch",
    "lightning alone": "absent('pytorch_lightning'); import lightning.pytorch",
    "pytorch_lightning alone": "absent('lightning'); import pytorch_lightning",
    "callbacks first, lightning alone": f"absent('pytorch_lightning'); {EARLY}",
}
QUIET = {"accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False, "log_every_n_steps": 1}


def project(namespace: Any) -> tuple[type, type]:
    """Return the classes of a user project in this namespace."""

    class Project(namespace.LightningModule):
        def __init__(self, width: int = 4) -> None:
            super().__init__()
            layers = nn.Conv2d(3, width, 3, bias=False), nn.BatchNorm2d(width), nn.Flatten(), nn.Linear(36 * width, 3)
            self.net = nn.Sequential(*layers)

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return nn.functional.cross_entropy(self(batch[0]), batch[1])

        def test_step(self, batch: Any, batch_idx: int) -> None:
            self.log("test_loss", nn.functional.cross_entropy(self(batch[0]), batch[1]))

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    class Data(namespace.LightningDataModule):
        def train_dataloader(self) -> Any:
            return DataLoader(TensorDataset(torch.rand(8, 3, 8, 8), torch.arange(8) % 3), batch_size=4)

        test_dataloader = train_dataloader

    return Project, Data


def check_trainer(name: str, early: list[Any]) -> None:
    """Fit and test, with loggers and callbacks of the namespace that monitor our keys."""
    import lightning_normgeo as ng

    namespace, callbacks = importlib.import_module(name), importlib.import_module(f"{name}.callbacks")
    monitors = [ng.NormGrowthMonitor(), ng.AffineConvergenceMonitor(), ng.RobustnessEvaluation(steps=2)]
    monitors += early or [ng.OrthogonalityMonitor()]
    assert all(isinstance(monitor, namespace.Callback) for monitor in monitors)
    checkpoint = callbacks.ModelCheckpoint(monitor="norm_growth/weight_norm", mode="max")
    stop = callbacks.EarlyStopping(monitor="norm_growth/weight_norm", mode="min", patience=1)
    loggers = [importlib.import_module(f"{name}.loggers").CSVLogger(".", name=name)]
    if "pytorch_lightning" in sys.modules:  # RecordLogger needs it
        loggers.append(ng.RecordLogger("runs", name))
    trainer = namespace.Trainer(callbacks=[*monitors, checkpoint, stop], logger=loggers, max_epochs=9, **QUIET)
    project_class, data_class = project(namespace)
    model, data = project_class(), data_class()
    trainer.fit(model, data)
    assert trainer.current_epoch == 2  # stopped early: in front of a normalization norms only grow under plain SGD
    assert checkpoint.best_model_score == trainer.callback_metrics["norm_growth/weight_norm"] > 0
    assert trainer.callback_metrics["affine/abs_beta_minus_mu_mean"] > 0
    assert trainer.callback_metrics["orthogonality/max_abs_cos"] < 0.1
    (logged,) = trainer.test(model, data, verbose=False)
    assert (logged["robustness/bim/n"], "test_loss" in logged) == (8, True)
    assert "norm_growth/increment" in (Path(loggers[0].log_dir) / "metrics.csv").read_text()
    if len(loggers) > 1:
        record = ng.read_record(loggers[1].folder)
        assert [step for step, _ in record.metrics["norm_growth/increment"]] == [0, 1, 2, 3]
        assert record.results["robustness"]["results"][0]["n"] == 8


def command(name: str, *args: str) -> Any:
    """Run the command line of the project."""
    cli = importlib.import_module(f"{name}.cli").LightningCLI
    return cli(*project(importlib.import_module(name)), args=[*args, *(f"--trainer.{k}={v}" for k, v in QUIET.items())])


def check_command_line(name: str) -> Any:
    """Fit and test, with our callbacks appended to theirs, from a file and from the command line."""
    theirs = {"class_path": f"{name}.callbacks.ModelCheckpoint", "init_args": {"monitor": "norm_growth/weight_norm"}}
    yours = Path(f"{name}.yaml")
    yours.write_text(yaml.safe_dump({"trainer": {"max_epochs": 1, "callbacks": [theirs]}, "model": {"width": 3}}))
    both = ["--config", str(yours), "--config", str(CONFIG)]
    fitted = command(name, "fit", *both).trainer
    ours = {"OrthogonalityMonitor", "NormGrowthMonitor", "AffineConvergenceMonitor", "RobustnessEvaluation"}
    assert {"ModelCheckpoint", *ours} <= {type(callback).__name__ for callback in fitted.callbacks}
    assert fitted.checkpoint_callback.best_model_score == fitted.callback_metrics["norm_growth/weight_norm"]
    tested = command(name, "test", *both, "--ckpt_path", fitted.checkpoint_callback.best_model_path).trainer
    assert tested.callback_metrics["robustness/bim/n"] == 8
    added = ["--trainer.callbacks+=lightning_normgeo.OrthogonalityMonitor"]
    added += ["--trainer.callbacks+=lightning_normgeo.RobustnessEvaluation", "--trainer.callbacks.steps=2"]
    assert "orthogonality/max_abs_cos" in command(name, "fit", "--trainer.max_steps=2", *added).trainer.callback_metrics
    assert "robustness/bim/accuracy" in command(name, "test", *added).trainer.callback_metrics
    return fitted


def check_saved_configuration(name: str, fitted: Any) -> None:
    again = command(name, "fit", "--config", f"{fitted.log_dir}/config.yaml").trainer
    assert again.callback_metrics["norm_growth/weight_norm"] == fitted.callback_metrics["norm_growth/weight_norm"]


class Absent:
    """Import finder that hides a package, as if it was not installed."""

    def __init__(self, package: str) -> None:
        self.package = package

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if name.partition(".")[0] == self.package:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def check(order: str) -> None:
    """Import in this order, and check every namespace that is there."""
    assert not {"lightning", "pytorch_lightning", "lightning_normgeo"} & sys.modules.keys()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    names: dict[str, Any] = {"absent": lambda package: sys.meta_path.insert(0, Absent(package))}
    exec(order, names)
    from lightning_normgeo.errors import MeasurementWarning

    warnings.simplefilter("error", MeasurementWarning)
    absent = [finder.package for finder in sys.meta_path if isinstance(finder, Absent)]
    there = [name for name in NAMESPACES if name.partition(".")[0] not in absent]
    for name in there:
        check_trainer(name, [names["early"]] if "early" in names else [])
        fitted = check_command_line(name)
        if absent:
            check_saved_configuration(name, fitted)
    print(f"served: {' '.join(there)}")


@pytest.fixture(scope="module")
def server() -> Iterator[ForkServer]:
    """Return a fork server for the orders: slow modules are imported once, Lightning and the package by each child."""
    common = "torchvision", "torchmetrics", "jsonargparse", "docstring_parser", "rich.progress", "tqdm.auto", "yaml"
    started = ForkServer("pytest", "fsspec.implementations.local", "lightning_utilities", *common)
    yield started
    started.close()


def served(server: ForkServer, order: str) -> str:
    done = server.run(Path(__file__), order)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.splitlines()[-1]


@pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS)
def test_trainers_and_command_lines(order: str, server: ForkServer) -> None:
    absent = [name for name in NAMESPACES if f"absent('{name.partition('.')[0]}')" in order]
    there = [name for name in NAMESPACES if name not in absent]
    assert served(server, order) == f"served: {' '.join(there)}"


def test_record_logger_where_only_lightning_is_installed(server: ForkServer) -> None:
    order = "absent('pytorch_lightning'); from lightning_normgeo import RecordLogger"
    assert served(server, order) == "served: lightning.pytorch"


# Lightning's LightningCLI calls what jsonargparse 4.49 renamed
@pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning")
@pytest.mark.parametrize("name", ["lightning.pytorch", "pytorch_lightning"])
def test_record_logger_on_the_command_line(name: str) -> None:
    logger = "--trainer.logger=lightning_normgeo.RecordLogger"
    fitted = command(name, "fit", "--seed_everything=1", "--trainer.max_steps=1", logger).trainer
    assert type(fitted.logger).__name__ == "RecordLogger"


def test_settings_of_pytorch_lightning_mean_the_same_if_we_are_imported_first(server: ForkServer) -> None:
    def limit(first: str) -> str:
        shown = "inspect.signature(pytorch_lightning.Trainer).parameters['limit_val_batches'].annotation"
        Path("shown.py").write_text(
            f"import {first}; import inspect, lightning.pytorch, pytorch_lightning; print({shown})"
        )
        done = server.run(Path("shown.py"))
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    assert "float" in limit("pytorch_lightning")
    assert limit("lightning_normgeo.runs.records.record_logger") == limit("pytorch_lightning")


@pytest.mark.parametrize("error", [ModuleNotFoundError("No module named 'lightning'"), AttributeError("too old")])
def test_a_namespace_that_cannot_be_imported_is_done_without(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    import pytorch_lightning

    from lightning_normgeo import _lightning

    refused = ["lightning.pytorch"]

    def import_module(name: str) -> Any:
        if name in refused:
            raise error
        return sys.modules[name]

    monkeypatch.setattr(_lightning.importlib, "import_module", import_module)
    assert _lightning._bases("", "Callback") == (pytorch_lightning.Callback,)
    refused.append("pytorch_lightning")
    with pytest.raises(ImportError, match=r"neither pytorch_lightning \(.*\) nor lightning\.pytorch \("):
        _lightning._bases("", "Callback")


if __name__ == "__main__":
    check(sys.argv[1])
