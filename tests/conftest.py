"""Every test gets a folder, an environment and random numbers of its own, and leaves nothing in the repository."""

from __future__ import annotations

import hashlib
import os
import pickle
import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision

REPOSITORY = Path(__file__).resolve().parents[1]
_LEFT_BY_RUNS = ("runs", "wandb", "lightning_logs", "checkpoints", "data")
_WANDB_FOLDERS = ("WANDB_DIR", "WANDB_DATA_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_ARTIFACT_DIR")

torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")  # in the processes that tests start


@contextmanager
def isolated(folder: Path) -> Iterator[Path]:
    """Work in ``folder`` with W&B offline and inside it; put everything back at the end."""
    environment, argv, here = dict(os.environ), sys.argv, Path.cwd()
    threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    os.environ.update({name: str(folder / f".{name.lower()}") for name in _WANDB_FOLDERS})
    os.environ.update(WANDB_MODE="offline", WANDB_SILENT="true", WANDB_DISABLE_GIT="true", WANDB_API_KEY="")
    for name in ("WANDB_API_KEY", "PL_GLOBAL_SEED", "PL_SEED_WORKERS"):
        os.environ.pop(name, None)
    os.chdir(folder)
    sys.argv = ["normgeo"]
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 - the global state that Lightning seeds
    torch.manual_seed(0)
    try:
        yield folder
    finally:
        if "wandb" in sys.modules:
            sys.modules["wandb"].finish()
            sys.modules["wandb"].teardown()  # finish returns before the log is on disk; settings outlive a run
        os.chdir(here)
        sys.argv = argv
        os.environ.clear()
        os.environ.update(environment)
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(deterministic)


@pytest.fixture(autouse=True)
def _isolated(tmp_path: Path) -> Iterator[None]:
    with isolated(tmp_path):
        yield


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Return a folder for what the tests of one module share; it is isolated like a single test."""
    with isolated(tmp_path_factory.mktemp("workplace")) as folder:
        yield folder


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Start headless Chromium; tests are skipped where there is none."""
    from browser import chromium

    with chromium() as started:
        yield started


@pytest.fixture(scope="module")
def study_report(workplace: Path) -> Path:
    """Write a study of two normalizations with and without weight decay, and its report."""
    from records import write_study

    from lightning_normgeo.report import write_report

    return write_report(write_study(workplace / "runs" / "study"))


@pytest.fixture(scope="session", autouse=True)
def _repository_stays_clean() -> Iterator[None]:
    def left() -> list[str]:
        return [name for name in _LEFT_BY_RUNS if (REPOSITORY / name).exists()]

    before = left()
    yield
    assert left() == before, "a test wrote into the repository"


@pytest.fixture
def fake_cifar10(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Write 100 training and 20 test images in CIFAR-10's own format into ``data`` and return that folder."""
    folder = tmp_path / "data" / torchvision.datasets.CIFAR10.base_folder
    folder.mkdir(parents=True)
    generator = np.random.default_rng(0)

    def write(name: str, content: object) -> str:
        raw = pickle.dumps(content)
        (folder / name).write_bytes(raw)
        return hashlib.md5(raw).hexdigest()

    def batch(name: str) -> list[str]:
        pixels = generator.integers(0, 256, (20, 3072), dtype=np.uint8)
        return [name, write(name, {"data": pixels, "labels": [i % 10 for i in range(20)]})]

    monkeypatch.setattr(torchvision.datasets.CIFAR10, "train_list", [batch(f"data_batch_{i}") for i in range(1, 6)])
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "test_list", [batch("test_batch")])
    meta = write("batches.meta", {"label_names": [str(i) for i in range(10)]})
    monkeypatch.setattr(
        torchvision.datasets.CIFAR10, "meta", {"filename": "batches.meta", "key": "label_names", "md5": meta}
    )
    return tmp_path / "data"
