"""Shipped configurations are found by name, from any folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from lightning_normgeo.__main__ import main
from lightning_normgeo.errors import ConfigurationError
from lightning_normgeo.terminal.shipped_configs import find_config, shipped_configs, title_of, with_config_paths
from support.isolation import REPOSITORY

NAMES = list(shipped_configs())


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("name", NAMES)
def test_every_configuration_is_found_by_all_its_names(name: str) -> None:
    file = str(shipped_configs()[name])
    assert find_config(name) == find_config(f"{name}.yaml") == find_config(f"configs/{name}.yaml") == file
    last = name.rpartition("/")[2]
    if sum(one.rpartition("/")[2] == last for one in NAMES) == 1:
        assert find_config(last) == file


@pytest.mark.parametrize("name", NAMES)
def test_every_configuration_has_a_title(name: str) -> None:
    title = title_of(shipped_configs()[name])
    assert 10 < len(title) < 100
    assert title[0].isupper()


def test_all_files_are_there() -> None:
    assert len(NAMES) == len(list((REPOSITORY / "configs").rglob("*.yaml")))


def test_own_files_come_first(tmp_path: Path) -> None:
    (tmp_path / "quickstart").write_text("trainer: {max_epochs: 1}\n")
    assert find_config("quickstart") == "quickstart"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("quikstart", r"--config quikstart does not exist, .* Nearest: 'quickstart'"),
        ("norm/wss", r"Nearest: 'norm/ws'"),
        ("configs", r"--config configs does not exist"),
        ("", "normgeo configs lists all"),
    ],
)
def test_wrong_names_get_the_nearest(given: str, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        find_config(given)


def test_a_folder_is_no_configuration(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    with pytest.raises(ConfigurationError, match="--config mine is a folder"):
        find_config("mine")


def test_names_in_commands_become_paths() -> None:
    quickstart, decay = (str(shipped_configs()[name]) for name in ("quickstart", "norm/gn_wd"))
    given = ["fit", "--config", "quickstart", "--config=norm/gn_wd", "-c", "quickstart", "--model.norm", "config"]
    assert with_config_paths(given) == [
        *("fit", "--config", quickstart, f"--config={decay}", "-c", quickstart, "--model.norm", "config")
    ]


@pytest.mark.parametrize("inline", ["{trainer: {max_epochs: 1}}", "trainer: null", "-"])
def test_configurations_in_the_command_stay(inline: str) -> None:
    assert with_config_paths(["fit", "--config", inline]) == ["fit", "--config", inline]


def test_the_command_prints_them(capsys: pytest.CaptureFixture[str]) -> None:
    main(["configs"])
    listed = capsys.readouterr().out
    assert all(f"  {name} " in listed for name in NAMES)
    main(["configs", "quickstart"])
    assert capsys.readouterr().out.strip() == shipped_configs()["quickstart"].read_text().strip()
    with pytest.raises(SystemExit):
        main(["configs", "quikstart"])
    assert "normgeo configs quikstart does not exist" in capsys.readouterr().err
