"""Measurement of the channels of all batch normalizations of a network on one batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils import _pytree as pytree

from lightning_normgeo.channels.readers import Readers, find_readers, no_readers, reader_norms, reader_shares
from lightning_normgeo.channels.table import ChannelTable, LayerChannels
from lightning_normgeo.errors import ConfigurationError, UnsuitableError
from lightning_normgeo.geometry.batches.channels import ChannelMoments, rescaling_free_scale
from lightning_normgeo.normalization.example_inputs import few
from lightning_normgeo.normalization.names import by_clean_name
from lightning_normgeo.normalization.surgery.preceding_layers import trainable
from lightning_normgeo.normalization.user_inputs import arguments, as_example, check_module, misfit
from lightning_normgeo.probes.batch_norm.layers import affine_batch_norms
from lightning_normgeo.robustness.model.parameter_swap import LogitsModule
from lightning_normgeo.robustness.model.preserved_state import preserved_state
from lightning_normgeo.symmetries import scale_symmetries
from lightning_normgeo.utilities.checked_values import first_line, is_number, short_repr


def channel_table(
    module: nn.Module,
    batch: Any,
    *,
    similar: float = 0.1,
    correlated: float = 0.95,
    logits: Callable[[Any], Any] | None = None,
) -> ChannelTable:
    r"""Measure the channels of all batch normalizations with γ and β of a network.

    For each channel: γ and β; |γ| times the norm of the weights that read it, which rescalings of the channel do not
    change; its share in the inputs of the units that read it, which the scale of these does not change either; the
    nearest channel of its layer in (γ, β) and the correlation of both, since similar (γ, β) alone say nothing; the
    channel whose output is most alike; and ε/s². Sun et al. 2020 propose to prune by γ, or by similar (γ, β).

    The network runs in evaluation mode, so that a network in the middle of training is measured as it would be used.
    Training modes, weights, gradients, buffers and random states are left unchanged, bit for bit.

    Args:
        module: any network with batch normalization.
        batch: its input; a tuple holds positional and a dict keyword arguments. Correlations are those over its samples
            and positions: take some hundred samples where there is one position only.
        similar: largest distance in (γ, β) that counts as close, see :func:`.geometry.affine_distances`.
        correlated: smallest correlation of outputs that counts as such.
        logits: calls the network with the batch. Default: the network itself.

    Returns:
        The table; ``print`` shows a line for each layer, ``to_frame`` has a row for each channel.

    Raises:
        UnsuitableError: a ConfigurationError, if there is no batch normalization with γ and β, or none that ran.
        ConfigurationError: for thresholds out of range, and a batch that the network does not accept.

    Cost: one forward pass, channels² multiplications in float64 per value of a channel, and the search for symmetries:
    together as long as 3 forward passes of 64 images for a ResNet-18, as 9 for a MobileNetV2 with 17,000 channels.

    Example:
        >>> import torch
        >>> from lightning_normgeo import channel_table
        >>> _ = torch.manual_seed(0)
        >>> network = torch.nn.Sequential(
        ...     torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.ReLU(), torch.nn.Conv2d(8, 4, 3)
        ... )
        >>> table = channel_table(network, torch.randn(16, 3, 8, 8))
        >>> table.pair_counts().close, table.pair_counts().redundant
        (28, 0)
    """
    check_module("channel_table(module, batch)", module)
    for name, value, least, most in (("similar", similar, 0, 2), ("correlated", correlated, -1, 1)):
        if not (is_number(value) and least <= value <= most):
            raise ConfigurationError(f"{name}={short_repr(value)} must be a number between {least} and {most}.")
    norms = affine_batch_norms(module)
    if not norms:
        raise UnsuitableError(
            "The model has no batch normalization with γ and β (affine=True), so it has no channels to rank by γ."
        )
    traced = module if logits is None else LogitsModule(module, logits)
    prefix = "" if logits is None else "module."
    example = as_example(module, batch)
    with preserved_state(module):
        # made under torch.inference_mode, tensors have no graph
        example = pytree.tree_map(lambda leaf: leaf.clone() if _is_inference(leaf) else leaf, example)
        moments = _moments(norms, traced, example)
        gamma = torch.cat([layer.weight.detach().cpu().double().flatten() for layer in norms.values()])
        product, share, readers = _read_by(traced, norms, few(example), gamma, prefix)
        layers, left_out = _layers(norms, moments, product, share, readers)
    if not layers:
        raise UnsuitableError(f"No batch normalization could be measured: {next(iter(left_out.values()))}.")
    return ChannelTable(layers, left_out, float(similar), float(correlated))


def _is_inference(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.is_inference()


def _moments(norms: Mapping[str, _BatchNorm], module: nn.Module, example: Any) -> dict[str, ChannelMoments]:
    """Return the moments of the inputs of all normalizations in one forward pass; calls of a layer count together."""
    found = {name: ChannelMoments() for name in norms}

    def note(own: ChannelMoments, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        own.add(args[0] if args else kwargs["input"])

    args, kwargs = arguments(example)
    with ExitStack() as stack, torch.no_grad():
        for name, layer in norms.items():
            stack.callback(layer.register_forward_pre_hook(partial(note, found[name]), with_kwargs=True).remove)
        try:
            module(*args, **kwargs)
        except Exception as error:
            advice = misfit(module, example)
            raise ConfigurationError(
                f"The model cannot be called with this batch: {type(error).__name__}: {first_line(error)}. {advice}"
            ) from error
    return found


def _read_by(
    module: nn.Module, norms: Mapping[str, _BatchNorm], example: Any, gamma: Tensor, prefix: str
) -> tuple[Tensor, Tensor, Readers]:
    """Return |γ|·‖W_next‖ and the share of all channels, and what reads them."""
    widths = {name: layer.num_features for name, layer in norms.items()}
    try:
        with _statistics_of_batches(norms.values()), trainable(module), torch.enable_grad():
            symmetries = scale_symmetries(module, example)
    except ConfigurationError as error:  # a compiled model, or one without a graph: |γ| and pairs are known anyway
        unknown = torch.full_like(gamma, torch.nan)
        return unknown, unknown, no_readers(widths, first_line(error))
    readers = find_readers(symmetries, widths, prefix)
    parameters = {name: parameter.detach() for name, parameter in by_clean_name(module.named_parameters()).items()}
    norm = reader_norms(readers, symmetries, parameters)
    return rescaling_free_scale(gamma, norm), reader_shares(readers, symmetries, parameters, gamma), readers


@contextmanager
def _statistics_of_batches(norms: Any) -> Iterator[None]:
    """Context in which normalizations, and nothing else, are in training mode, where the scale of a unit is free."""
    norms = list(norms)
    for layer in norms:
        layer.training = True
    try:
        yield
    finally:
        for layer in norms:
            layer.training = False


def _layers(
    norms: Mapping[str, _BatchNorm],
    moments: Mapping[str, ChannelMoments],
    product: Tensor,
    share: Tensor,
    readers: Readers,
) -> tuple[dict[str, LayerChannels], dict[str, str]]:
    layers, left_out, start = {}, {}, 0
    for name, layer in norms.items():
        own = slice(start, start + layer.num_features)
        start = own.stop
        if not moments[name].count:
            left_out[name] = "it did not run"
            continue
        variance = moments[name].variance.clamp_min(0).cpu().double()
        if not bool(variance.isfinite().all()):
            left_out[name] = "its input is not finite"
            continue
        layers[name] = LayerChannels(
            name,
            layer.weight.detach().cpu().double(),
            layer.bias.detach().cpu().double(),
            product[own],
            share[own],
            torch.from_numpy(readers.writers[own]),
            layer.eps / variance,
            moments[name].correlation.float().cpu(),
            moments[name].count,
            readers.reasons.get(name, ""),
        )
    return layers, left_out
