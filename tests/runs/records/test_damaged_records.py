"""Damaged records are read as far as they are intact, with one warning, and never cause an error."""

from __future__ import annotations

import copy
import json
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from lightning_normgeo import RecordLogger, read_record
from lightning_normgeo.errors import ConfigurationError, MeasurementWarning
from lightning_normgeo.report import write_report
from lightning_normgeo.runs.folders.run_folder import RunFolder
from lightning_normgeo.runs.records.record import Record
from lightning_normgeo.runs.records.record_reader import read_records
from lightning_normgeo.runs.summary import summary_table
from lightning_normgeo.study.definition import Study
from lightning_normgeo.study.run_progress import RunProgress
from lightning_normgeo.study.study_index import Index
from support.records import write_run, write_study

GOOD = b'{"kind": "metrics", "time": 1.8e9, "step": 7, "values": {"a": 1.0, "b": "-inf"}}'
BAD = {
    "a number": (b"5", "no JSON object"),
    "null": (b"null", "no JSON object"),
    "a list": (b'[{"kind": "end"}]', "no JSON object"),
    "nothing": (b"{}", "without a kind"),
    "no kind": (b'{"time": 1, "values": {}}', "without a kind"),
    "a kind that is no text": (b'{"kind": ["metrics"], "values": {}}', "without a kind"),
    "an unknown kind": (b'{"kind": "video", "time": 1}', "of an unknown kind"),
    "text": (b"Traceback (most recent call last):", "no JSON"),
    "two in one": (GOOD + GOOD, "no JSON"),
    "half a line": (GOOD[:50], "no JSON"),
    "bytes": (b'{"kind": "settings", "values": {"name": "\xff\xfe"}}', "no UTF-8"),
    "zeros": (b"\0" * 60, "no JSON"),
    "deep": (b"[" * 100_000, "no JSON"),
    "a long number": (b'{"kind": "metrics", "step": ' + b"9" * 5000 + b', "values": {}}', "no JSON"),
    "no values": (b'{"kind": "metrics", "step": 1}', "of kind metrics with wrong fields"),
    "values that are none": (b'{"kind": "metrics", "step": 1, "values": {"a": "high"}}', "of kind metrics with w"),
    "null for a number": (b'{"kind": "metrics", "step": 1, "values": {"a": null}}', "of kind metrics with wrong"),
    "a number too large": (b'{"kind": "metrics", "values": {"a": 1' + b"0" * 400 + b"}}", "of kind metrics with wr"),
    "a list of values": (b'{"kind": "metrics", "step": 1, "values": [1]}', "of kind metrics with wrong fields"),
    "a step that is none": (b'{"kind": "metrics", "step": "last", "values": {"a": 1}}', "of kind metrics with wro"),
    "no finite step": (b'{"kind": "metrics", "step": NaN, "values": {"a": 1}}', "of kind metrics with wrong"),
    "a huge step": (b'{"kind": "metrics", "step": 1e300, "values": {"a": 1}}', "of kind metrics with wrong"),
    "no time": (b'{"kind": "end", "time": "noon", "status": "success"}', "of kind end with wrong fields"),
    "a time without a date": (b'{"kind": "end", "time": 1e300, "status": "success"}', "of kind end with wrong"),
    "layers that are flat": (b'{"kind": "layers", "step": 1, "values": {"q": 1.0}}', "of kind layers with wrong"),
    "settings that are none": (b'{"kind": "settings", "values": "lr=1"}', "of kind settings with wrong fields"),
    "results without a name": (b'{"kind": "results", "values": {}}', "of kind results with wrong fields"),
    "captions too few": (b'{"kind": "images", "key": "k", "files": ["a", "b"], "captions": ["c"]}', "of kind images"),
    "files that are none": (b'{"kind": "images", "key": "k", "files": [1], "captions": ["c"]}', "of kind images with"),
    "an attack without counts": (
        b'{"kind": "results", "name": "robustness", "values": {"results": [{"attack": "bim"}]}}',
        "of kind results with wrong fields",
    ),
    "an evaluation that is none": (
        b'{"kind": "results", "name": "robustness_b", "values": {"results": 3}}',
        "of kind results with wrong fields",
    ),
}


def written(*lines: bytes, folder: Path = Path("runs/study/one")) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "record.jsonl").write_bytes(b"".join(line + b"\n" for line in lines))
    return folder


@pytest.mark.parametrize("name", BAD)
def test_a_bad_line_is_left_out_and_counted(name: str) -> None:
    line, reason = BAD[name]
    folder = written(GOOD, line, b"", GOOD.replace(b"7", b"8"), line)
    with pytest.warns(MeasurementWarning, match=rf"record.jsonl: 2 of 4 lines are left out \(2 {reason}") as said:
        record = read_record(folder)
    assert len(said) == 1
    assert record.metrics == {"a": [(7, 1.0), (8, 1.0)], "b": [(7, -float("inf")), (8, -float("inf"))]}
    watch = RunProgress(folder)
    watch.look()
    assert watch.step == 8
    with pytest.warns(MeasurementWarning):
        assert RunFolder(folder).wandb_id is None


def test_one_warning_for_all_reasons() -> None:
    folder = written(*(line for line, _ in BAD.values()), GOOD)
    with pytest.warns(MeasurementWarning, match=rf"{len(BAD)} of {len(BAD) + 1} lines are left out \(3 no JSON obj"):
        assert read_record(folder).metrics["a"] == [(7, 1.0)]


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le", "utf-16-be"])
def test_other_encodings_are_read(encoding: str) -> None:
    text = (GOOD + b'\r\n{"kind": "settings", "values": {"x": "\xce\xb3\xc2\xb2"}}\r\n').decode()
    bom = {"utf-16-le": b"\xff\xfe", "utf-16-be": b"\xfe\xff"}.get(encoding, b"")
    folder = written()
    (folder / "record.jsonl").write_bytes(bom + text.encode(encoding))
    record = read_record(folder)
    assert record.metrics["a"] == [(7, 1.0)]
    assert record.settings == {"x": "γ²"}


def test_zeros_of_a_crash_and_half_surrogates() -> None:
    folder = written(
        b"\0\0\0" + GOOD, b'{"kind": "settings", "values": {"folder": "caf\\udce9", "smile": "\\ud83d\\ude00"}}'
    )
    record = read_record(folder)
    assert record.metrics["a"] == [(7, 1.0)]
    assert record.settings == {"folder": "caf?", "smile": "😀"}


def test_what_a_killed_process_leaves_is_no_damage() -> None:
    folder = written(GOOD, GOOD[:40], b'{"kind": "environment", "time": 1, "values": {"python": "3"}}')
    with (folder / "record.jsonl").open("ab") as file:
        file.write(GOOD[:30])
    assert read_record(folder).metrics["a"] == [(7, 1.0)]


REFUSED = r"record\.jsonl (does not exist|is no ordinary file|cannot be read)"
NO_FILE = {
    "a folder": lambda path: path.mkdir(parents=True),
    "a link to nowhere": lambda path: path.symlink_to("nowhere"),
    "a link to itself": lambda path: path.symlink_to(path.name),
}


@pytest.mark.parametrize("name", NO_FILE)
def test_what_is_no_file_is_no_record(name: str) -> None:
    folder = written(GOOD, folder=Path("runs/study/two")).parent / "one"
    folder.mkdir()
    NO_FILE[name](folder / "record.jsonl")
    with pytest.raises(ConfigurationError, match=REFUSED):
        read_record(folder)
    with pytest.warns(MeasurementWarning, match=rf"A run is left out\. .*one/{REFUSED}"):
        (record,) = read_records([folder, folder.parent / "two"])
    assert record.metrics["a"]
    watch = RunProgress(folder)
    watch.look()
    assert watch.text == "starting"
    assert RunFolder(folder).wandb_id is None


def test_a_disk_that_cannot_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    folder, other = written(GOOD), written(GOOD, folder=Path("runs/study/two"))
    opened = Path.open

    def broken(path: Path, *args: Any, **kwargs: Any) -> Any:
        if "one" in path.parts:
            raise OSError(5, "Input/output error")
        return opened(path, *args, **kwargs)

    monkeypatch.setattr(Path, "open", broken)
    with pytest.raises(ConfigurationError, match=r"record.jsonl cannot be read \(Input/output error\)"):
        read_record(folder)
    assert RunFolder(folder).wandb_id is None
    with pytest.warns(MeasurementWarning, match="A run is left out"):
        assert len(read_records([folder, other])) == 1


INDEXES = (
    b"",
    b"5",
    b"null",
    b'{"runs": 3}',
    b'{"runs": [3, null, {"name": 3}, {"name": ["x"]}]}',
    b"\xff\xfe\0",
    b"[" * 9999,
)
STRANGE = b'{"runs": [{"name": "lr=1", "seconds": "long", "status": 7, "error": null, "digest": {}}]}'


@pytest.mark.parametrize("content", [*INDEXES, STRANGE], ids=range(len(INDEXES) + 1))
@pytest.mark.parametrize("name", ["study.json", "run.json", "robustness.json", "robustness.npz", "config.yaml"])
def test_a_study_survives_any_file_of_its_runs(name: str, content: bytes) -> None:
    study = Study("study", {"lr": [1, 2]})
    folder = written(b"5", GOOD, b"\xff", folder=study.folder / "lr=1")
    (study.folder if name == "study.json" else folder).joinpath(name).write_bytes(content)
    first, second = Index(study).entries
    whole = name == "run.json" and content.startswith(b"{")
    assert (first.status, second.status) == ("finished" if whole else "interrupted", "waiting")
    Index(study).save()
    assert [run["name"] for run in json.loads((study.folder / "study.json").read_text())["runs"]] == ["lr=1", "lr=2"]


def shown(folder: Path) -> str:
    console = Console(width=200, file=open(os.devnull, "w"), record=True)  # noqa: SIM115, PTH123
    console.print(summary_table(read_record(folder)))
    console.file.close()
    return console.export_text()


@pytest.fixture(scope="module")
def lines(workplace: Path) -> list[dict[str, Any]]:
    folder = write_run("runs/study/whole", steps=range(4, 24, 5))
    return [json.loads(line) for line in (folder / "record.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    "classes",
    [{"0": [5]}, {"0": 5}, {"0": []}, {"x": [1, 2]}, {"0": [3, 2]}, {"0": [None, 2]}, [[1, 2]], {"0": [-1, 2]}],
)
def test_counts_by_class_that_are_none_are_left_out(lines: list[dict[str, Any]], classes: Any) -> None:
    damaged = copy.deepcopy(lines)
    (results,) = (line["values"]["results"] for line in damaged if line.get("name") == "robustness")
    assert all(len(counts) == 2 for row in results for counts in row["by_class"].values())
    results[0]["by_class"] = classes
    folder = written(*(json.dumps(line).encode() for line in damaged), folder=Path("runs/study/classes"))
    with pytest.warns(MeasurementWarning, match="1 of kind results with wrong fields"):
        assert "robustness" not in read_record(folder).results


JUNK: Any = st.sampled_from(
    [None, 5, -1, 1e308, float("nan"), float("inf"), "text", "", True, [], [None], {}, {"a": None}, {"": []}]
)


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the path to every entry."""
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, entry in entries:
        yield (*path, key)
        yield from places(entry, (*path, key))


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_any_field_may_hold_anything(data: st.DataObject, lines: list[dict[str, Any]]) -> None:
    """A line is refused, or its content can be reported."""
    damaged = copy.deepcopy(lines)
    for _ in range(data.draw(st.integers(1, 4))):
        number = data.draw(st.integers(0, len(damaged) - 1))
        ways = list(places(damaged[number]))
        *way, last = data.draw(st.sampled_from(ways)) if ways else [None]
        place: Any = damaged[number]
        for key in way:
            place = place[key]
        if last is not None and data.draw(st.booleans()):
            place[last] = copy.deepcopy(data.draw(JUNK))  # later rounds change it
        elif last is not None:
            del place[last]
    folder = written(*(json.dumps(line).encode() for line in damaged), folder=Path("runs/study/damaged"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", MeasurementWarning)
        shown(folder)
        write_report([folder], form="md", output=folder / "report.md")


def test_a_study_with_damaged_runs_has_its_report() -> None:
    folder = write_study("runs/study", norms=["bn"], weight_decays=[0.0, 5e-4])
    for k, run in enumerate(sorted(path for path in folder.iterdir() if path.is_dir())):
        with (run / "record.jsonl").open("ab") as file:
            file.write((b"5\nnull\n", b"\xff\xfe\n")[k])
        (run / "robustness.npz").write_bytes((b"", b"PK\x03\x04 and so on")[k])
    with pytest.warns(MeasurementWarning, match="lines are left out") as said:
        page = write_report(folder, form="md")
    assert len(said) == 2
    assert "robustness.npz cannot be read" in page.read_text(encoding="utf-8")


def test_a_record_that_goes_on_after_damage_is_whole_from_there() -> None:
    folder = written(GOOD)
    with (folder / "record.jsonl").open("ab") as file:
        file.write(b"\0" * 100)
    logger = RecordLogger("runs", "study", "one")
    logger.log_metrics({"a": 2.0}, step=8)
    logger.finalize("success")
    with pytest.warns(MeasurementWarning, match=r"1 of 5 lines are left out \(1 no JSON\)"):
        record: Record = read_record(folder)
    assert record.metrics["a"] == [(7, 1.0), (8, 2.0)]
    assert record.complete
