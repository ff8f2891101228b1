"""Transformations of a module by its scale symmetries: other weights, the same function."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from scipy.sparse import csr_array
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_normgeo.errors import ConfigurationError
from lightning_normgeo.normalization.autograd.tracing import trace
from lightning_normgeo.normalization.names import by_clean_name
from lightning_normgeo.normalization.user_inputs import as_example, check_module
from lightning_normgeo.symmetries.symmetries import Symmetries
from lightning_normgeo.symmetries.transformations.batch_norms import channel_means, with_statistics
from lightning_normgeo.symmetries.transformations.optimizer_states import check_states, scale_states
from lightning_normgeo.utilities.checked_values import short_repr

Values = npt.NDArray[np.float64]


def transform(
    module: nn.Module,
    symmetries: Symmetries,
    coefficients: Any,
    optimizer: Optimizer | None = None,
    example_batch: Any = None,
) -> None:
    r"""Scale the parameters of a module in place along a combination of its symmetries; its function stays the same.

    With exponents s_k of generator k and coefficients t_k, slice i is multiplied by :math:`e^{\sum_k t_k s_{ki}}`. What
    belongs to the weights moves with them, so that the function is the same in training and in evaluation mode:

    - The running mean and variance of a batch normalization scale as its input. A bias in front of it that has no
      effect in training shifts the running mean; the shift is measured with ``example_batch``.
    - The optimizer's state scales as gradients do: averages of gradients by the inverse factor, averages of their
      squares by its square. :mod:`lightning_normgeo.symmetries.transformations.optimizer_states` has the optimizers for
      which this is exact. The steps after it are not those before it, scaled: no optimizer commutes with rescalings.

    The function changes by rounding, and by the ε of normalizations, which the symmetries take as zero; also where
    something without a gradient reads the weights, such as a comparison with a threshold or an ``argmax`` over experts,
    which the graph does not show. Nothing is changed where an error is raised.

    Args:
        module: the module that the symmetries were found in.
        symmetries: from :func:`scale_symmetries`.
        coefficients: t, one finite number for each generator.
        optimizer: whose state is scaled too. Default: none.
        example_batch: an input, needed only where a parameter without effect stands in front of a batch normalization
            with running statistics that has to be moved.

    Raises:
        ConfigurationError: for coefficients that do not fit, factors that overflow, symmetries of another module,
            unknown states of an optimizer, and where an example batch is needed.

    Cost: one pass over the weights; with an example batch two forward passes.

    Example:
        >>> import torch
        >>> from lightning_normgeo import scale_symmetries
        >>> _ = torch.manual_seed(0)
        >>> network = torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.ReLU(), torch.nn.Linear(5, 3)).double()
        >>> x = torch.randn(8, 4, dtype=torch.float64)
        >>> symmetries, before = scale_symmetries(network, x), network(x)
        >>> transform(network, symmetries, torch.randn(len(symmetries)))
        >>> torch.allclose(network(x), before)
        True
    """
    check_module("transform(module, symmetries, coefficients)", module)
    combination = checked_coefficients(symmetries, coefficients)
    logarithms = parameter_logarithms(symmetries, module, combination)
    if optimizer is not None:
        check_states(optimizer, logarithms)
    scales = _statistic_scales(symmetries, module, combination)
    shifts = needs_example(symmetries, combination, scales)
    if shifts and example_batch is None:
        raise ConfigurationError(
            "transform has to move running statistics of batch normalizations, and there are parameters without effect "
            "in training, such as biases in front of them, which shift the running means. Give example_batch, an "
            "input of the module."
        )
    before = _input_means(module, example_batch) if shifts else {}
    with torch.no_grad():
        for parameter, parts in logarithms:
            _multiply(parameter, parts, 1.0)
        if optimizer is not None:
            scale_states(optimizer, logarithms, _multiply)
        after = _input_means(module, example_batch) if shifts else {}
        _move_statistics(module, scales, before, after)


Logarithms = list[tuple[nn.Parameter, list[Values]]]
"""Parameters with the logarithms of their factors: arrays that broadcast to the parameter, to be added up."""


def checked_coefficients(symmetries: Symmetries, coefficients: Any) -> Values:
    """Return the coefficients as an array.

    Raises:
        ConfigurationError: unless there is one finite number for each generator.
    """
    given = coefficients.detach().cpu().numpy() if isinstance(coefficients, Tensor) else coefficients
    try:
        values = np.asarray(given, dtype=np.float64)
    except (TypeError, ValueError):
        values = np.zeros(0)
    if values.shape != (len(symmetries),) or not np.isfinite(values).all():
        raise ConfigurationError(
            f"coefficients are {short_repr(coefficients)}. Give one finite number for each of the {len(symmetries)} "
            "generators, as a list, an array or a tensor."
        )
    return values


def parameter_logarithms(symmetries: Symmetries, module: nn.Module, combination: Values) -> Logarithms:
    """Return the logarithms of the factors of all parameters that change.

    Raises:
        ConfigurationError: if the module lacks one of them, or a factor overflows.
    """
    moved = symmetries.exponents.T @ combination
    named = by_clean_name(module.named_parameters())
    found: dict[str, list[Values]] = {}
    for own in symmetries.slices:
        values = moved[own.start : own.stop]
        if values.any():
            check_parameter(named, own.parameter, own.shape)
            found.setdefault(own.parameter, []).append(own.spread(values))
    for name, parts in found.items():
        largest = sum(float(np.abs(part).max()) for part in parts)
        if largest > np.log(torch.finfo(named[name].dtype).max) / 2:
            raise ConfigurationError(
                f"A factor of {name} would be e^±{largest:.4g}, which overflows in {named[name].dtype}. Give smaller "
                "coefficients."
            )
    return [(named[name], parts) for name, parts in found.items()]


def check_parameter(named: Mapping[str, Tensor], name: str, shape: tuple[int, ...]) -> None:
    """Check that a module has a parameter of the symmetries.

    Raises:
        ConfigurationError: if it does not, or if the shape differs.
    """
    if name not in named or tuple(named[name].shape) != shape:
        has = f"it has the shape {tuple(named[name].shape)}" if name in named else "there is none"
        raise ConfigurationError(
            f"The symmetries are those of another module: they have a parameter {name} of the shape {shape}, and here "
            f"{has}. Call scale_symmetries with this module."
        )


def needs_example(symmetries: Symmetries, combination: Values, scales: Mapping[str, Values]) -> bool:
    """Whether a shift of a running mean has to be measured."""
    still = symmetries.in_role("without effect")
    if not len(still) or not scales:
        return False
    return bool(combination[still].any()) or any(scale.any() for scale in scales.values())


def _statistic_scales(symmetries: Symmetries, module: nn.Module, combination: Values) -> dict[str, Values]:
    """Return the logarithm of the factor of each channel of the input of each batch normalization."""
    found = statistic_exponents(symmetries, module)
    return {name: matrix.T @ combination for name, matrix in found.items()}


def statistic_exponents(symmetries: Symmetries, module: nn.Module) -> dict[str, csr_array]:
    """Return exponents of the inputs of a module's batch normalizations with running statistics, by module path.

    Raises:
        ConfigurationError: where they are not known.
    """
    there = with_statistics(module)
    known = symmetries.batch_norms
    missing = list(there) if known is None else [name for name in there if name in known and known[name] is None]
    if missing:
        raise ConfigurationError(
            f"It is not known how the running statistics of {missing[0]} scale with the symmetries. Get these from "
            "scale_symmetries(module, example_batch), without reentrant activation checkpoints."
        )
    return {name: matrix for name, matrix in (known or {}).items() if name in there and matrix is not None}


def _multiply(tensor: Tensor, logarithms: list[Values], power: float) -> None:
    """Multiply a tensor by e^(power · logarithm), with one rounding for each array of logarithms."""
    for part in logarithms:
        # numpy makes a number of an array without axes, which only as_tensor takes
        tensor.mul_(torch.as_tensor(np.exp(power * part)).to(tensor.device, tensor.dtype.to_real()))


def _move_statistics(
    module: nn.Module, scales: Mapping[str, Values], before: Mapping[str, Tensor], after: Mapping[str, Tensor]
) -> None:
    children = with_statistics(module)
    for name, scale in scales.items():
        mean, variance = (cast(Tensor, getattr(children[name], key)) for key in ("running_mean", "running_var"))
        if scale.any():
            _multiply(mean, [scale], 1.0)
            _multiply(variance, [scale], 2.0)
        if name in before:
            factor = torch.from_numpy(np.exp(scale)).to(before[name].device)
            mean.add_((after[name] - factor * before[name]).to(mean.dtype))


def _input_means(module: nn.Module, example_batch: Any) -> dict[str, Tensor]:
    """Return the mean of each channel of the input of each batch normalization in training mode."""
    means: dict[str, Tensor] = {}

    def hook(name: str) -> Any:
        def note(child: nn.Module, inputs: Any) -> None:
            means[name] = channel_means(inputs)

        return note

    handles = [child.register_forward_pre_hook(hook(name)) for name, child in with_statistics(module).items()]
    try:
        with _training(module):
            trace(module, as_example(module, example_batch))
    finally:
        for handle in handles:
            handle.remove()
    return means


@contextmanager
def _training(module: nn.Module) -> Iterator[None]:
    """Context in which a module is in training mode."""
    modes = {child: child.training for child in module.modules()}
    module.train()
    try:
        yield
    finally:
        for child, mode in modes.items():
            child.training = mode
