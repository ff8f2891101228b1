"""The page of the gallery: docs/records/gallery.txt with the numbers and tables of docs/records/paper_resnet18.json.

``docs/generate.py`` writes it.
"""

from __future__ import annotations

import json
import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

PAGE = Path(__file__).resolve().parent / "reference" / "gallery.md"
RECORDS = PAGE.parents[1] / "records"
_TITLES = {"bn": "batch", "gn": "group", "ln": "layer", "wn": "weight"}
_AFFINE = {
    "abs_gamma2_minus_sigma2_median": r"\|γ² − σ²\|",
    "abs_beta_minus_mu_median": r"\|β − μ\|",
    "gamma2_over_sigma2_median": "γ²/σ²",
}
_SETTINGS = ("decay", "epochs", "steps", "lr", "batch", "noise", "attack_steps", "rescale")
_COUNTS = {2: "two", 4: "four", 6: "six", 8: "eight"}

Data = Mapping[str, Any]


def recorded() -> dict[str, Any]:
    """Return the numbers of the study."""
    return dict(json.loads((RECORDS / "paper_resnet18.json").read_text(encoding="utf-8")))


def run(data: Data, norm: str, decay: bool) -> dict[str, Any]:
    """Return the numbers of one run, with or without weight decay."""
    names = [name for name in data["runs"] if name.startswith(f"norm={norm},")]
    (name,) = (name for name in names if name.endswith("weight_decay=0.0") != decay)
    return dict(data["runs"][name])


def radius(eps: float) -> str:
    """Return a radius as a fraction of 255."""
    return f"{255 * eps:.2g}/255"


def norms(data: Data) -> list[str]:
    """Return the normalizations with and without weight decay in the study."""
    names = {norm: sum(name.startswith(f"norm={norm},") for name in data["runs"]) for norm in _TITLES}
    return [norm for norm, runs in names.items() if runs == 2]


def page() -> str:
    """Return the page."""
    data = recorded()
    tables = {f"table_{name}": make(data) for name, make in _TABLES.items()}
    text = (RECORDS / "gallery.txt").read_text(encoding="utf-8").format(**tables, **numbers(data))
    return "\n\n".join(_wrapped(block) for block in text.strip().split("\n\n")) + "\n"


def _wrapped(block: str) -> str:
    """Return a block of Markdown with lines of at most 120 characters if it is a paragraph."""
    if block.startswith(("#", "!", "|", "```")):
        return block
    return textwrap.fill(block, 120, break_long_words=False, break_on_hyphens=False)


def _markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [columns, ("---", *["---:"] * (len(columns) - 1)), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _orthogonality(data: Data) -> str:
    keys = {
        "scale-invariant weights": "orthogonality/max_abs_cos",
        "the same with ε removed": "orthogonality/max_abs_cos_corrected",
        "control: weights that are not invariant": "orthogonality_control/max_abs_cos",
    }
    curves = [run(data, norm, decay=False)["curves"] for norm in norms(data)]
    rows = [
        [title, *(f"{one[key]['most']:.1e}" if key in one else "" for one in curves)] for title, key in keys.items()
    ]
    return _markdown([r"largest \|cos(W, ∇W)\| of all measured steps, no weight decay", *norms(data)], rows)


def _increments(data: Data) -> str:
    runs = [run(data, norm, decay=False) for norm in norms(data)]
    sums = [one["sums"] for one in runs]
    rows = [
        ["measured Δ‖W‖²", *(f"{one['increment']:.6g}" for one in sums)],
        ["eq 16, η²‖∇W‖²", *(f"{one['predicted']:.6g}" for one in sums)],
        ["eq 16 / measured", *(f"{one['predicted'] / one['increment']:.5f}" for one in sums)],
        ["largest residual / storage floor of a step", *(f"{one['residual_over_floor']:.2f}" for one in runs)],
    ]
    return _markdown([f"sums over {runs[0]['measured']} measured steps, no weight decay", *norms(data)], rows)


def _norms(data: Data) -> str:
    rows = []
    for title, decay in (("no weight decay", False), ("weight decay", True)):
        curves = [run(data, norm, decay)["curves"]["norm_growth/weight_norm"] for norm in norms(data)]
        rows.append([title, *(f"{growth(one):+.2f} %" for one in curves)])
    return _markdown(["change of ‖W‖ from the first to the last measured step", *norms(data)], rows)


def growth(norms: Mapping[str, float]) -> float:
    """Return the change of a norm from the first to the last measured step, in percent."""
    return 100 * (norms["last"] / norms["first"] - 1)


def _affine(data: Data) -> str:
    curves = [run(data, "bn", decay)["curves"] for decay in (False, True)]
    rows = [
        [title, *(f"{one[f'affine/{key}']['first']:.2f} → {one[f'affine/{key}']['last']:.2f}" for one in curves)]
        for key, title in _AFFINE.items()
    ]
    return _markdown(
        ["bn, median of all channels, first → last measured step", "no weight decay", "weight decay"], rows
    )


def _attacks(data: Data) -> dict[str, str]:
    """Return the titles of the evaluated conditions by the attack's name."""
    settings = data["settings"]
    bim = {f"bim_eps{eps:.4g}": f"BIM, {radius(eps)}" for eps in settings["eps"]}
    titles = {"clean": "clean", "gaussian": f"noise, σ = {settings['noise']:g}", **bim}
    return {name: titles[name] for name in run(data, "bn", decay=False)["changed"]}


def _accuracies(data: Data) -> str:
    attacks = _attacks(data)
    kinds = {f"{norm}{' + λ' if decay else ''}": (norm, decay) for norm in norms(data) for decay in (False, True)}
    counts = {title: run(data, *kind)["accuracies"] for title, kind in kinds.items()}
    rows = [[title, *(str(one[name][0]) for name in attacks)] for title, one in counts.items()]
    samples = next(iter(counts.values()))["clean"][1]
    return _markdown([f"correct of {samples:,}", *attacks.values()], rows)


def _differences(data: Data) -> str:
    found: dict[str, list[str]] = {}  # by the report's title of the attack, normalizations in the order of the columns
    for one in data["paired"]:
        difference, low, high = (100 * one[name] for name in ("difference", "low", "high"))
        found.setdefault(one["attack"], []).append(f"{difference:+.1f} [{low:+.1f}, {high:+.1f}]")
    rows = [[title, *cells] for title, cells in zip(_attacks(data).values(), found.values(), strict=True)]
    return _markdown(["percentage points gained with weight decay", *norms(data)], rows)


def numbers(data: Data) -> dict[str, str]:
    """Return the numbers and names in the text of the page."""
    settings, shown = data["settings"], norms(data)
    runs = [run(data, norm, decay) for norm in shown for decay in (False, True)]
    return {
        "Norms": _enumerated([_TITLES[norm] for norm in shown]).capitalize(),
        "networks": _COUNTS[len(runs)],
        "left_out": "" if len(runs) == data["planned"] else " The other runs of the study have not finished.",
        "images": f"{settings['steps'] // settings['epochs'] * settings['batch']:,}",
        "samples": f"{runs[0]['accuracies']['clean'][1]:,}",
        "radii": _enumerated([f"{255 * eps:.2g}" for eps in settings["eps"]]) + " of 255",
        "largest_radius": radius(settings["eps"][-1]),
        "minutes": _span([f"{minutes:.0f}" for minutes in sorted(one["minutes"] for one in runs)]),
        "time_constant": f"{1 / (4 * settings['lr'] * settings['decay']):,.0f}",
        **{name: f"{settings[name]:,g}" for name in _SETTINGS},
        **_decay_numbers(data),
        **_test_numbers(data),
        **_loss_numbers(data),
        **_control_numbers(runs),
    }


def _enumerated(words: Sequence[str]) -> str:
    return f"{', '.join(words[:-1])} and {words[-1]}" if len(words) > 1 else words[0]


def _span(ordered: Sequence[str]) -> str:
    return " to ".join(dict.fromkeys((ordered[0], ordered[-1])))


def _decay_numbers(data: Data) -> dict[str, str]:
    """Return the size of the term of weight decay against eq 16, and the angles of the last steps."""
    runs = {norm: run(data, norm, decay=True) for norm in norms(data)}
    sizes = {norm: -one["sums"]["term_weight_decay"] / one["sums"]["predicted"] for norm, one in runs.items()}
    order = sorted(sizes, key=sizes.__getitem__)
    return {
        "decay_sizes": _span([f"{sizes[norm]:,.0f} ({norm})" for norm in order]),
        "turns": _span([f"{one:.2f}" for one in sorted(map(turn, runs.values()))]),
        "equilibrium": f"{runs['bn']['curves']['norm_growth/equilibrium_angle']['last']:.2g}",
    }


def turn(one: Data) -> float:
    """Return the angle of a run's last measured step as a share of its equilibrium."""
    curves = one["curves"]
    return float(curves["norm_growth/angular_update"]["last"] / curves["norm_growth/equilibrium_angle"]["last"])


def _test_numbers(data: Data) -> dict[str, str]:
    """Return the results of the paired tests of runs with against runs without weight decay."""
    tests = data["paired"]
    smallest = min(tests, key=lambda one: float(one["p"]))
    significant = sum(one["p_holm"] < 0.05 for one in tests)
    reach = max((one["high"] - one["low"]) / 2 for one in tests)
    return {
        "tests": f"{len(tests)}",
        "smallest_p": f"{smallest['p']:.2g}",
        "smallest_attack": smallest["attack"].replace("bim", "BIM"),
        "smallest_norm": smallest["norm"],
        "smallest_way": "better" if smallest["won"] > smallest["lost"] else "worse",
        "significant": str(significant or "none"),
        "widest": f"{100 * reach:.1f}",
    }


def _loss_numbers(data: Data) -> dict[str, str]:
    """Return what the strongest attack takes from the networks without weight decay, and their clean accuracies."""
    rows = {norm: run(data, norm, decay=False)["accuracies"] for norm in norms(data)}
    clean = {norm: 100 * one["clean"][0] / one["clean"][1] for norm, one in rows.items()}
    correct, samples = zip(*(one[f"bim_eps{data['settings']['eps'][-1]:.4g}"] for one in rows.values()), strict=True)
    losses = [clean[norm] - 100 * k / n for norm, k, n in zip(rows, correct, samples, strict=True)]
    return {
        "losses": _enumerated([f"{loss:.1f} ({norm})" for norm, loss in zip(rows, losses, strict=True)]),
        "cleans": _enumerated([f"{clean[norm]:.1f} ({norm})" for norm in rows]),
    }


def _control_numbers(runs: Sequence[Data]) -> dict[str, str]:
    """Return the number of decisions that differ with rescaled weights."""
    return {
        "conditions": f"{len(runs[0]['changed'])}",
        "changed": f"{sum(sum(one['changed'].values()) for one in runs)}",
        "decisions": f"{sum(one['accuracies'][name][1] for one in runs for name in one['changed']):,}",
    }


_TABLES: dict[str, Callable[[Data], str]] = {
    "orthogonality": _orthogonality,
    "increments": _increments,
    "norms": _norms,
    "affine": _affine,
    "accuracies": _accuracies,
    "differences": _differences,
}
