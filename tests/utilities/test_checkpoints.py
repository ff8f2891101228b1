"""Checkpoints that would run code are refused before any of it runs, however they are loaded."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as sharded
from torch import nn

from lightning_normgeo import NormGrowthMonitor
from lightning_normgeo.cli import main
from lightning_normgeo.errors import ConfigurationError
from lightning_normgeo.runs.folders.resume import NewestEpoch, RandomState
from lightning_normgeo.utilities.checkpoints import check_checkpoint, load_weights_only
from support.projects import Project, images, trainer

pytestmark = [
    # Lightning's LightningCLI calls what jsonargparse 4.49 renamed
    pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning"),
    # torch warns if a single process saves a sharded folder, and of its own saving in 2.6
    pytest.mark.filterwarnings("ignore:torch.distributed is (disabled, )?unavailable or uninitialized:UserWarning"),
    pytest.mark.filterwarnings("ignore:TypedStorage is deprecated:UserWarning"),
]
RAN = Path("ran")
NAMES_IT = r"(names (posix|nt)\.mkdir|is no plain checkpoint) and is not loaded: it could run any code"
MODEL = """
model: {arch: resnet18, stem: imagenet}
data: {class_path: lightning_normgeo.DigitsDataModule}
optimizer: {class_path: torch.optim.SGD, init_args: {lr: 0.1}}
trainer: {accelerator: cpu}
"""


class Payload:
    """Object that makes a folder when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(RAN),)


CONTENT = {"state_dict": {"weight": torch.ones(3)}, "optimizer_states": [], "more": Payload()}


def in_a_zip(place: Path) -> Path:
    torch.save(CONTENT, place)
    return place


def in_the_old_format(place: Path) -> Path:
    torch.save(CONTENT, place, _use_new_zipfile_serialization=False)
    return place


def as_a_pickle(place: Path) -> Path:
    place.write_bytes(pickle.dumps(CONTENT))
    return place


def save_sharded(place: Path) -> Path:
    model = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    sharded.save({"model": model.state_dict(), "optimizer_0": optimizer.state_dict()}, checkpoint_id=place)
    torch.save({"epoch": 1}, place / "meta.pt")
    return place


def beside_the_shards(place: Path) -> Path:
    in_a_zip(save_sharded(place) / "meta.pt")
    return place


def in_the_index(place: Path) -> Path:
    (save_sharded(place) / ".metadata").write_bytes(pickle.dumps(Payload()))
    return place


@pytest.mark.parametrize("save", [in_a_zip, in_the_old_format, as_a_pickle, beside_the_shards, in_the_index])
def test_a_checkpoint_that_names_a_function_is_refused(save: Callable[[Path], Path]) -> None:
    with pytest.raises(ConfigurationError, match=NAMES_IT):
        check_checkpoint(save(Path("evil.ckpt")))
    assert not RAN.exists()


@pytest.mark.parametrize(
    "reduced",
    [
        (getattr, (torch.Size, "numel")),
        (torch.load, ("evil.ckpt",)),
        (torch.distributed.checkpoint.FileSystemWriter, ("ran",)),
        (pickle.loads, (b"N.",)),
    ],
    ids=["getattr", "torch.load", "a class that is no description", "pickle"],
)
def test_an_index_describes_and_calls_nothing_else(reduced: Any) -> None:
    place = save_sharded(Path("evil.ckpt"))
    thing = type("Thing", (), {"__reduce__": lambda self: reduced})()
    (place / ".metadata").write_bytes(pickle.dumps({"state_dict_metadata": thing}))
    with pytest.raises(ConfigurationError, match="and is not loaded: it could run any code"):
        check_checkpoint(place)
    assert not RAN.exists()


@pytest.mark.parametrize(
    "content", [b"", b"PK\x03\x04 torn", b"\x80\x02.", b"text"], ids=["empty", "zip", "pickle", "text"]
)
def test_what_is_no_checkpoint_is_refused_in_one_line(content: bytes) -> None:
    Path("no.ckpt").write_bytes(content)
    with pytest.raises(ConfigurationError, match=r"^The checkpoint no.ckpt .*$") as refused:
        check_checkpoint("no.ckpt")
    assert "\n" not in str(refused.value)


def test_plain_checkpoints_and_what_is_none_pass() -> None:
    check_checkpoint(save_sharded(Path("folder.ckpt")))
    torch.save({"epoch": 1, "w": torch.ones(2)}, "old.ckpt", _use_new_zipfile_serialization=False)
    for other in ("old.ckpt", None, "best", "https://example.org/" + 300 * "a", "missing.ckpt", "."):
        check_checkpoint(other)


def test_our_own_checkpoints_hold_weights_and_plain_values(tmp_path: Path) -> None:
    saver = NewestEpoch(tmp_path)
    callbacks = RandomState(restore=False), NormGrowthMonitor(1, cumulative=True), saver
    trainer(*callbacks, enable_checkpointing=True).fit(Project(), images())
    check_checkpoint(saver.best_model_path)
    content = torch.load(saver.best_model_path, weights_only=True)
    assert {"random_state", "lightning_normgeo"} < set(content)


@pytest.mark.parametrize(
    "command",
    [
        ["fit", "--ckpt_path", "evil.ckpt"],
        ["fit", "--ckpt_path", "evil.ckpt", "--run", "runs/study/one"],
        ["fit", "--run", "runs/study/evil"],
        ["test", "--ckpt_path", "evil.ckpt"],
        ["test", "--ckpt_path", "evil.ckpt", "--weights_only", "false"],
        ["validate", "--ckpt_path", "evil.ckpt"],
        ["predict", "--ckpt_path", "evil.ckpt"],
    ],
    ids=" ".join,
)
def test_the_command_line_refuses_in_one_line(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    Path("model.yaml").write_text(MODEL)
    Path("runs/study/evil/checkpoints").mkdir(parents=True)
    in_a_zip(Path("evil.ckpt"))
    in_a_zip(Path("runs/study/evil/checkpoints/resume-epoch=1-step=4.ckpt"))
    with pytest.raises(SystemExit) as ended:
        main([command[0], "--config", "model.yaml", *command[1:]])
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert "names posix.mkdir and is not loaded" in error
    assert error.count("\n") == 1
    assert not RAN.exists()
    assert not Path("runs/study/one").exists(), "nothing is left behind"


@pytest.mark.parametrize("asked", [{}, {"weights_only": False}], ids=["as it comes", "with everything"])
def test_a_trainer_loads_weights_only(asked: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    run = trainer()
    load_weights_only(run.strategy)
    with pytest.raises(ConfigurationError, match=NAMES_IT):
        run.fit(Project(), images(), ckpt_path=in_a_zip(Path("evil.ckpt")), **asked)
    assert not RAN.exists()


def test_so_does_a_strategy_that_opens_other_files_with_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    """As torch does for the entries of a sharded folder, DeepSpeed for its states, and users for URLs."""

    class Strategy:
        def load_checkpoint(self, checkpoint_path: Any) -> Any:
            return torch.load(checkpoint_path.removeprefix("far:"), weights_only=False)

    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    strategy = Strategy()
    load_weights_only(strategy)
    in_a_zip(Path("evil.ckpt"))
    with pytest.raises(ConfigurationError, match=NAMES_IT):
        strategy.load_checkpoint("far:evil.ckpt")
    assert not RAN.exists()
    assert os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] == "1"
    assert "TORCH_FORCE_WEIGHTS_ONLY_LOAD" not in os.environ
