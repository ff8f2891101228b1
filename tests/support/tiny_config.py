"""Configurations of commands that train for one step."""

from __future__ import annotations

from typing import Any

TINY: dict[str, Any] = {
    "trainer": {
        "max_epochs": 1,
        "accelerator": "cpu",
        "limit_train_batches": 1,
        "limit_val_batches": 1,
        "limit_test_batches": 1,
        "log_every_n_steps": 1,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    },
    "model": {"arch": "resnet18", "stem": "imagenet"},
}
"""A training of one batch, without data."""
TINY_DIGITS = {**TINY, "data": {"class_path": "lightning_normgeo.DigitsDataModule", "init_args": {"batch_size": 4}}}
"""The same on four digits."""
