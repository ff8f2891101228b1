"""Download of runs from W&B as records."""

from __future__ import annotations

import atexit
import json
import math
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lightning_normgeo.errors import ConfigurationError, said_in_one_line
from lightning_normgeo.robustness.results.attack_results import results_of
from lightning_normgeo.robustness.results.logged_results import ORDER, RESULTS, rows_of
from lightning_normgeo.robustness.results.samples.sample_results import load_decisions
from lightning_normgeo.runs.records.record import ROBUSTNESS, Record
from lightning_normgeo.runs.verdicts.logged_verdicts import OBSERVATION
from lightning_normgeo.utilities.contained_files import MEBIBYTE, read_contained

STEP = "trainer/global_step"
"""The key of the training step, which Lightning's WandbLogger adds to everything it logs: the axis of all curves."""
_PATIENCE = 30
"""Seconds until W&B has to answer."""
_SETTLING = 0.5
"""Seconds until W&B's service has dropped a request that was given up."""
_MOST = 1024 * MEBIBYTE
"""Largest size of a downloaded file, in bytes."""
_LONGEST_NAME = 100
_LAYERS = "geometry/layers"
_TABLES = (RESULTS, "table")
"""Second parts of the keys of tables of results; the last is that of early versions."""
_METADATA, _REQUIREMENTS = "wandb-metadata.json", "requirements.txt"
_PACKAGES = ("lightning-normgeo", "torch", "torchvision", "pytorch-lightning", "lightning", "torchmetrics", "wandb")


def read_project(path: str, folder: Path | None = None) -> list[Record]:
    """Read the runs of a project of W&B, oldest first, or one of them.

    Values that W&B does not have stay empty, such as those of layers without a key of their own and without a row in
    ``geometry/layers``.

    Args:
        path: ``entity/project`` or ``entity/project/run``.
        folder: Folder for downloaded pictures and per-sample results, with a folder for each run. Default: a temporary
            one, which is removed when the process ends.

    Raises:
        ConfigurationError: If W&B cannot be reached, refuses the account, or has no such project or run.
    """
    api = connect()
    place = folder or _temporary()
    with explained(f"{path} cannot be read from W&B", "Check the name, and that your account may read it."):
        runs = [api.run(path)] if path.count("/") == 2 else list(api.runs(path))
        records = [_record(run, place / _safe(run.id) / name) for run, name in zip(runs, _names(runs), strict=True)]
    if not records:
        raise ConfigurationError(f"{path} has no runs at W&B. Upload some with wandb sync.")
    return records


def connect() -> Any:
    """Return W&B's public API, logged in.

    Raises:
        ConfigurationError: If there is no account or no network; the message says what to do.
    """
    import wandb

    try:
        return wandb.Api(timeout=_PATIENCE)
    except wandb.errors.UsageError as error:
        raise ConfigurationError(
            f"W&B needs an account ({said_in_one_line(error)}). Run wandb login, or set WANDB_API_KEY; reports of "
            "local folders need none."
        ) from error
    except Exception as error:
        _settle()
        server = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")
        raise ConfigurationError(
            f"W&B at {server} cannot be reached or refuses the account ({said_in_one_line(error)}). Check the network, "
            "and WANDB_API_KEY or wandb login --relogin; reports of local folders need neither."
        ) from error


@contextmanager
def explained(what: str, hint: str) -> Iterator[None]:
    """Turn every error of W&B into a ConfigurationError of one line.

    Args:
        what: What failed, as the beginning of the message.
        hint: What to do, as the end of the message.

    Raises:
        ConfigurationError: If W&B raises an error.
    """
    try:
        yield
    except ConfigurationError:
        raise
    except Exception as error:  # W&B raises a dozen kinds of errors, not all of them public
        _settle()
        raise ConfigurationError(f"{what} ({said_in_one_line(error)}). {hint}") from error


def _settle() -> None:
    """Wait until W&B's service has dropped a request that was given up.

    If the process ended before that, the service (wandb 0.31) would fail on the late answer and miss the request to
    shut down, for which the process would wait ten minutes.
    """
    time.sleep(_SETTLING)


def _names(runs: Sequence[Any]) -> list[str]:
    """Return the name of each run as that of a folder, with W&B's id added where names are equal."""
    names = [_safe(run.name or "") for run in runs]
    return [
        name if name and names.count(name) == 1 else f"{name} {_safe(run.id)}".strip()
        for run, name in zip(runs, names, strict=True)
    ]


def _safe(name: str) -> str:
    """Return a name from W&B in characters that are safe in the name of a folder, so that it cannot lead elsewhere."""
    return re.sub(r"[^\w=,.+ -]", "-", name).strip(". ")[:_LONGEST_NAME]


def _record(run: Any, folder: Path) -> Record:
    """Return the record of a run at W&B; its files are downloaded into the folder."""
    record = Record(folder, complete=run.state == "finished")
    record.settings = {**run.config, "wandb": _named(run)}
    record.environment = _environment(run, folder)
    observed = _plain(run.summary.get(OBSERVATION))
    record.observations = [observed] if isinstance(observed, dict) else []
    media: dict[str, Mapping[str, Any]] = {}
    curves: dict[str, list[tuple[int, float]]] = {}
    for row in run.scan_history():
        moment = float(row.get("_timestamp", 0.0))
        record.begun = record.begun or moment
        record.ended = max(record.ended, moment)
        for key, value in row.items():
            if isinstance(value, Mapping):
                media[key] = value
            elif not key.startswith("_") and key != STEP:
                _add(curves, key, int(row.get(STEP, row["_step"])), value)
    record.metrics = curves
    record.images = {key: _images(run, folder, entry) for key, entry in media.items() if "filenames" in entry}
    record.layers = _layers(_table(run, folder, media.get(_LAYERS)))
    decisions = _decisions(run, folder)
    for key, entry in media.items():
        stem, _, what = key.partition("/")
        rows = _table(run, folder, entry) if what in _TABLES and stem.startswith(ROBUSTNESS) else []
        if rows:
            others = _plain(run.summary.get(stem, {}))  # settings, warnings, and attacks that were not evaluated
            record.results[stem] = {**others, "results": _with_classes(rows_of(rows), decisions)}
    return record


def _named(run: Any) -> dict[str, Any]:
    """Return W&B's id of a run, as the command line logs it, together with a user's hyperparameter ``wandb``."""
    own = _plain(run.config.get("wandb", {}))
    return {**(own if isinstance(own, Mapping) else {"wandb": own}), "id": run.id}


def _environment(run: Any, folder: Path) -> dict[str, str]:
    """Return the versions and hardware that W&B has recorded."""
    there = _download(run, folder, [_METADATA, _REQUIREMENTS])
    found: dict[str, str] = {}
    if _REQUIREMENTS in there:
        lines = read_contained(folder, _REQUIREMENTS, _MOST).decode().splitlines()
        versions = dict(line.split("==", 1) for line in lines if "==" in line)
        found = {name: versions[name] for name in _PACKAGES if name in versions}
    if _METADATA in there:
        known = json.loads(read_contained(folder, _METADATA, _MOST))
        hardware = {"python": known.get("python", "").rpartition(" ")[2], "system": known.get("os")}
        hardware |= {"cpu": known.get("cpu", {}).get("model"), "cores": known.get("cpu_count_logical")}
        hardware |= {"gpu": known.get("gpu"), "cuda": known.get("cudaVersion")}
        found |= {name: str(value) for name, value in hardware.items() if value}
    return found


def _add(curves: dict[str, list[tuple[int, float]]], key: str, step: int, value: Any) -> None:
    """Add a point to a curve; it replaces later steps, which a resumed run logs again from its checkpoint on."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return
    curve = curves.setdefault(key, [])
    while curve and curve[-1][0] >= step:
        curve.pop()
    curve.append((step, float(value)))


def _images(run: Any, folder: Path, entry: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Download logged images, and return their files and captions."""
    names = list(entry["filenames"])
    captions = entry.get("captions") or [""] * len(names)
    found = _download(run, folder, names)
    plain = (caption.removesuffix(f". {ORDER}") for caption in captions)  # the report says it once, for all
    return [(name, caption) for name, caption in zip(names, plain, strict=True) if name in found]


def _table(run: Any, folder: Path, entry: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    """Download a logged table, and return its rows by column; empty if there is none."""
    if entry is None or "path" not in entry or entry["path"] not in _download(run, folder, [entry["path"]]):
        return []
    table = json.loads(read_contained(folder, entry["path"], _MOST))
    return [dict(zip(table["columns"], row, strict=True)) for row in table["data"]]


def _download(run: Any, folder: Path, names: Sequence[str]) -> set[str]:
    """Download files of a run, except too large ones and those outside the folder, and return their names."""
    folder.mkdir(parents=True, exist_ok=True)
    files = run.files(names=list(names))
    found = {file.name: file for file in files if _stays(file.name) and (getattr(file, "size", 0) or 0) <= _MOST}
    for file in found.values():
        file.download(root=str(folder), replace=True).close()
    return set(found)


def _layers(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[tuple[int, dict[str, float]]]]:
    """Return the values by layer as in :attr:`Record.layers`, from the rows of the logged table."""
    found: dict[str, dict[int, dict[str, float]]] = {}
    for row in rows:
        for key, value in row.items():
            if key not in ("step", "layer") and value is not None:
                found.setdefault(key, {}).setdefault(row["step"], {})[row["layer"]] = value
    return {key: sorted(by_step.items()) for key, by_step in found.items()}


def _decisions(run: Any, folder: Path) -> list[Path]:
    """Download the newest per-sample results of each evaluation, and return their files."""
    newest: dict[str, Any] = {}
    for artifact in run.logged_artifacts():
        name, _, _ = artifact.name.partition(":")
        if artifact.type == "evaluation" and name.startswith(f"{run.id}-robustness"):
            newest[name] = max(newest.get(name, artifact), artifact, key=_version)
    entries = [entry for artifact in newest.values() for entry in map(artifact.get_entry, artifact.manifest.entries)]
    # an entry that is a reference would be read from wherever it points to, even from a local file
    ours = [entry for entry in entries if entry.ref is None and entry.path.endswith(".npz") and _stays(entry.path)]
    return [Path(entry.download(str(folder))) for entry in ours if (entry.size or 0) <= _MOST]


def _version(artifact: Any) -> int:
    """Return the number of an artifact's version, such as 3 for ``v3``."""
    return int(artifact.version.removeprefix("v"))


def _stays(name: object) -> bool:
    """Whether a path that W&B gives stays within the folder that it is relative to."""
    return isinstance(name, str) and not re.search(r"^[/\\]|^\w:|[\0\\]", name) and ".." not in name.split("/")


def _with_classes(rows: Sequence[dict[str, Any]], files: Sequence[Path]) -> list[dict[str, Any]]:
    """Return the rows with counts by class, which only the per-sample results have, as in a local record."""
    known: dict[str, Any] = {}
    for file in files:
        loader = file.stem.removeprefix("robustness")
        for attack, result in results_of(load_decisions(file)).items():
            classes = {str(label): list(counts) for label, counts in result.by_class.items()}
            known[attack + loader] = {"by_class": classes, "not_finite": result.not_finite}
    return [{**row, **known.get(row["attack"].replace("/", "_"), {"by_class": {}})} for row in rows]


def _plain(value: Any) -> Any:
    """Return nested dictionaries of W&B's own type as ordinary ones."""
    return {key: _plain(entry) for key, entry in value.items()} if hasattr(value, "items") else value


def _temporary() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="normgeo-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder
