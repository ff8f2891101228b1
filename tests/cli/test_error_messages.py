"""Mistakes on the command line end in one line that names what was given and the nearest of all names."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from lightning_normgeo.cli import main

pytestmark = pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning")
MISTAKES = {
    "--model.nrom ws": r"--model\.nrom is no option of normgeo fit\. Nearest: --model\.norm",
    "--model.norm wss": r"norm='wss' is unknown; did you mean 'ws' .*'ln'.*'wn'",
    "--model.arch resnet100": r"arch='resnet100' is unknown; did you mean 'resnet101'",
    "--model.stem foo": r"--model\.stem foo cannot be used\. Choose one of: 'cifar', 'imagenet'\.",
    "--model.groups x": r"--model\.groups x cannot be used\. It has to be an integer or null\.",
    "--trainer.max_epochs abc": r"--trainer\.max_epochs abc cannot be used\. It has to be an integer or null\.",
    "--trainer.max_epochz 3": r"--trainer\.max_epochz is no option .* Nearest: --trainer\.max_epochs",
    "--trainer.accelerator foo": r"invalid accelerator name: `accelerator='foo'`",
    "--optimizer Sgd": r"--optimizer Sgd cannot be used\. Nearest classes: 'SGD'",
    "--optimizer.lrr 0.1": r"--optimizer\.lrr is no option of normgeo fit\. Nearest: --optimizer\.lr,",
    "--lr_scheduler Cosine": r"Nearest classes: 'CosineAnnealingLR'",
    "--data Digit": r"--data Digit cannot be used\. Nearest classes: .*'DigitsDataModule'",
    "--data.batchsize 8": r"--data\.batchsize is no option of normgeo fit\. Nearest: --data\.batch_size",
    "--data.init_args.batchsize=8": r"Nearest: --data\.batch_size",
    "--wandb off": r"--wandb off cannot be used\. Choose one of: 'offline', 'online', 'disabled'",
    "--report maybe": r"--report maybe cannot be used\. It has to be true or false\.",
    "--ckpt_path nope.ckpt": r"--ckpt_path nope\.ckpt does not exist; .* has kept/last\.ckpt\.",
    "--ckpt_path kept/epoch1.ckpt": r"--ckpt_path kept/epoch1\.ckpt does not exist; .*kept has last\.ckpt\.",
    "--config bad.yaml": r"bad\.yaml is not YAML: .*line 2, column 15",
    "--config unknown.yaml": r"--trainer\.max_epoch is no option .* Nearest: --trainer\.max_epochs",
    "--config quikstart": r"--config quikstart does not exist, .* Nearest: 'quickstart'",
    "extra": r"takes options only, and was given 'extra'",
}


@pytest.mark.parametrize("command", ["fit", "test"])
def test_a_command_without_data(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main([command, "--config", "norm/gn"])
    assert end.value.code == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("normgeo: error: ")]
    assert f"normgeo {command} needs data: a configuration that has some, such as --config quickstart" in line


@pytest.mark.parametrize("given", MISTAKES)
def test_a_mistake_is_one_line_and_leaves_nothing(
    given: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.yaml").write_text("trainer:\n  max_epochs: [1\n")
    (tmp_path / "unknown.yaml").write_text("trainer:\n  max_epoch: 3\n")
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "last.ckpt").touch()
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(SystemExit) as end:
        main(["fit", "--config", "quickstart", "--wandb", "disabled", *given.split()])
    lines = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("Seed set")]
    assert end.value.code == 2
    assert len(lines) == 1
    (line,) = lines
    assert line.startswith("normgeo: error: ")
    assert re.search(MISTAKES[given], line), line
    assert sorted(tmp_path.rglob("*")) == before
