"""Commands that print without importing torch: overview, short help, configurations; in any encoding."""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lightning_normgeo import NORMS, __version__
from lightning_normgeo.__main__ import main
from lightning_normgeo.cli import NormgeoCLI
from lightning_normgeo.models.architecture import ARCHITECTURES
from lightning_normgeo.study.validation import Checker
from lightning_normgeo.terminal import short_help
from lightning_normgeo.terminal.any_encoding import _IN_WORDS
from lightning_normgeo.terminal.safe_streams import PipeSafeStream

EXPLAINING = [[], ["--help"], ["--version"], ["configs"], *([name, "--help"] for name in short_help.TRAINER_COMMANDS)]
LINES, COLUMNS = 50, 100


@pytest.fixture(scope="module")
def parser() -> Any:
    return Checker()._parser("fit")


def printed(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    main(list(args))
    return capsys.readouterr().out


@pytest.mark.parametrize("args", [*EXPLAINING, ["study", "--help"], ["report", "--help"]], ids=" ".join)
def test_explaining_needs_no_torch(args: list[str]) -> None:
    code = (
        "import sys\nfrom lightning_normgeo.__main__ import main\n"
        f"try:\n    main({args})\nexcept SystemExit as end:\n    assert not end.code\n"
        "assert not {'torch', 'pytorch_lightning', 'wandb', 'altair'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout


def test_the_command_alone_explains_itself(capsys: pytest.CaptureFixture[str]) -> None:
    text = printed(capsys)
    for command in (*short_help.TRAINER_COMMANDS, *short_help.OWN_COMMANDS):
        assert re.search(rf"^  {command} ", text, re.MULTILINE)
    assert printed(capsys, "--help") == text
    assert printed(capsys, "--version") == f"normgeo {__version__}\n"


@pytest.mark.parametrize("args", EXPLAINING[:3] + EXPLAINING[4:], ids=" ".join)
def test_help_fits_the_screen(args: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    lines = printed(capsys, *args).splitlines()
    assert len(lines) <= LINES
    assert max(map(len, lines)) <= COLUMNS


@pytest.mark.parametrize("command", short_help.TRAINER_COMMANDS)
def test_options_in_the_short_help_exist(command: str) -> None:
    known = {name for action in Checker()._parser(command)._actions for name in action.option_strings}
    shown = re.findall(r"^  (?:-c, )?(--[\w.-]+)", short_help.command_help(command), re.MULTILINE)
    of_classes = {"--data.batch_size"}
    assert set(shown) - of_classes - {short_help.ALL_OPTIONS} <= known


def test_short_help_has_every_option_of_this_package(parser: Any) -> None:
    text = short_help.command_help("fit")
    ours = [name for action in parser._actions for name in action.option_strings if name.startswith("--")]
    ours = [name for name in ours if not name.startswith("--trainer.") and not name.endswith((".help", "+"))]
    ours = [name for name in ours if name not in ("--help", "--trainer", "--model", "--weights_only")]
    assert [name for name in ours if f"{name} " not in text] == []


def test_defaults_in_the_short_help_are_those_of_the_model(parser: Any) -> None:
    for option, text in short_help.MODEL_OPTIONS.items():
        default = parser.get_defaults()[option.split()[0].removeprefix("--")]
        (shown,) = re.findall(r"\[(.*)\]$", text)
        if default is not None:
            words = {"True": "true", "0.0": "0"}.get(str(default), str(default).strip("()[]"))
            assert shown == words
    assert ", ".join(ARCHITECTURES[:-1]) in short_help.MODEL_OPTIONS["--model.arch NAME"]
    assert {name for name in NORMS if "+" not in name} <= set(
        re.findall(r"\w+", short_help.MODEL_OPTIONS["--model.norm NAME"])
    )


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "cp437", "utf-8"])
@pytest.mark.parametrize("args", [["fit", "--help"], ["configs"]], ids=" ".join)
def test_every_encoding_can_show_it(args: list[str], encoding: str) -> None:
    environment = {**os.environ, "PYTHONIOENCODING": encoding, "PYTHONUTF8": "0"}
    done = subprocess.run(
        [sys.executable, "-m", "lightning_normgeo", *args], capture_output=True, env=environment, check=False
    )
    assert (done.returncode, done.stderr) == (0, b"")
    assert "?" not in done.stdout.decode(encoding)


def test_signs_are_said_in_words() -> None:
    code = (
        "from lightning_normgeo.terminal.any_encoding import speak_any_encoding\nspeak_any_encoding()\n"
        "print('Δ‖W‖² of γ → σ² … ⟨W, ∇W⟩ é 漢')\n"
    )
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    done = subprocess.run(
        [sys.executable, "-X", "utf8=0", "-c", code], capture_output=True, env=environment, check=True
    )
    assert done.stdout.decode().strip() == "Delta |W|^2 of gamma -> sigma^2 ... <W, grad W> e ?"
    assert all(text.isascii() for text in _IN_WORDS.values())


def test_summary_can_be_shown_everywhere(tmp_path: Any) -> None:
    code = (
        "from lightning_normgeo.terminal.any_encoding import speak_any_encoding\nspeak_any_encoding()\n"
        "from rich.console import Console\nfrom lightning_normgeo.runs.records.record import Record\n"
        "from lightning_normgeo.runs.summary import _SUMMARY, summary_table\n"
        "record = Record('.', metrics={key: [(0, 1.0), (1, 2.0)] for key in _SUMMARY})\n"
        "Console(width=100).print(summary_table(record))\n"
    )
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert b"|gamma^2 - sigma^2|" in done.stdout


@pytest.mark.parametrize(("given", "nearest"), [("fitt", "'fit'"), ("tset", "'test'"), ("raport", "'report'")])
def test_unknown_command(given: str, nearest: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main([given])
    assert end.value.code == 2
    assert capsys.readouterr().err.startswith(f"normgeo: error: {given!r} is no command. Choose one of: {nearest}")


def test_an_option_in_the_place_of_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["--config", "quickstart"])
    assert end.value.code == 2
    assert capsys.readouterr().err.startswith("normgeo: error: --config comes after the command, one of fit,")


def test_all_options_are_there_when_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["fit", short_help.ALL_OPTIONS])
    assert end.value.code == 0
    assert "--trainer.gradient_clip_val" in capsys.readouterr().out
    assert set(NormgeoCLI.subcommands()) == set(short_help.TRAINER_COMMANDS)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no such device")
@pytest.mark.parametrize("arguments", [["--version"], ["nonsense"], []], ids=["version", "mistake", "overview"])
def test_a_full_disk_below_the_output_changes_no_status(arguments: list[str]) -> None:
    with Path("/dev/full").open("w") as full:
        command = [sys.executable, "-m", "lightning_normgeo", *arguments]
        done = subprocess.run(command, stdout=full, stderr=full, check=False)
    assert done.returncode == (2 if arguments == ["nonsense"] else 0)


def test_output_goes_on_when_there_is_room_again() -> None:
    class Full(io.StringIO):
        full = True

        def write(self, text: str) -> int:
            if self.full:
                raise OSError(28, "No space left on device")
            return super().write(text)

    file = Full()
    outlet = PipeSafeStream(file)
    outlet.write("lost")
    file.full = False
    outlet.write("shown")
    assert file.getvalue() == "shown"
