"""``--config channels`` adds ChannelEvaluation to the callbacks of a base."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from lightning_normgeo import ChannelEvaluation, OrthogonalityMonitor, read_record
from lightning_normgeo.cli import run
from support.tiny_config import TINY_DIGITS


@pytest.mark.filterwarnings("ignore:The gradient is zero for:lightning_normgeo.errors.MeasurementWarning")
@pytest.mark.filterwarnings("ignore:bim does not raise the loss:lightning_normgeo.errors.MeasurementWarning")
@pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning")
def test_it_adds_to_the_callbacks_of_a_base(tmp_path: Path) -> None:
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(TINY_DIGITS))
    cli = run(["fit", "--config", "tiny.yaml", "--config", "channels", "--wandb", "disabled"])
    kinds = [type(callback) for callback in cli.trainer.callbacks]
    assert {ChannelEvaluation, OrthogonalityMonitor} <= set(kinds)
    record = read_record(cli.trainer.loggers[0].log_dir)
    assert "channels/share/zero/0.3/accuracy" in record.metrics
    assert record.results["channels"]["settings"]["ratios"] == [0.1, 0.3, 0.5]
    assert 'id="channels"' in (record.folder / "report.html").read_text(encoding="utf-8")
