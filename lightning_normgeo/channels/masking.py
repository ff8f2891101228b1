"""Cost of removing channels: the accuracy of a network on a loader with channels masked, without retraining."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from lightning_normgeo.channels.evaluation import MaskedEvaluation
from lightning_normgeo.channels.report import MaskingReport
from lightning_normgeo.channels.settings import MaskingSettings
from lightning_normgeo.errors import ConfigurationError, UnsuitableError
from lightning_normgeo.normalization.user_inputs import check_module
from lightning_normgeo.robustness.inputs import images_and_labels, unpacked
from lightning_normgeo.robustness.inputs.advice import CHANNELS, advising
from lightning_normgeo.robustness.model.preserved_state import preserved_state
from lightning_normgeo.robustness.results.samples.journal import size_of
from lightning_normgeo.utilities.checked_values import flag, short_repr, whole


def masking(
    module: nn.Module,
    loader: Iterable[Any],
    ratios: float | Sequence[float] = (0.1, 0.3, 0.5),
    criteria: str | Sequence[str] | None = None,
    replace: str | Sequence[str] = ("zero", "mean"),
    *,
    seed: int = 0,
    streams: bool = True,
    limit_batches: int | None = None,
    logits: Callable[[Tensor], Any] | None = None,
    unpack: Callable[[Any], tuple[Any, Any]] | None = None,
    progress: bool = True,
) -> MaskingReport:
    r"""Evaluate a classifier with channels masked: each criterion, ratio and replacement, on the same samples.

    The channels are measured on the first batch, see :func:`channel_table`. Then a share of those that all criteria can
    rank is masked, with the rule of network slimming, and the accuracy is measured with its 95 % Wilson interval. The
    model is left unchanged, bit for bit: training modes, weights, gradients and buffers, and so are random states.

    The criteria are

    - ``gamma``: |γ| (network slimming, Liu et al. 2017);
    - ``product``: :math:`|\gamma_i|\,\lVert W_{next}[:, i]\rVert`, free of the rescalings of the channel;
    - ``share``: the mean share in the inputs of the units that read the channel, free of their scales as well;
    - ``similar``: the distance to a channel that is kept in (γ, β) alone, as Sun et al. 2020 propose;
    - ``pairs``: one minus the cosine of the outputs of both, which needs similar (γ, β) up to a factor and correlation;
    - ``random``: channels drawn by a seed, a control;
    - ``gamma_shuffled``, …, ``pairs_shuffled``: as many channels of each layer as by this criterion, drawn by a seed:
      the control that tells a good order of channels from a good choice of layers.

    A masked channel's output becomes zero (``zero``), β (``mean``), or a multiple of the output of the most similar
    channel that is kept (``partner``, for ``similar`` and ``pairs`` only), which the next weights could absorb.

    Args:
        module: the classifier, evaluated on the device of its parameters.
        loader: yields batches of images and labels.
        ratios: shares of channels to remove, in (0, 1).
        criteria: names of criteria. Default: the first six and ``share_shuffled``. One that is known for less than half
            of the channels is left out, and the report says why.
        replace: ``zero``, ``mean`` or ``partner``, one or several.
        seed: of the random control.
        streams: Whether channels of residual streams are candidates: masking one takes away what one layer writes into
            the stream, while a channel of the stream itself can only be pruned in all layers at once.
        limit_batches: largest number of batches. Default: all.
        logits: maps images to logits ``(batch, classes)`` or an output that holds them. Default: the model.
        unpack: maps a batch to (images, labels). Default: found in pairs, dictionaries, named tuples and dataclasses.
        progress: whether to show a progress bar.

    Returns:
        The report; ``print`` shows its table, ``keep`` and ``pruning_idxs`` give the masks.

    Raises:
        UnsuitableError: a ConfigurationError, for a model without batch normalization, outputs or labels that are none
            of a classifier, and a loader without samples.
        ConfigurationError: for settings out of range.

    Cost: one forward pass of the loader's images for each condition and one more: 43 with the defaults.

    Example:
        >>> report = masking(model, loader, ratios=[0.1, 0.3], criteria=["gamma", "share", "random"])
        >>> print(report)
    """
    settings = MaskingSettings.checked(ratios, criteria, replace, seed, streams)
    check_module("masking(module, loader)", module)
    limit = None if limit_batches is None else whole("limit_batches", limit_batches, 1)
    flag("progress", progress)
    if not (hasattr(loader, "__iter__") or hasattr(loader, "__getitem__")) or isinstance(loader, (str, Tensor)):
        raise ConfigurationError(f"loader={short_repr(loader)} yields no batches. Give a DataLoader.")
    device = next((p.device for p in module.parameters()), torch.device("cpu"))
    size = size_of(loader)
    total = None if size is None or limit is not None else size * (1 + len(settings.conditions()))
    bar = tqdm(total=total, disable=not progress, unit="img", leave=False)
    with bar, preserved_state(module), advising(CHANNELS):

        def show(name: str, samples: int, correct: int, seen: int) -> None:
            bar.set_description_str(f"{name} {100 * correct / seen:.1f} %", refresh=False)
            bar.update(samples)

        evaluation = MaskedEvaluation(module, logits or module, settings, loader, show)
        for batch in islice(loader, limit):
            images, labels = unpacked(unpack or images_and_labels, batch)
            evaluation.add(images.to(device), labels.to(device))
    report = evaluation.report([evaluation.share()])
    if report.not_evaluated:
        raise UnsuitableError(f"Nothing was evaluated: {report.not_evaluated}.")
    return report
