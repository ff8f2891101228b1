"""Run folders of other owners: reading them opens no file outside of the folder, and no endless file."""

from __future__ import annotations

import base64
import io
import json
import os
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from lightning_normgeo.errors import ConfigurationError
from lightning_normgeo.report import write_report
from lightning_normgeo.report.compared_runs import load_runs
from lightning_normgeo.report.figures.pictures import data_uri, pictures_of
from lightning_normgeo.report.tables.accuracies.evaluations import evaluations_of
from lightning_normgeo.robustness import load_decisions
from lightning_normgeo.runs.records.record_reader import read_record
from lightning_normgeo.utilities.contained_files import contained_file, contained_folder, leads_out, read_contained
from support.records import write_run

SECRET = b"PRIVATE KEY of somebody"


def picture(form: str = "PNG", size: tuple[int, int] = (3, 2)) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, (9, 99, 199)).save(file, form)
    return file.getvalue()


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Return a small run, with private files outside of its folder."""
    (tmp_path / "secret.txt").write_bytes(SECRET)
    (tmp_path / "secret.png").write_bytes(picture())
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "secret.png").write_bytes(picture())
    return write_run(tmp_path / "runs" / "s" / "one", geometry=False)


def log(run: Path, **line: Any) -> None:
    """Append a malicious line to a record."""
    with (run / "record.jsonl").open("a", encoding="utf-8") as record:
        record.write(json.dumps({"time": 1.0, **line}) + "\n")


def place(run: Path, kind: str) -> str:
    """Put a link or file that leads elsewhere into a run's folder; return the name for it in a record."""
    match kind:
        case "link":
            (run / "link.png").symlink_to(run.parents[2] / "secret.png")
            return "link.png"
        case "relative link":
            (run / "link.png").symlink_to("../../../secret.png")
            return "link.png"
        case "chain":
            (run / "a.png").symlink_to("b.png")
            (run / "b.png").symlink_to("../../../secret.png")
            return "a.png"
        case "linked folder":
            (run / "pictures").symlink_to(run.parents[2] / "outside", target_is_directory=True)
            return "pictures/secret.png"
        case "loop":
            (run / "loop.png").symlink_to("loop.png")
            return "loop.png"
        case "pipe":
            os.mkfifo(run / "pipe.png")
            return "pipe.png"
        case "device":
            (run / "zero.png").symlink_to("/dev/zero")
            return "zero.png"
        case "sparse":
            with (run / "huge.png").open("wb") as file:
                file.write(picture())
                file.truncate(2**40)
            return "huge.png"
    return kind.format(root=run.parents[2])


ELSEWHERE = {
    "../../../secret.png": "leads out",
    "images/../../../../secret.png": "leads out",
    "{root}/secret.png": "leads out",
    "/dev/zero": "leads out",
    "/proc/self/environ": "leads out",
    "link": "leads out",
    "relative link": "leads out",
    "chain": "leads out",
    "linked folder": "leads out",
    "device": "leads out",
    "loop": "cannot be read",
    "pipe": "no ordinary file",
    "sparse": "larger than 8 MiB",
    ".": "no ordinary file",
    "images": "no ordinary file",
    "": "no ordinary file",
    "missing.png": "does not exist",
    "record.jsonl/x.png": "cannot be read",
    "a\0b.png": "cannot be read",
    "x" * 5000: "cannot be read",
    "~/secret.png": "does not exist",
    "record.jsonl": "no PNG or JPEG",
}


@pytest.mark.parametrize(("kind", "reason"), ELSEWHERE.items(), ids=[repr(kind[:30]) for kind in ELSEWHERE])
def test_a_picture_that_is_elsewhere_is_left_out_with_a_word(run: Path, kind: str, reason: str) -> None:
    name = place(run, kind)
    with pytest.raises(ConfigurationError, match=reason):
        data_uri(run, name)
    log(run, kind="images", step=1, key="robustness/examples", files=[name], captions=["mine"])
    (found,) = pictures_of(load_runs([run]))
    assert (found.uri, found.caption) == ("", "mine")
    assert re.fullmatch(f"Picture left out: .*{reason}.*", found.problem)


@pytest.mark.parametrize("name", [None, 3, ["images"], {"a": 1}, 0.5, True])
def test_a_name_that_is_none(run: Path, name: object) -> None:
    with pytest.raises(ConfigurationError, match="is no name of a file"):
        data_uri(run, name)


def test_a_page_says_what_it_leaves_out(run: Path) -> None:
    names = [place(run, kind) for kind in ("../../../secret.png", "linked folder", "pipe")]
    log(run, kind="images", step=1, key="robustness/examples", files=names, captions=["a", "b", "c"])
    page = write_report(run).read_text(encoding="utf-8")
    assert 'src="data:image' not in page
    assert page.count("Picture left out: ") == 3
    assert base64.b64encode(picture()).decode() not in page


@given(name=st.text(st.sampled_from("./~a\\\0\u2028é"), max_size=12))
@settings(max_examples=120, deadline=None, derandomize=True)
def test_no_name_leads_out(name: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.getbasetemp() / "walled" / "in"
    folder.mkdir(parents=True, exist_ok=True)
    (folder.parent / "a").write_bytes(SECRET)
    (folder / "aa").write_bytes(b"own")
    for read in (contained_folder, lambda *given: contained_file(*given, most=99)):
        try:
            found = read(folder, name)
        except ConfigurationError:
            continue
        assert found.resolve().is_relative_to(folder.resolve())


def test_links_within_the_folder_are_its_own(run: Path) -> None:
    (run / "images").rename(run / "pictures")
    (run / "images").symlink_to("pictures", target_is_directory=True)
    outside = run.parent / "link"
    outside.symlink_to(run, target_is_directory=True)
    for given_path in (run, outside):  # whoever passes a link has chosen its target
        assert [bool(found.uri) for found in pictures_of(load_runs([given_path]))] == [True, True]


def test_a_folder_of_pictures_that_leads_out_is_left_out(run: Path) -> None:
    (run / "images").rename(run.parent / "taken")
    (run / "images").symlink_to("../taken", target_is_directory=True)
    assert all("leads out of the folder" in found.problem for found in pictures_of(load_runs([run])))


@pytest.mark.parametrize(
    ("content", "shown"),
    [
        (picture("PNG"), "data:image/png;base64,"),
        (picture("JPEG"), "data:image/jpeg;base64,"),
        (picture("GIF"), None),
        (picture("BMP"), None),
        (SECRET, None),
        (b"", None),
        (b"<svg xmlns='http://www.w3.org/2000/svg' onload='alert(1)'/>", None),
        (picture("PNG")[:20] + SECRET, None),
        (b"\x89PNG\r\n\x1a\n" + SECRET, None),
        (b"\xff\xd8\xff" + SECRET, None),
        (picture("PNG", (8000, 8000)), None),
    ],
    ids=["png", "jpeg", "gif", "bmp", "text", "empty", "svg", "torn", "begins like png", "begins like jpeg", "bomb"],
)
def test_only_pictures_are_shown(run: Path, content: bytes, shown: str | None) -> None:
    (run / "x.png").write_bytes(content)
    if shown is None:
        with pytest.raises(ConfigurationError, match=r"no PNG or JPEG|8000×8000 pixels"):
            data_uri(run, "x.png")
    else:
        assert data_uri(run, "x.png") == shown + base64.b64encode(content).decode()


def test_a_file_that_grows_while_it_is_read_is_left(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "lightning_normgeo.utilities.contained_files.contained_file", lambda folder, name, most: folder / name
    )
    with pytest.raises(ConfigurationError, match="larger than"):
        read_contained(run, "record.jsonl", 10)


# --- records, indexes of studies, decisions ---------------------------------------------------------------------------


def through_a_link(run: Path) -> None:
    (run / "record.jsonl").rename(run.parents[2] / "record.jsonl")
    (run / "record.jsonl").symlink_to("../../../record.jsonl")


def pipe(run: Path) -> None:
    (run / "record.jsonl").unlink()
    os.mkfifo(run / "record.jsonl")


def device(run: Path) -> None:
    (run / "record.jsonl").unlink()
    (run / "record.jsonl").symlink_to("/dev/zero")


def sparse(run: Path) -> None:
    with (run / "record.jsonl").open("ab") as file:
        file.truncate(2**41)


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (through_a_link, "leads out"),
        (pipe, "no ordinary file"),
        (device, "leads out"),
        (sparse, "larger than"),
    ],
)
def test_a_record_that_is_elsewhere_or_endless_is_refused(run: Path, spoil: Callable[[Path], Any], reason: str) -> None:
    spoil(run)
    for given_path in (run, run / "record.jsonl"):
        with pytest.raises(ConfigurationError, match=rf"one/record\.jsonl .*{reason}"):
            read_record(given_path)


@pytest.mark.parametrize("name", ["../../outside", "{root}/outside", "link", "/", "..", "a\0", None, 3, ["one"]])
def test_an_index_names_runs_of_its_own_folder_only(run: Path, name: Any) -> None:
    study, outside = run.parent, run.parents[2] / "outside"
    (outside / "record.jsonl").write_bytes((run / "record.jsonl").read_bytes())
    (study / "link").symlink_to(outside, target_is_directory=True)
    name = name.format(root=run.parents[2]) if isinstance(name, str) else name
    (study / "study.json").write_text(json.dumps({"runs": [{"name": name}, {"name": "one"}]}))
    assert [found.record.folder for found in load_runs([study])] == [run]


def unlike(**arrays: Any) -> bytes:
    file = io.BytesIO()
    np.savez_compressed(file, **arrays)
    return file.getvalue()


def declared(shape: str, content: bytes = b"", kind: str = "<i8") -> bytes:
    """Return an archive of an array whose header declares more data than the file has."""
    head = f"{{'descr': '{kind}', 'fortran_order': False, 'shape': {shape}}}".ljust(117) + "\n"
    array = b"\x93NUMPY\x01\x00" + len(head).to_bytes(2, "little") + head.encode() + content
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("index.npy", array)
    return file.getvalue()


def bomb() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for k in range(2**13):  # 8 GiB that repeat the same kilobyte
            archive.writestr(zipfile.ZipInfo(f"{k}.npy"), b"x")
    raw = bytearray(file.getvalue())
    at = raw.find(b"PK\x01\x02")
    while at >= 0:
        raw[at + 24 : at + 28] = (2**20).to_bytes(4, "little")
        at = raw.find(b"PK\x01\x02", at + 1)
    return bytes(raw)


@pytest.mark.parametrize(
    "content",
    [
        bomb(),
        declared("(1000000000000000,)"),
        declared("(2, 2)", bytes(32)),
        declared("(4,)", bytes(64)),
        declared("(-1,)"),
        declared("(1,)" + "," * 200),
        declared("((" * 40 + "))" * 40),
        declared("(1,)", bytes(8), "|O"),
        declared("(1,)", bytes(8), "|S8"),
        declared("(1,)", bytes(8), "<M8[s]"),
        unlike(index=np.zeros((2, 3))),
    ],
    ids=[
        "bomb",
        "vast",
        "square",
        "short",
        "negative",
        "commas",
        "deep",
        "objects",
        "bytes",
        "times",
        "two dimensions",
    ],
)
def test_decisions_take_no_more_memory_than_they_have(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "robustness.npz").write_bytes(content)
    with pytest.raises(ConfigurationError, match=r"robustness\.npz is not what RobustnessEvaluation wrote"):
        load_decisions(tmp_path / "robustness.npz")


@pytest.mark.parametrize(
    ("loader", "problem"),
    [
        ("/../../../../../x", "there is no robustness_.._.._.._.._.._x.npz"),
        ("/linked", "robustness_linked.npz leads out of the folder"),
        ("/a\0", "there is no robustness_a\\x00.npz"),
        ("/" + "x" * 3000, "cannot be read"),
    ],
    ids=["up", "link", "nul", "long"],
)
def test_decisions_are_those_of_the_folder(run: Path, loader: str, problem: str) -> None:
    (run / "robustness.npz").rename(run.parent / "x.npz")
    (run / "robustness_linked.npz").symlink_to("../x.npz")
    document = json.loads((run / "robustness.json").read_text(encoding="utf-8"))
    for row in document["results"]:
        row["attack"] += loader
    log(run, kind="results", name="robustness", values=document)
    (evaluation,) = evaluations_of(load_runs([run]))
    assert evaluation.decisions == {}
    assert problem in evaluation.problem
    assert "Accuracy under attack" in write_report(run, form="md").read_text(encoding="utf-8")


# --- what is written into such a folder -------------------------------------------------------------------------------


@pytest.mark.parametrize(("form", "name"), [("html", "report.html"), ("csv", "report.csv"), ("png", "figures")])
def test_a_report_does_not_follow_a_link_out_of_the_folder(run: Path, form: str, name: str) -> None:
    target = run.parents[2] / "outside" if form == "png" else run.parents[2] / "secret.txt"
    (run / name).symlink_to(target)
    with pytest.raises(ConfigurationError, match=rf"{name} is a link that leads out of .*--output"):
        write_report(run, form=form)
    assert (run.parents[2] / "secret.txt").read_bytes() == SECRET
    assert leads_out(run / name)
    write_report(run, run.parents[2] / "own", form=form)


def test_figures_do_not_follow_links(run: Path) -> None:
    (run / "figures").mkdir()
    (run / "figures" / "accuracies.png").symlink_to(run.parents[2] / "secret.txt")
    with pytest.raises(ConfigurationError, match=r"accuracies\.png is a link that leads out"):
        write_report(run, form="png")
    assert (run.parents[2] / "secret.txt").read_bytes() == SECRET
