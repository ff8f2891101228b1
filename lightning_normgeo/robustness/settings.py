"""Everything that decides the results of an evaluation, as plain values, checked before anything runs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Any, Literal

import torch

from lightning_normgeo.errors import ConfigurationError
from lightning_normgeo.robustness.attacks.registry import (
    DEFAULT_ATTACKS,
    Attack,
    Noise,
    ProjectedGradient,
    attack_list,
    step_size,
)
from lightning_normgeo.robustness.threat_model import InputSpace, ThreatModel, threat_model
from lightning_normgeo.utilities.checked_values import flag, is_number, one_or_more, plain, shown, strings, whole

Semantics = Literal["final", "any"]
OnUnsuitable = Literal["skip", "raise"]
RESCALED = "_rescaled"
"""What the rows of the control end in."""
_CHOICES = {
    "semantics": ("final", "any"),
    "autocast": ("bf16", "fp16", None),
    "on_unsuitable": ("skip", "raise"),
}
_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class RobustnessSettings:
    """What :func:`evaluate_robustness` and ``RobustnessEvaluation`` evaluate.

    Attributes:
        preset: ``pixel-8-255`` (eps 8/255, step 2/255, 10 steps, noise 0.05, in pixels; l2 radius 0.5),
            ``galloway2019`` (eps 0.03, step 0.003, 20 steps, noise 0.25 unclipped, box ±2, in normalized space; l2
            radius 0.03·√d) or ``galloway2019-boxed`` (the same within the box of pixels).
        space: ``input`` to measure in the units of the inputs, whatever they are (dB, standardized features): then
            radii, noise, ``lower`` and ``upper`` have to be given. Default: the preset's.
        eps: radius of the l∞ ball in units of the space, or several, which become one row each. Default: the preset's,
            as for the next six.
        eps_l2: radius of the l2 ball, or several.
        step_size: step of one BIM or PGD iteration in l∞, for every radius; if left out it is to the radius as in the
            preset, and so it is in l2.
        steps: BIM and PGD iterations.
        noise_std: standard deviation of the Gaussian noise, or several.
        lower: lower end of the box, one number or one per channel.
        upper: upper end of the box.
        attacks: one or several out of ``gaussian``, ``bim``, ``pgd``, ``bim_l2``, ``pgd_l2`` and
            ``torchattacks.…``, any attack of torchattacks by name.
        attack_options: for the constructors of torchattacks' attacks, by name. Attacks in the l∞ ball get eps, step
            size and steps of the threat model.
        semantics: ``final``, the last iterate decides (as in the papers and torchattacks); ``any``, a sample is
            broken once any iterate breaks it, the clean image included (as AutoAttack counts), and then takes part in
            no further pass. Holds for BIM and PGD.
        restarts: of PGD; a sample has to withstand all.
        seed: of noise and random starts.
        batch_size: samples per pass; if left out the loader's, doubled while memory has room for it, up to 256 on a
            CPU and 1024 on a GPU.
        fold: whether to fold batch normalization into convolutions and to store weights with channels last, which
            leaves logits the same but for rounding.
        autocast: ``bf16`` or ``fp16`` to compute in half precision; float32 if left out.
        compile: whether to ``torch.compile`` the model for the evaluation.
        max_samples: evaluate only the first so many samples; all if left out.
        rescale: a control: evaluate everything once more with all scale-invariant weights so many times as long (and
            the running statistics to match), as rows ``…_rescaled``. The function is the same but for ε, so a change
            of robustness cannot come from the length of weights alone.
        on_unsuitable: what happens where a model or its data cannot be evaluated, or an attack fails: ``raise``, or
            ``skip`` it and say so in the report.
    """

    preset: str = "pixel-8-255"
    eps: float | Sequence[float] | None = None
    eps_l2: float | Sequence[float] | None = None
    step_size: float | None = None
    steps: int | None = None
    noise_std: float | Sequence[float] | None = None
    lower: float | Sequence[float] | None = None
    upper: float | Sequence[float] | None = None
    attacks: str | Sequence[str] | None = None
    attack_options: Mapping[str, Mapping[str, Any]] | None = None
    semantics: Semantics = "final"
    restarts: int = 1
    seed: int = 0
    batch_size: int | None = None
    fold: bool = True
    autocast: Literal["bf16", "fp16"] | None = None
    compile: bool = False
    max_samples: int | None = None
    rescale: float | None = None
    space: Literal["pixel", "normalized", "input"] | None = None
    on_unsuitable: OnUnsuitable = "raise"
    sweep: dict[str, tuple[float, ...]] = field(init=False, repr=False)

    @classmethod
    def among(cls, arguments: Mapping[str, Any]) -> RobustnessSettings:
        """The settings among the arguments of a function that has a parameter for each of them."""
        return cls(**{one.name: arguments[one.name] for one in fields(cls) if one.init})

    def __repr__(self) -> str:
        """Return what is not the default."""
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
            raise ConfigurationError(f"seed={shown(self.seed)} must be an integer.")
        for name in ("fold", "compile"):
            flag(name, getattr(self, name))
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                allowed = " or ".join(repr(choice) for choice in choices if choice is not None)
                raise ConfigurationError(f"{name}={shown(getattr(self, name))} is unknown; choose {allowed}.")
        if self.rescale is not None and not (is_number(self.rescale) and 0 < self.rescale < math.inf):
            raise ConfigurationError(
                f"rescale={shown(self.rescale)}: only positive numbers are symmetries. Choose one, as 10.0."
            )
        self._check_sweep()
        self.all_attacks  # noqa: B018 - names are checked now
        if self.threat.space == "input":
            self._check_units()

    @cached_property
    def threat(self) -> ThreatModel:
        """The threat model; of a sweep the one that the preset's step size belongs to."""
        single = {name: None if name in self.sweep else getattr(self, name) for name in ("eps", "eps_l2", "noise_std")}
        ends = {
            name: tuple(end) if isinstance(end, Sequence) and not isinstance(end, str) else end
            for name in ("lower", "upper")
            for end in [getattr(self, name)]
        }
        step = self.step_size
        if step is None and isinstance(single["eps"], (int, float)):
            step = step_size(threat_model(self.preset, self.space), single["eps"])
        return threat_model(self.preset, self.space, step_size=step, steps=self.steps, **single, **ends)

    @cached_property
    def all_attacks(self) -> tuple[Attack, ...]:
        """One attack for each row besides ``clean``, noise first."""
        names = DEFAULT_ATTACKS if self.attacks is None else self.attacks
        same_step = self.step_size is not None
        found = attack_list(self.threat, names, self.sweep, self.restarts, self.attack_options, same_step)
        double = {attack.name for attack in found if [other.name for other in found].count(attack.name) > 1}
        if double:
            raise ConfigurationError(f"attacks={list(names)}: {min(double)!r} is there more than once.")
        return tuple(sorted(found, key=lambda attack: not isinstance(attack, Noise)))

    @property
    def rows(self) -> list[str]:
        """The names of all rows of the results."""
        names = ["clean", *(attack.name for attack in self.all_attacks)]
        return names if self.rescale is None else [*names, *(name + RESCALED for name in names)]

    @property
    def autocast_dtype(self) -> torch.dtype | None:
        """What to compute in; None for float32."""
        return None if self.autocast is None else _AUTOCAST[self.autocast]

    def describe(self, inputs: InputSpace, precision: str = "fp32") -> dict[str, Any]:
        """Return what decides the results, as plain values, to be stored beside them.

        Args:
            inputs: how images relate to pixels.
            precision: in which the model computes, without autocast.
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
            "loss": "cross_entropy",
            "precision": self.autocast or precision,
            "fold": self.fold,
            "max_samples": self.max_samples,
            "rescale": self.rescale,
        }

    def _make_plain(self) -> None:
        """Turn one name into a list, sets into lists in order, and numbers of numpy and torch into Python's."""
        for name, value in vars(self).copy().items():
            several = isinstance(value, Iterable) and not isinstance(value, (str, bytes, list, tuple, Mapping))
            object.__setattr__(
                self, name, plain(value if hasattr(value, "tolist") or not several else one_or_more(value))
            )
        if self.attacks is not None:
            object.__setattr__(self, "attacks", strings("attacks", self.attacks, "the name of an attack, as 'bim'"))
        options = {} if self.attack_options is None else self.attack_options
        if not isinstance(options, Mapping) or not all(isinstance(one, Mapping) for one in options.values()):
            raise ConfigurationError(
                f"attack_options={shown(options)} must have for each attack a dictionary of its options, as "
                "{'torchattacks.Square': {'n_queries': 100}}."
            )

    def _check_sweep(self) -> None:
        object.__setattr__(self, "sweep", {})
        for name in ("eps", "eps_l2", "noise_std"):
            values = getattr(self, name)
            if not isinstance(values, (list, tuple)):
                continue
            if not values or any(entry is None or values.count(entry) > 1 for entry in values):
                raise ConfigurationError(f"{name}={shown(list(values))} must be different values, at least one.")
            self.sweep[name] = tuple(values)
            for value in values:
                threat_model(self.preset, self.space, **{name: value})

    def _check_units(self) -> None:
        """Refuse radii and bounds of a preset for inputs in units that it does not know."""
        needed = {"lower", "upper"}
        for attack in self.all_attacks:
            if isinstance(attack, Noise):
                needed.add("noise_std")
            elif isinstance(attack, ProjectedGradient):
                needed.add("eps" if attack.norm == "linf" else "eps_l2")
            elif any(not math.isfinite(end) for end in self._ends()):
                raise ConfigurationError(
                    f"{attack.name} works on pixels, so space='input' needs lower=… and upper=… that are finite."
                )
        missing = sorted(name for name in needed if getattr(self, name) is None)
        if missing:
            raise ConfigurationError(
                f"space='input' measures in units that no preset knows: give {', '.join(missing)} too (lower and upper "
                "may be infinite)."
            )

    def _ends(self) -> list[float]:
        ends = (self.threat.lower, self.threat.upper)
        return [value for end in ends if end is not None for value in (end if isinstance(end, tuple) else (end,))]
