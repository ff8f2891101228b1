"""The HTML report: one self-contained page whose figures show exactly the data of the record."""

from __future__ import annotations

import base64
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from lightning_normgeo import RecordLogger, __version__, read_record
from lightning_normgeo.errors import ConfigurationError
from lightning_normgeo.report import write_report
from lightning_normgeo.report.compared_runs import load_runs
from lightning_normgeo.report.figures.curves import ALL, Curves
from lightning_normgeo.report.figures.geometry_figures import all_figures
from lightning_normgeo.runs.summary import summary_table

SERIES: dict[str, dict[str, str]] = {
    "orthogonality": {
        "orthogonality/max_abs_cos": "scale invariant",
        "orthogonality/max_abs_cos_corrected": "scale invariant, ε removed",
        "orthogonality_control/max_abs_cos": "control (no invariance)",
    },
    "increments": {
        "norm_growth/increment": "measured",
        "norm_growth/explained": "explained (all terms)",
        "norm_growth/predicted": "eq 16: η²‖∇‖²",
    },
    "terms": {
        "norm_growth/term_quadratic": "quadratic, η²‖u‖²",
        "norm_growth/term_momentum": "momentum",
        "norm_growth/term_weight_decay": "weight decay",
        "norm_growth/term_gradient": "gradient, ⟨W, ∇W⟩",
        "norm_growth/residual": "residual",
        "norm_growth/storage_floor": "storage floor",
    },
    "cumulative": {
        "norm_growth/cumulative_increment": "measured, ‖W_t‖² − ‖W_0‖²",
        "norm_growth/cumulative_explained": "explained (all terms)",
        "norm_growth/cumulative_predicted": "eq 16: Σ η²‖∇‖²",
    },
    "norms": {"norm_growth/weight_norm": "‖W‖"},
    "angles": {"norm_growth/angular_update": "measured", "norm_growth/equilibrium_angle": "equilibrium"},
    "affine": {
        f"affine/{quantity}_{key}": label
        for quantity in ("abs_gamma2_minus_sigma2", "abs_beta_minus_mu", "gamma2_over_sigma2")
        for key, label in {
            "mean": "mean of all channels",
            "median": "median",
            "q90": "90 % quantile",
            "channel/layer1.0.bn1": "one channel",
        }.items()
    },
}
RESULTS = [
    dict(zip(("attack", "accuracy", "ci_low", "ci_high", "accuracy_drop", "correct", "n"), row, strict=True))
    for row in (("clean", 0.9375, 0.7, 0.99, 0.0, 15, 16), ("bim", 0.0625, 0.01, 0.283, 0.875, 1, 16))
]


def logged(version: str = "one", end: bool = True, robustness: bool = True) -> RecordLogger:
    """Write a record of three steps with distinct positive values for every key of the figures."""
    generator = np.random.default_rng(0)
    logger = RecordLogger("out", version=version)
    own = {"trainer": {"max_epochs": 1}, "test_after_fit": True}  # as the command line logs it
    logger.log_hyperparams({"config": {**own, "seed_everything": 3, "model": {"arch": "resnet18", "lr": None}}})
    for step in (4, 9, 14):
        keys = [key for names in SERIES.values() for key in names]
        logger.log_metrics({key: 0.1 + generator.random() for key in keys}, step=step)
        names = ("orthogonality/max_abs_cos", "orthogonality_control/max_abs_cos", "norm_growth/weight_norm")
        logger.log_layers({name: {"conv1": generator.random(), "fc": generator.random()} for name in names}, step=step)
    if robustness:
        logger.log_results("robustness", {"settings": {"threat": {"eps": 0.03125}, "epoch": 7}, "results": RESULTS})
        picture = generator.integers(0, 256, (4, 4, 3), dtype=np.uint8)
        logger.log_image("robustness/examples", [picture], caption=["label 3: clean → 3, bim → <5>"])
    logger.finalize("success" if end else "failed")
    if not end:
        logger.path.write_text("".join(logger.path.read_text().splitlines(keepends=True)[:-1]))
    return logger


class Page(HTMLParser):
    """A parsed page: its texts by element, attributes that load a resource, and scripts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.cells: list[list[str]] = []
        self.scripts: list[str] = []
        self.styles: list[str] = []
        self._inside: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.loads += [value or "" for name, value in attrs if name in ("src", "href", "data", "poster", "srcset")]
        self._inside.append(tag)
        if tag == "tr":
            self.cells.append([])
        if tag in ("script", "style"):
            (self.scripts if tag == "script" else self.styles).append("")

    def handle_endtag(self, tag: str) -> None:
        while self._inside and self._inside.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        here = self._inside[-1] if self._inside else ""
        if here in ("script", "style"):
            (self.scripts if here == "script" else self.styles)[-1] += data
        elif data.strip():
            self.texts.append(data.strip())
            if here in ("td", "th"):
                self.cells[-1].append(data.strip())

    @property
    def text(self) -> str:
        return "\n".join(self.texts)

    def spec(self, anchor: str) -> dict[str, Any]:
        """Return the figure's specification in the form that the browser gets."""
        page = json.loads(self.scripts[1])
        spec: dict[str, Any] = page["figures"][anchor]
        return {**spec, "data": {"values": unpacked(page, spec["data"])}}

    def anchors(self) -> list[str]:
        return [attrs["id"].removeprefix("chart-") for tag, attrs in self.tags if attrs.get("class") == "chart"]


def unpacked(page: dict[str, Any], data: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the rows of a figure as the page's script makes them."""
    columns = dict(data["values"])
    for kind in ("texts", "steps"):
        columns |= {field: [page[kind][k] for k in column] for field, column in data[kind].items()}
    return [{field: column[k] for field, column in columns.items()} for k in range(data["rows"])]


def rows_of(spec: Any) -> list[dict[str, Any]]:
    """Return all rows of data in a specification."""
    if isinstance(spec, list):
        return [row for entry in spec for row in rows_of(entry)]
    if not isinstance(spec, dict):
        return []
    here = spec["data"].get("values", []) if isinstance(spec.get("data"), dict) else []
    stored = [row for rows in spec.get("datasets", {}).values() for row in rows]
    return [*here, *stored, *(row for k, v in spec.items() if k not in ("data", "datasets") for row in rows_of(v))]


def page(logger: RecordLogger) -> Page:
    return Page(write_report(logger.folder).read_text(encoding="utf-8"))


def test_report_is_written_into_the_run_folder() -> None:
    logger = logged()
    path = write_report(logger.folder)
    assert path == logger.folder / "report.html"
    text = Page(path.read_text(encoding="utf-8")).text
    assert "normgeo / one" in text
    assert "15 training steps" in text
    assert __version__ in text
    assert "Not ended" not in text


@pytest.mark.parametrize("key", ["effective/weight_norm", "channels/close_pairs", "test/accuracy"])
def test_what_is_logged_after_training_is_no_training_step(key: str) -> None:
    logger = logged()
    logger.log_metrics({key: 1.0}, step=15)
    logger.finalize("success")
    assert "15 training steps" in page(logger).text


def test_page_loads_nothing() -> None:
    shown = page(logged())
    assert shown.loads
    assert all(load.startswith(("data:", "#")) for load in shown.loads), shown.loads
    assert not re.search(r"@import|url\((?!\s*['\"]?data:)", "".join(shown.styles))
    outside = shown.text + str([attrs for _, attrs in shown.tags])
    assert "http" not in outside
    urls = set(re.findall(r"https?://[^\s\"'`)<>\\]+", "".join(shown.scripts)))
    skipped_on_error = ("http://www.w3.org/", "https://vega.github.io/schema/", "https://vega.github.io/editor/")
    assert {url for url in urls if not url.startswith(skipped_on_error)} <= {
        "https://github.com/vega/vega-lite/issues/2415"
    }
    assert not re.search(r"\bimport\s*\(|importScripts\(", "".join(shown.scripts))
    assert not any(tag in ("link", "iframe") and "icon" not in str(attrs) for tag, attrs in shown.tags)


def points_of(spec: Any, layer: str) -> list[tuple[str, int, float]]:
    """Return the points that a figure of curves draws for the chosen layer: quantity, step and value."""
    return sorted(
        (row["quantity"], step, value)
        for row in rows_of(spec)
        if row["layer"] == layer
        for step, value in zip(row["step"], row["value"], strict=True)
    )


def five_digits(value: float) -> float:
    return float(f"{value:.5g}")


@pytest.mark.parametrize("anchor", SERIES)
def test_figure_draws_exactly_the_values_of_the_record(anchor: str) -> None:
    logger = logged()
    metrics = read_record(logger.folder).metrics
    points = [(name, step, five_digits(v)) for key, name in SERIES[anchor].items() for step, v in metrics[key]]
    assert points_of(page(logger).spec(anchor), ALL) == sorted(points)


def test_a_layer_is_drawn_as_the_record_has_it() -> None:
    logger = logged()
    shown, layers = page(logger), read_record(logger.folder).layers
    assert [text for text in shown.texts if text in ("conv1", "fc", ALL)][:3] == [ALL, "conv1", "fc"]
    for layer in ("conv1", "fc"):
        for anchor, key in (("norms", "norm_growth/weight_norm"), ("orthogonality", "orthogonality/max_abs_cos")):
            expected = [(SERIES[anchor][key], step, five_digits(values[layer])) for step, values in layers[key]]
            drawn = points_of(shown.spec(anchor), layer)
            assert [point for point in drawn if point[0] == SERIES[anchor][key]] == expected


def test_layers_are_those_of_the_last_step() -> None:
    logger = logged()
    layers = read_record(logger.folder).layers
    rows = rows_of(page(logger).spec("orthogonality-layers"))
    drawn = {(row["quantity"], row["layer"]): row["value"] for row in rows}
    names = {
        "scale invariant": "orthogonality/max_abs_cos",
        "control (no invariance)": "orthogonality_control/max_abs_cos",
    }
    assert drawn == {(name, layer): value for name, key in names.items() for layer, value in layers[key][-1][1].items()}


def test_negative_values_are_drawn() -> None:
    logger = RecordLogger("out")
    for step, value in enumerate((1.0, -2.0, 0.0)):
        logger.log_metrics({"norm_growth/increment": value, "norm_growth/term_momentum": value}, step=step)
    logger.finalize("success")
    shown = page(logger)
    for anchor in ("increments", "terms"):
        spec = shown.spec(anchor)
        assert [row["value"] for row in rows_of(spec)] == [[1.0, -2.0, 0.0]]
        steps = [step for step in spec["transform"] if "calculate" in step or "filter" in step][-2:]
        assert steps == [{"calculate": "abs(datum.value)", "as": "magnitude"}, {"filter": "datum.magnitude > 0"}]


def test_every_figure_has_its_place_and_specification() -> None:
    logger = logged()
    shown = page(logger)
    expected = [figure.anchor for figure in all_figures(Curves(load_runs([logger.folder])))]
    assert shown.anchors() == expected
    assert set(expected) == {*SERIES, "increments-ratio", "cumulative-ratio", "orthogonality-layers", "accuracies"}
    assert all(
        shown.spec(anchor)["$schema"].startswith("https://vega.github.io/schema/vega-lite/") for anchor in expected
    )


def test_robustness_table_and_settings() -> None:
    shown = page(logged())
    assert any("15/16" in " ".join(row) and " 1/16" in " ".join(row) for row in shown.cells)
    assert ["threat.eps", "0.03125"] in shown.cells
    assert ["epoch", "7"] in shown.cells
    kept = ("attack", "accuracy", "ci_low", "ci_high", "correct", "n")
    drawn = [{name: row[name] for name in kept} for row in rows_of(shown.spec("accuracies"))]
    assert drawn == [{name: row[name] for name in kept} for row in RESULTS]


def test_settings_of_the_run_are_shown() -> None:
    cells = page(logged()).cells
    assert ["seed_everything", "3"] in cells
    assert ["model.arch", "resnet18"] in cells
    assert not any(row and row[0] == "model.lr" for row in cells)  # settings that are not set are omitted


def test_example_images_are_inside() -> None:
    logger = logged()
    shown = page(logger)
    (source,) = [attrs["src"] for tag, attrs in shown.tags if tag == "img"]
    picture = (logger.folder / "images" / "robustness-examples-0.png").read_bytes()
    assert source == "data:image/png;base64," + base64.b64encode(picture).decode()
    assert "label 3: clean → 3, bim → <5>" in shown.text  # as text, not as an element


def test_run_without_robustness() -> None:
    shown = page(logged(robustness=False))
    assert "accuracies" not in shown.anchors()
    assert not any(attrs.get("id") == "robustness" or tag == "img" for tag, attrs in shown.tags)


def test_run_without_measurements() -> None:
    logger = RecordLogger("out")
    logger.log_hyperparams({"arch": "resnet18"})
    logger.finalize("success")
    shown = page(logger)
    assert shown.anchors() == []
    assert "Nothing was measured." in shown.text
    assert ["arch", "resnet18"] in shown.cells


def test_killed_run_says_so() -> None:
    shown = page(logged(end=False))
    assert "Not ended, or killed:" in shown.text
    assert "increments" in shown.anchors()


def test_missing_picture_does_not_stop_the_report() -> None:
    logger = logged()
    (logger.folder / "images" / "robustness-examples-0.png").unlink()
    assert "bim" in page(logger).text


NASTY = "<img src=x onerror=alert(1)>&\"'"


def test_special_characters_in_names_and_settings_are_text() -> None:
    logger = logged(version=NASTY)
    logger.log_hyperparams({"name": NASTY, "close": "</script><b>"})
    logger.finalize("success")
    shown = page(logger)
    assert f"normgeo / {NASTY}" in shown.text
    assert ["name", NASTY] in shown.cells
    assert ["close", "</script><b>"] in shown.cells
    assert [tag for tag, attrs in shown.tags if "onerror" in attrs or tag == "b"] == []


def test_script_end_in_a_layer_name_does_not_end_the_script() -> None:
    logger = logged()
    logger.log_metrics({"norm_growth/weight_norm/</script><b>x": 1.0}, step=20)
    logger.finalize("success")
    shown = page(logger)
    assert "</script><b>x" in [row["layer"] for row in rows_of(shown.spec("norms"))]
    assert len(shown.scripts) == 3


def test_no_record(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"has no record\.jsonl, .* it is empty\. Give the folder of a run"):
        write_report(tmp_path)


def test_summary_shows_first_and_last_step_and_accuracies() -> None:
    logger = logged()
    console = Console(width=120, record=True, file=open("/dev/null", "w"))  # noqa: SIM115, PTH123
    console.print(summary_table(read_record(logger.folder)))
    console.file.close()
    lines = console.export_text().splitlines()
    assert any("step 4" in line and "step 14" in line for line in lines)
    points = read_record(logger.folder).metrics["norm_growth/weight_norm"]
    (line,) = [line for line in lines if "‖W‖, scale-invariant" in line]
    assert line.split()[-2:] == [f"{points[0][1]:.4g}", f"{points[-1][1]:.4g}"]
    (line,) = [line for line in lines if line.strip().startswith("bim")]
    assert re.split(r"\s{2,}", line.strip()) == ["bim", "6.25 %", "1.0 … 28.3 %", "87.50 pt", "16"]


def swept(**radii: tuple[float, ...]) -> list[dict[str, Any]]:
    return [
        {**RESULTS[1], "attack": f"bim{kind}_eps{eps}", "eps": eps} for kind, values in radii.items() for eps in values
    ]


def written(rows: list[dict[str, Any]]) -> Page:
    logger = RecordLogger("out")
    logger.log_results("robustness", {"settings": {}, "warnings": [], "results": rows})
    logger.finalize("success")
    return page(logger)


def test_controls_of_several_loaders_are_no_attacks_and_radii_begin_at_the_clean_accuracy() -> None:
    rows = [*RESULTS[:1], *swept(**{"": (0.01, 0.02)})]
    rows += [{**row, "attack": f"{row['attack']}_rescaled"} for row in rows]
    shown = written([{**row, "attack": f"{row['attack']}/dataloader_idx_{k}"} for row in rows for k in (0, 1)])
    drawn = {row["attack"] for row in rows_of(shown.spec("accuracies"))}
    assert len(drawn) == 6
    assert not any("rescaled" in name for name in drawn)
    starts = [row["attack"] for row in rows_of(shown.spec("against-eps")) if row["eps"] == 0]
    families = ("bim/dataloader_idx_", "bim_rescaled/dataloader_idx_")
    assert sorted(starts) == sorted(f"{family}{k}" for family in families for k in (0, 1))


def test_radii_of_two_norms_have_an_axis_each() -> None:
    shown = written([*RESULTS[:1], *swept(**{"": (0.01, 0.02), "_l2": (0.5, 1.0)})])
    spec = shown.spec("against-eps")
    assert {(row["attack"], row["panel"]) for row in rows_of(spec)} == {("bim", "l∞"), ("bim_l2", "l2")}
    assert spec["resolve"]["scale"]["x"] == "independent"


def test_accuracy_against_the_radius_begins_at_the_clean_one() -> None:
    logger = RecordLogger("out")
    swept = [
        {**RESULTS[1], "attack": f"bim_eps{eps}", "eps": eps, "accuracy": accuracy}
        for eps, accuracy in ((0.01, 0.5), (0.02, 0.25))
    ]
    rows = [*RESULTS, *swept]
    rows += [{**row, "attack": f"{row['attack']}_rescaled"} for row in rows]
    document = {"settings": {"seed": 0}, "warnings": ["too <weak>"], "results": rows}
    logger.log_results("robustness", document)
    logger.finalize("success")
    shown = page(logger)
    points = [(row["attack"], row["eps"], row["accuracy"]) for row in rows_of(shown.spec("against-eps"))]
    assert sorted(points) == [
        (name, *point) for name in ("bim", "bim_rescaled") for point in ((0.0, 0.9375), (0.01, 0.5), (0.02, 0.25))
    ]
    assert "too <weak>" in shown.text
