"""Attacks of torchattacks by name.

torchattacks works on pixels in [0, 1] only. It is optional, and imported when one of its attacks is named.
"""

from __future__ import annotations

import importlib
import inspect
import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable

from lightning_normgeo.errors import ConfigurationError, nearest_names
from lightning_normgeo.robustness.attacks.random_numbers.sample_draws import BatchDrawError, SampleDraws
from lightning_normgeo.robustness.attacks.search.ball import per_image
from lightning_normgeo.robustness.model.preserved_state import seeded
from lightning_normgeo.robustness.threat_models import ThreatModel

_BALL = 8 / 255
"""Default radius of torchattacks' l∞ attacks, by which they are recognized: its other attacks have another one."""
_LATER = ("seed", "n_classes")
"""Arguments that depend on the evaluation and the model, and are added when the attack runs, unless they are given."""


def check_torchattacks(name: str, threat: ThreatModel, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return all arguments for the constructor of an attack of torchattacks, as plain values.

    An argument is taken from ``options``, else from the threat model, else it is the attack's own default. Only threat
    models in pixels give arguments, since torchattacks measures in pixels, and only to l∞ attacks: their radius, steps
    and step size, or the l2 radius with ``norm: L2``. If an attack has no steps, its step size keeps its ratio to the
    radius.

    Args:
        name: name of the class, e.g. ``PGD``.
        threat: the threat model.
        options: arguments for the constructor, by name.

    Raises:
        ConfigurationError: if torchattacks is not installed, for unknown names and options, and for values that the
            attack refuses.

    Cost: no model is called; the first call imports torchattacks.
    """
    known = _arguments(name)
    unknown = sorted(set(options) - set(known))
    if unknown:
        allowed = ", ".join(known) or "nothing"
        raise ConfigurationError(f"torchattacks.{name} has no option {unknown[0]!r}; it takes {allowed}.")
    for key, value in options.items():
        if isinstance(value, str) and isinstance(known[key], (int, float)):
            raise ConfigurationError(f"torchattacks.{name}: {key}={value!r} is text; give a number (8/255 is 0.03137).")
    merged = {**known, **_of_threat(name, threat, known, options), **options}
    given = {key: value for key, value in merged.items() if key in options or key not in _LATER}
    try:
        plain: dict[str, Any] = json.loads(json.dumps(given))
        _attack_class(name)(_Pixels(nn.Identity(), torch.empty(0)), **plain)
    except (TypeError, ValueError, AssertionError) as error:
        raise ConfigurationError(f"torchattacks.{name} cannot be made with {given}: {error}.") from error
    return plain


def torchattacks_attack(
    name: str,
    logits: Callable[[Tensor], Tensor],
    pixels: Tensor,
    labels: Tensor,
    options: Mapping[str, Any],
    indices: Sequence[int],
    seed: int,
) -> Tensor:
    """Return images attacked by an attack of torchattacks, which computes in float32.

    No parameter's ``.grad`` is changed, even by attacks that call ``backward``, and the random states of torch, numpy
    and Python are restored. The random numbers of a sample depend on ``seed`` and its index alone: an attack that draws
    them otherwise than with one entry per sample (AutoAttack, Square, DIFGSM) gets the samples one by one.

    Args:
        name: name of the class, e.g. ``PGD``.
        logits: maps pixels to class logits, in evaluation mode.
        pixels: ``(batch, channels, height, width)`` in [0, 1], up to rounding.
        labels: ``(batch,)`` class indices.
        options: the arguments that :func:`check_torchattacks` returned.
        indices: a number for each sample, which seeds its random numbers.
        seed: seed of the evaluation.

    Returns:
        Pixels in [0, 1], of the same shape and dtype. A sample for which the attack found no finite image is unchanged.

    Cost: that of the attack, of which some take samples one by one. Backward passes go to the input only, which saves
    a third for attacks that call ``backward``.
    """
    if not len(labels):
        return pixels
    with torch.inference_mode(False), torch.enable_grad(), seeded(seed, indices[0]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="torchattacks")  # warnings of its own code, not those of the model
        originals = pixels.detach().clamp(0, 1)
        images = originals.float().contiguous()  # parts of torchattacks need float32, and some call .view
        later = _later(name, logits, originals, seed)
        try:
            attack = _attack_class(name)(_Pixels(logits, originals), **{**later, **options})
            with SampleDraws(options.get("seed", seed), indices):
                attacked: Tensor = attack(images, labels.clone()).detach()
        except BatchDrawError:  # never of a single sample
            single = ((pixels[k : k + 1], labels[k : k + 1], indices[k : k + 1]) for k in range(len(labels)))
            return torch.cat([torchattacks_attack(name, logits, x, y, options, i, seed) for x, y, i in single])
        except Exception as error:
            error.add_note(f"This was torchattacks.{name} with {dict(options)}.")
            raise
    finite = per_image(attacked.isfinite().flatten(1).all(1), images)
    moved = attacked.clamp(0, 1).to(originals.dtype)
    return torch.where(finite & (attacked != images), moved, originals)


def _attack_class(name: str) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torchattacks' own syntax warnings, which a user cannot fix
            library = vars(importlib.import_module("torchattacks"))
    except ImportError as error:
        raise ConfigurationError(
            f"torchattacks.{name} needs torchattacks, which cannot be imported ({error}): "
            'pip install "lightning-normgeo[torchattacks]".'
        ) from error
    classes = {key: value for key, value in library.items() if inspect.isclass(value)}
    if name not in classes:
        usable = [key for key, kind in classes.items() if _takes_a_model(kind)]
        raise ConfigurationError(f"torchattacks has no attack {name!r}; choose one of: {nearest_names(name, usable)}.")
    return classes[name]


def _arguments(name: str) -> dict[str, Any]:
    """Return the arguments of an attack's constructor with their defaults."""
    found = _attack_class(name)
    if not _takes_a_model(found):
        raise ConfigurationError(
            f"torchattacks.{name}{inspect.signature(found)} cannot be made from a model and numbers alone. "
            "Name the attacks it is made of one by one instead."
        )
    return {key: argument.default for key, argument in inspect.signature(found).parameters.items() if key != "model"}


def _takes_a_model(kind: type) -> bool:
    """Whether the only argument that a constructor needs is the model."""
    arguments = inspect.signature(kind).parameters
    needed = [key for key, argument in arguments.items() if argument.default is inspect.Parameter.empty]
    return needed == ["model"]


def _of_threat(
    name: str, threat: ThreatModel, known: Mapping[str, Any], options: Mapping[str, Any]
) -> Mapping[str, Any]:
    """Return the arguments of an attack that the threat model gives."""
    if known.get("eps") != _BALL:
        return {}
    norm, pixel = options.get("norm", "Linf"), threat.space == "pixel"
    if norm != "Linf" and "eps" not in options and not (norm == "L2" and pixel and threat.eps_l2 is not None):
        raise ConfigurationError(f"torchattacks.{name} with norm={norm!r} needs a radius: give eps too, in pixels.")
    found: dict[str, Any] = {"steps": threat.steps, "eps": threat.eps if norm == "Linf" else threat.eps_l2}
    found["alpha"] = threat.step_size if "steps" in known else known.get("alpha", 0.0) * threat.eps / _BALL
    return {key: value for key, value in found.items() if pixel and key in known}


def _later(name: str, logits: Callable[[Tensor], Tensor], images: Tensor, seed: int) -> dict[str, Any]:
    """Return the arguments that depend on the evaluation and the model."""
    known, found = _arguments(name), {}
    if "seed" in known:
        found["seed"] = seed
    if "n_classes" in known:
        with torch.no_grad():
            classes = logits(images[:1]).shape[1]
        # with more classes than by default, AutoAttack would try more targets than it is published with
        found["n_classes"] = min(classes, known["n_classes"])
    return found


class _Pixels(nn.Module):
    """The model as torchattacks sees it: a module without the model's weights, but with its device and dtype.

    torchattacks reads the device from a parameter, and would change the mode of the real model.
    """

    def __init__(self, logits: Callable[[Tensor], Tensor], like: Tensor) -> None:
        super().__init__()
        self._logits = (logits,)  # in a tuple, since a module would be registered as a child and change its mode
        self.device_and_dtype = nn.Parameter(torch.empty_like(like[:0]))
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        images = images.to(self.device_and_dtype.dtype)
        if torch.is_grad_enabled() and images.requires_grad:
            scores: Tensor = _ToTheInput.apply(images, self._logits[0])
        else:
            with torch.no_grad():
                scores = self._logits[0](images)
        return scores.float()


class _ToTheInput(torch.autograd.Function):
    """Logits whose gradient goes to the images only: ``backward`` leaves every parameter's ``.grad`` unchanged."""

    @staticmethod
    def forward(ctx: FunctionCtx, images: Tensor, logits: Callable[[Tensor], Tensor]) -> Tensor:
        with torch.enable_grad():
            inside = images.detach().requires_grad_()
            scores = logits(inside)
        ctx.save_for_backward(inside, scores)
        return scores.detach().clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        inside, scores = ctx.saved_tensors
        # a compiled model cannot keep its graph, so it is kept only for attacks that ask for it with retain_graph
        kept = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", lambda: True)()
        (found,) = torch.autograd.grad(scores, inside, gradient, retain_graph=kept)
        return found.contiguous(), None
