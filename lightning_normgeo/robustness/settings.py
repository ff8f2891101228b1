"""Settings of a robustness evaluation, checked before anything runs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Any, Literal

import torch

from lightning_normgeo.errors import ConfigurationError
from lightning_normgeo.robustness.attacks.attack import Attack, Noise
from lightning_normgeo.robustness.attacks.builders import Defaults, step_size
from lightning_normgeo.robustness.attacks.native_attacks import Transfer
from lightning_normgeo.robustness.attacks.random_numbers.counter_random import GENERATOR
from lightning_normgeo.robustness.attacks.registry import DEFAULT_ATTACKS, attack_list
from lightning_normgeo.robustness.attacks.requests import FOREIGN, requests
from lightning_normgeo.robustness.attacks.verification import verification_settings
from lightning_normgeo.robustness.model.precision import AUTOCAST, VERIFIED, precision_name
from lightning_normgeo.robustness.threat_models import InputSpace, ThreatModel, threat_model
from lightning_normgeo.utilities.attack_names import control_of, draws_of_clean
from lightning_normgeo.utilities.checked_values import (
    flag,
    is_number,
    one_or_more,
    plain_values,
    short_repr,
    whole,
)

Semantics = Literal["final", "any"]
OnUnsuitable = Literal["skip", "raise"]
Autocast = Literal["bf16", "fp16", "bf16-verified"]
_CHOICES = {
    "semantics": ("final", "any"),
    "autocast": (*AUTOCAST, None),
    "on_unsuitable": ("skip", "raise"),
}


@dataclass(frozen=True)
class RobustnessSettings:
    """Settings of :func:`evaluate_robustness` and ``RobustnessEvaluation``.

    Attributes:
        preset: Threat model: ``pixel-8-255`` (pixels in [0, 1]: eps 8/255, step 2/255, 10 steps, noise 0.05, l2 radius
            0.5), ``galloway2019`` (normalized inputs: eps 0.03, step 0.003, 20 steps, noise 0.25 unclipped, values
            clipped to ±2, l2 radius 0.03·√d for d values per image) or ``galloway2019-boxed`` (the same, clipped to
            valid pixels).
        eps: Radius of the l∞ ball in units of ``space``; a list adds one row per radius. Default: the preset's.
        eps_l2: Radius of the l2 ball in units of ``space``; a list adds one row per radius. Default: the preset's.
        step_size: Step size of BIM and PGD in l∞, in units of ``space``, for every radius; l2 attacks keep its ratio to
            ``eps``. Default: keeps the preset's step-to-radius ratio.
        steps: Number of BIM and PGD iterations; APGD has 100 of its own. Default: the preset's.
        noise_std: Standard deviation of the Gaussian noise in units of ``space``; a list adds one row per value.
            Default: the preset's.
        lower: Smallest value an attacked image may have, in units of ``space``, one number or one per channel. Default:
            the preset's.
        upper: Largest value an attacked image may have, in units of ``space``, one number or one per channel. Default:
            the preset's.
        attacks: Attacks to run besides ``clean``: one or several of ``gaussian``, ``bim``, ``pgd``, ``apgd``,
            ``square``, ``standard`` (AutoAttack's suite), ``bim_l2``, ``pgd_l2``, ``apgd_l2``, ``standard_l2`` and
            ``torchattacks.<name>``; or dictionaries with settings of their own, as ``{name: apgd, loss: dlr}``.
            Default: ``gaussian`` and ``bim``.
        attack_options: Constructor arguments of torchattacks' attacks, as a dictionary for each attack's name, e.g.
            ``{torchattacks.Square: {n_queries: 100}}``. In a pixel-space threat model, l∞ attacks take eps, step size
            and steps from it unless given here.
        semantics: Points of BIM and PGD that count: ``final``, the last one (as in the papers and torchattacks), or
            ``any``, the first misclassified one, the clean image included (as in AutoAttack), after which the sample is
            attacked no further.
        restarts: Number of random starts of PGD; a sample is robust only if it withstands all.
        seed: Seed of the noise and of the random starts.
        batch_size: Samples per forward pass. Default: the loader's, doubled while memory allows, up to 256 on a CPU and
            1024 on a GPU.
        fold: Fold batch normalization into convolutions and store their weights in channels-last order, which is faster
            and changes logits by rounding only.
        autocast: Compute in half precision: ``bf16`` or ``fp16``; or ``bf16-verified``: attacks search in bf16, all
            decisions are made in the model's own precision. Default: the model's own precision.
        compile: Compile the model with ``torch.compile`` for the evaluation.
        max_samples: Evaluate only the first ``max_samples`` samples. Default: all.
        rescale: Control: repeat the evaluation with every scale-invariant weight multiplied by this factor (> 0), and
            with running statistics to match, as rows ``…_rescaled``. The function is the same except for ε, so weight
            norms alone change no accuracy. Default: no control.
        space: ``input`` to measure radii and noise in the inputs' own units (dB, standardized features); radii, noise,
            ``lower`` and ``upper`` are then required. Default: the preset's.
        on_unsuitable: If the model or its data cannot be evaluated, or an attack fails: ``raise`` stops, ``skip``
            continues and gives the reason in the report.
        sweep: The settings among ``eps``, ``eps_l2`` and ``noise_std`` that were given as lists, with their values.
    """

    preset: str = "pixel-8-255"
    eps: float | Sequence[float] | None = None
    eps_l2: float | Sequence[float] | None = None
    step_size: float | None = None
    steps: int | None = None
    noise_std: float | Sequence[float] | None = None
    lower: float | Sequence[float] | None = None
    upper: float | Sequence[float] | None = None
    attacks: str | Mapping[str, Any] | Sequence[str | Mapping[str, Any]] | None = None
    attack_options: Mapping[str, Mapping[str, Any]] | None = None
    semantics: Semantics = "final"
    restarts: int = 1
    seed: int = 0
    batch_size: int | None = None
    fold: bool = True
    autocast: Autocast | None = None
    compile: bool = False
    max_samples: int | None = None
    rescale: float | None = None
    space: Literal["pixel", "normalized", "input"] | None = None
    on_unsuitable: OnUnsuitable = "raise"
    sweep: dict[str, tuple[float, ...]] = field(init=False, repr=False)

    @classmethod
    def among(cls, arguments: Mapping[str, Any]) -> RobustnessSettings:
        """Return the settings among a function's arguments by name; it must have a parameter for each setting."""
        return cls(**{one.name: arguments[one.name] for one in fields(cls) if one.init})

    def __repr__(self) -> str:
        """Return the settings that differ from their defaults."""
        changed = [one for one in fields(self) if one.init and getattr(self, one.name) != one.default]
        return f"RobustnessSettings({', '.join(f'{one.name}={getattr(self, one.name)!r}' for one in changed)})"

    def __post_init__(self) -> None:
        """Check all settings.

        Raises:
            ConfigurationError: naming the setting, its value and what is allowed.
        """
        self._make_plain()
        for name in ("restarts", "batch_size", "max_samples"):
            if getattr(self, name) is not None or name == "restarts":
                whole(name, getattr(self, name), 1, "Leave it out for the default.")
        if type(self.seed) is not int:
            raise ConfigurationError(f"seed={short_repr(self.seed)} must be an integer.")
        for name in ("fold", "compile"):
            flag(name, getattr(self, name))
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                allowed = " or ".join(repr(choice) for choice in choices if choice is not None)
                raise ConfigurationError(f"{name}={short_repr(getattr(self, name))} is unknown; choose {allowed}.")
        if self.rescale is not None and not (is_number(self.rescale) and 0 < self.rescale < math.inf):
            raise ConfigurationError(
                f"rescale={short_repr(self.rescale)} must be a positive number, as 10.0: only positive factors leave "
                "the function unchanged."
            )
        self._check_sweep()
        self.all_attacks  # noqa: B018 - the cached property checks the names of attacks now instead of when it is used
        if self.threat.space == "input":
            self._check_units()

    @cached_property
    def threat(self) -> ThreatModel:
        """The threat model. For settings given as lists it has the preset's values, to which its step size belongs."""
        single = {name: None if name in self.sweep else getattr(self, name) for name in ("eps", "eps_l2", "noise_std")}
        ends: dict[str, Any] = {}
        for name in ("lower", "upper"):
            end = getattr(self, name)
            ends[name] = tuple(end) if isinstance(end, Sequence) and not isinstance(end, str) else end
        step = self.step_size
        if step is None and isinstance(single["eps"], (int, float)):
            step = step_size(threat_model(self.preset, self.space), single["eps"])
        return threat_model(self.preset, self.space, step_size=step, steps=self.steps, **single, **ends)

    @cached_property
    def all_attacks(self) -> tuple[Attack, ...]:
        """The attacks, one for each row of the results besides ``clean``; noise comes first."""
        names = self._asked
        same_step = self.step_size is not None
        options = self.attack_options or {}
        found = attack_list(names, Defaults(self.threat, self.sweep, self.restarts, options, same_step))
        double = {attack.name for attack in found if [other.name for other in found].count(attack.name) > 1}
        if double:
            raise ConfigurationError(
                f"attacks={short_repr(list(names))}: {min(double)!r} is there more than once. Give attacks of one kind "
                "names of their own: {'name': 'strong', 'attack': 'apgd', …}."
            )
        return tuple(sorted(found, key=lambda attack: not isinstance(attack, Noise)))

    @property
    def parts(self) -> dict[str, str]:
        """The kind of detail by row, for rows that are details: a part of a ``suite``, or :attr:`Attack.part`."""
        followed = {attack.after for attack in self.all_attacks}
        found = {one.name: "suite" if one.name in followed else one.part for one in self.all_attacks}
        found = {name: part for name, part in found.items() if part}
        controls = {control_of(name): part for name, part in found.items()}
        return found | controls | dict.fromkeys(draws_of_clean(), "draw")

    @property
    def transfers(self) -> bool:
        """Whether an attack is transferred from a surrogate."""
        return any(isinstance(attack, Transfer) for attack in self.all_attacks)

    @property
    def _asked(self) -> list[Any]:
        return list(DEFAULT_ATTACKS if self.attacks is None else self.attacks)

    @property
    def rows(self) -> list[str]:
        """The names of all rows of the results."""
        names = ["clean", *(attack.name for attack in self.all_attacks)]
        return names if self.rescale is None else [*names, *map(control_of, names)]

    @property
    def autocast_dtype(self) -> torch.dtype | None:
        """The dtype of autocast; None without autocast."""
        return None if self.autocast is None else AUTOCAST[self.autocast]

    @property
    def verified(self) -> bool:
        """Whether attacks search in half precision, and decisions are made in the model's own."""
        return self.autocast == VERIFIED

    def describe(self, inputs: InputSpace, precision: str = "fp32") -> dict[str, Any]:
        """Return the settings that determine the results, as plain values, to be stored with them.

        Args:
            inputs: how images relate to pixels.
            precision: the precision of the model without autocast (``fp32``, ``tf32``, ``bf16``, …).
        """
        return {
            "preset": self.preset,
            "threat": self.threat.settings(),
            "normalization": None if inputs.mean is None else {"mean": inputs.mean, "std": inputs.std},
            "normalized_data": inputs.normalized_data,
            "inputs": {"source": inputs.source, "confirmed": inputs.confirmed},
            "attacks": {attack.name: attack.settings() for attack in self.all_attacks},
            "semantics": self.semantics,
            "seed": self.seed,
            "generator": GENERATOR,
            "loss": "cross_entropy",
            "precision": precision_name(self.autocast, precision),
            "fold": self.fold,
            "max_samples": self.max_samples,
            "rescale": self.rescale,
            **({"verification": verification_settings(self.all_attacks, precision)} if self.verified else {}),
        }

    def _make_plain(self) -> None:
        """Convert a single attack to a list, sets to sorted lists, and numbers of numpy and torch to Python's."""
        for name, given in vars(self).copy().items():
            is_collection = isinstance(given, Iterable) and not isinstance(given, (str, bytes, list, tuple, Mapping))
            is_array = hasattr(given, "tolist")
            value = one_or_more(given) if is_collection and not is_array else given
            object.__setattr__(self, name, plain_values(value))
        if self.attacks is not None:
            object.__setattr__(self, "attacks", one_or_more(self.attacks))
        options = {} if self.attack_options is None else self.attack_options
        if not isinstance(options, Mapping) or not all(isinstance(one, Mapping) for one in options.values()):
            raise ConfigurationError(
                f"attack_options={short_repr(options)} must have for each attack a dictionary of its options, as "
                "{'torchattacks.Square': {'n_queries': 100}}."
            )

    def _check_sweep(self) -> None:
        """Find the settings that were given as lists, and check each of their values.

        Raises:
            ConfigurationError: for an empty list, equal values, or values out of range.
        """
        object.__setattr__(self, "sweep", {})
        for name in ("eps", "eps_l2", "noise_std"):
            values = getattr(self, name)
            if not isinstance(values, (list, tuple)):
                continue
            if not values or any(entry is None or values.count(entry) > 1 for entry in values):
                raise ConfigurationError(f"{name}={short_repr(list(values))} must be different values, at least one.")
            self.sweep[name] = tuple(values)
            for value in values:
                threat_model(self.preset, self.space, **{name: value})

    def _check_units(self) -> None:
        """Refuse ``space="input"`` with radii, noise or bounds of a preset, which are in other units.

        Raises:
            ConfigurationError: naming the settings that have to be given.
        """
        needed = {"lower", "upper"}
        for request in requests(self._asked):
            if request.kind == "gaussian":
                needed |= set() if "std" in request.options else {"noise_std"}
            elif not request.kind.startswith(FOREIGN):
                needed |= set() if "eps" in request.options else {"eps" if request.norm == "linf" else "eps_l2"}
            elif any(not math.isfinite(end) for end in self._ends()):
                raise ConfigurationError(
                    f"{request.name} works on pixels, so space='input' needs lower=… and upper=… that are finite."
                )
        missing = sorted(name for name in needed if getattr(self, name) is None)
        if missing:
            raise ConfigurationError(
                f"space='input' measures in units that no preset knows: give {', '.join(missing)} too (lower and upper "
                "may be infinite)."
            )

    def _ends(self) -> list[float]:
        """Return the finite or infinite ends of the box, of all channels."""
        ends = (self.threat.lower, self.threat.upper)
        return [value for end in ends if end is not None for value in (end if isinstance(end, tuple) else (end,))]
