"""Every test gets a folder, an environment and random numbers of its own, and leaves nothing in the repository."""

from __future__ import annotations

import hashlib
import os
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

if not torch.cuda.is_available():  # before anything imports Triton, whose interpreter then runs the GPU kernels
    os.environ.setdefault("TRITON_INTERPRET", "1")

import hypothesis
import numpy as np
import pytest
import torchvision

hypothesis.settings.register_profile("suite", deadline=None, derandomize=True)  # the same on any machine
hypothesis.settings.load_profile("suite")
pytest.register_assert_rewrite("support")
from support.isolation import REPOSITORY, isolated  # noqa: E402 - after its asserts are to be rewritten

_LEFT_BY_RUNS = ("runs", "wandb", "lightning_logs", "checkpoints", "data")


@pytest.fixture(autouse=True)
def _isolated(tmp_path: Path) -> Iterator[None]:
    with isolated(tmp_path):
        yield


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Return an isolated folder that the tests of one module share."""
    with isolated(tmp_path_factory.mktemp("workplace")) as folder:
        yield folder


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Start headless Chromium; without it the tests are skipped."""
    from support.browser import chromium

    with chromium() as started:
        yield started


@pytest.fixture(scope="module")
def study_report(workplace: Path) -> Path:
    """Write a study of two normalizations with and without weight decay, and its report."""
    from lightning_normgeo.report import write_report
    from support.records import write_study

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
