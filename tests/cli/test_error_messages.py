"""Mistakes on the command line end in one line that names what was given and the nearest of all names."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from lightning_normgeo.cli import main

pytestmark = pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning")
BLOCK = "trainer:\n  callbacks:\n  - class_path: OrthogonalityMonitor\n  - class_path: "
FILES = {
    "bad.yaml": "trainer:\n  max_epochs: [1\n",
    "unknown.yaml": "trainer:\n  max_epoch: 3\n",
    "empty.yaml": "",
    "latin.yaml": "# Größe\nmodel: {norm: bn}\n",
    "class.yaml": f"{BLOCK}lightning_normgeo.NormGrowthMonitr\n",
    "short.yaml": f"{BLOCK}NormGrowthMonitr\n",
    "older.yaml": f"{BLOCK}NormGrowthMonitor\n    init_args: {{every: 5}}\n",
    "value.yaml": f"{BLOCK}lightning_normgeo.NormGrowthMonitor\n    init_args: {{cumulative: maybe}}\n",
}
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
    "--optimizer.lrr 0.1": r"--optimizer\.lrr is no option of SGD\. Nearest: 'lr', .* See --optimizer\.help",
    "--optimizer.betas [1]": r"--optimizer\.betas is no option of SGD\. Nearest: (?!.*'betas')",
    "--optimizer.lr abc": r"--optimizer\.lr abc cannot be used by SGD\. It has to be a number\.",
    "--optimizer.lr=-1": r"optimizer torch\.optim\.SGD\(lr=-1\.0, momentum=0\.9, .*Invalid learning rate: -1\.0",
    "--optimizer foo.Bar": r"--optimizer foo\.Bar cannot be used: No module named 'foo'",
    "--lr_scheduler.T_max x": r"--lr_scheduler\.T_max x cannot be used by CosineAnnealingLR\. .*an integer\.",
    "--lr_scheduler.T_max 0": r"CosineAnnealingLR\(T_max=0\) fails after epoch 0: .* stepped once per epoch\.",
    "--lr_scheduler StepLR": r"torch\.optim\.lr_scheduler\.StepLR cannot be used: .* required: step_size",
    "--model.input_mean [1]": r"It has to be a list of 3 values, each a number\.",
    "--model.optimizer SGD": r"--model\.optimizer is set from --optimizer\.",
    "--seed_everything -3": r"--seed_everything -3 cannot be used\. Choose one from 0 to 4294967295\.",
    "--lr_scheduler Cosine": r"Nearest classes: 'CosineAnnealingLR'",
    "--data Digit": r"--data Digit cannot be used\. Nearest classes: .*'DigitsDataModule'",
    "--data.batchsize 8": r"--data\.batchsize is no option of DigitsDataModule\. Nearest: 'batch_size'",
    "--data.init_args.batchsize=8": r"Nearest: 'batch_size'",
    "--data.batch_size x": r"--data\.batch_size x cannot be used by DigitsDataModule\. It has to be an integer\.",
    "--wandb off": r"--wandb off cannot be used\. Choose one of: 'offline', 'online', 'disabled'",
    "--report maybe": r"--report maybe cannot be used\. It has to be true or false\.",
    "--ckpt_path nope.ckpt": r"--ckpt_path nope\.ckpt does not exist; .* has kept/last\.ckpt\.",
    "--ckpt_path kept/epoch1.ckpt": r"--ckpt_path kept/epoch1\.ckpt does not exist; .*kept has last\.ckpt\.",
    "--ckpt_path best": r"--ckpt_path best is .* normgeo fit has none\. .* file; .* has kept/last\.ckpt\.",
    "--ckpt_path best.ckpt": r"--ckpt_path best\.ckpt does not exist; .* has kept/last\.ckpt\.",
    "--ckpt_path kept": r"--ckpt_path kept is a folder, not a checkpoint; kept has last\.ckpt\.",
    "--config bad.yaml": r"bad\.yaml is not YAML: .*line 2, column 15",
    "--config unknown.yaml": r"--trainer\.max_epoch is no option .* Nearest: --trainer\.max_epochs",
    "--config empty.yaml": r"--config empty\.yaml has to hold settings by name, .* and holds nothing",
    "--config latin.yaml": r"--config latin\.yaml is not text in UTF-8",
    "--config class.yaml": r"trainer\.callbacks: .*\.NormGrowthMonitr cannot be used.*: 'NormGrowthM",
    "--config short.yaml": r"--trainer\.callbacks NormGrowthMonitr cannot be used.* 'NormGrowthMonitor'",
    "--config older.yaml": r"trainer\.callbacks\.every is no option of NormGrowthMonitor\. Nearest: 'every_n_steps'",
    "--config value.yaml": r"trainer\.callbacks\.cumulative: maybe cannot be used by NormGrowth.*true or false",
    "--config nothing-alike": r"does not exist, .* this name\. normgeo configs lists all \d+\.",
    "-config quickstart": r"-config has one dash .* Write --config\.",
    "--cofnig quickstart": r"--cofnig is no option of normgeo fit\. Nearest: --config,",
    "--config quikstart": r"--config quikstart does not exist, .* Nearest: 'quickstart'",
    "extra": r"takes options only, and was given 'extra'\. See normgeo fit --help\.",
    "quickstart": r"takes options only, and was given 'quickstart'\. Write --config quickstart\.",
    "model.norm gn": r"takes options only, and was given 'model\.norm'\. Write --model\.norm\.",
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
    for name, text in FILES.items():
        (tmp_path / name).write_text(text, encoding="latin-1")
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "last.ckpt").touch()
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(SystemExit) as end:
        main(["fit", "--config", "quickstart", "--wandb", "disabled", "--model.arch", "resnet18", *given.split()])
    lines = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("Seed set")]
    assert end.value.code == 2
    assert len(lines) == 1
    (line,) = lines
    assert line.startswith("normgeo: error: ")
    assert re.search(MISTAKES[given], line), line
    assert sorted(tmp_path.rglob("*")) == before
