"""Weights that read the channels of batch normalizations, from the scale symmetries of a network.

A generator of the symmetries that multiplies γ_i and β_i of a channel and divides other slices of weights says that
these slices read the channel through operations that keep its scale, whatever the network looks like.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lightning_normgeo.geometry.batches.channels import input_shares
from lightning_normgeo.symmetries import Slices, Symmetries
from lightning_normgeo.symmetries.charges.slice_sums import squared_norms

Ids = npt.NDArray[np.int64]
ABSORBED = "a normalization behind removes the scale of γ and β together"
"""Reason for channels whose γ and β are scale invariant as one vector."""
_BLOCK = 2**20
"""Elements of a weight that are converted to float64 at once."""
_EVEN = 1e-6
"""Largest difference of exponents that are equal."""
UNKNOWN = "no rescaling of it was found"


@dataclass
class Readers:
    """The slices of weights that read each channel; channels are numbered through all layers.

    Attributes:
        channel: channel of each pair of a channel and a slice that reads it.
        slice: number of the slice, among those of the symmetries.
        power: exponent by which the slice shrinks where γ and β grow by one; 1 behind ReLU.
        writers: number of batch normalizations that write each channel, more than one in a residual stream; 0 where it
            is not known.
        reasons: for each layer with channels of unknown readers, the reason.
    """

    channel: Ids
    slice: Ids
    power: npt.NDArray[np.float64]
    writers: Ids
    reasons: dict[str, str] = field(default_factory=dict)


def no_readers(widths: Mapping[str, int], reason: str) -> Readers:
    """Return the result for a network whose readers are not known, for a reason."""
    nothing = np.zeros(0, np.int64)
    writers = np.zeros(sum(widths.values()), np.int64)
    return Readers(nothing, nothing, np.zeros(0), writers, dict.fromkeys(widths, reason))


def find_readers(symmetries: Symmetries, widths: Mapping[str, int], prefix: str = "") -> Readers:
    """Return the slices of weights that read each channel.

    Args:
        symmetries: of the network.
        widths: number of channels of each batch normalization with γ and β, by module path, in the order of the result.
        prefix: of the names of parameters in the symmetries.
    """
    layers = list(widths)
    starts = dict(zip(layers, np.cumsum([0, *widths.values()])[:-1].tolist(), strict=True))
    owner, is_gamma, is_affine = _owners(symmetries, widths, starts, prefix)
    count = sum(widths.values())
    found: list[tuple[Ids, Ids, npt.NDArray[np.float64]]] = []
    writers, absorbed = np.zeros(count, np.int64), np.zeros(count, bool)
    exponents = symmetries.exponents
    touched = np.unique(symmetries.generator_of_entry[is_gamma[exponents.indices]])
    for generator in touched.tolist():
        row = slice(exponents.indptr[generator], exponents.indptr[generator + 1])
        columns = exponents.indices[row].astype(np.int64)
        scaled, affine = is_gamma[columns], is_affine[columns]
        values = exponents.data[row] / exponents.data[row][scaled.argmax()]
        channels = owner[columns[scaled]]
        reads = (values < 0) & ~affine
        if values.min() > 0:
            absorbed[channels] = True
            continue
        even = abs(values[affine] - 1).max() < _EVEN  # channels of another sign or power are no plain writers
        if not even or len(set(channels.tolist())) < len(channels) or writers[channels].any():
            continue
        writers[channels] = len(channels)
        found += [(np.repeat(channel, reads.sum()), columns[reads], -values[reads]) for channel in channels]
    writers[absorbed] = 0
    parts = [np.concatenate(column) for column in zip(*found, strict=True)] if found else [np.zeros(0)] * 3
    known = ~absorbed[parts[0].astype(np.int64)]
    reasons = _reasons(symmetries, widths, starts, writers, absorbed, prefix)
    return Readers(
        parts[0][known].astype(np.int64), parts[1][known].astype(np.int64), parts[2][known], writers, reasons
    )


def _owners(
    symmetries: Symmetries, widths: Mapping[str, int], starts: Mapping[str, int], prefix: str
) -> tuple[Ids, npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
    """Return the channel of each slice that is an entry of γ or β, and masks of entries of γ and of both."""
    total = symmetries.exponents.shape[1]
    owner, is_gamma, is_affine = np.full(total, -1, np.int64), np.zeros(total, bool), np.zeros(total, bool)
    for own in symmetries.slices:
        layer, _, kind = own.parameter.removeprefix(prefix).rpartition(".")
        if layer in widths and kind in ("weight", "bias") and own.count == widths[layer]:
            place = slice(own.start, own.stop)
            owner[place] = starts[layer] + np.arange(own.count)
            is_affine[place], is_gamma[place] = True, kind == "weight"
    return owner, is_gamma, is_affine


def _reasons(
    symmetries: Symmetries,
    widths: Mapping[str, int],
    starts: Mapping[str, int],
    writers: Ids,
    absorbed: npt.NDArray[np.bool_],
    prefix: str,
) -> dict[str, str]:
    reasons = {}
    for layer, width in widths.items():
        own = slice(starts[layer], starts[layer] + width)
        if writers[own].all():
            continue
        if absorbed[own].any():
            reasons[layer] = ABSORBED
        else:
            named = symmetries.reasons.get(f"{prefix}{layer}.weight")
            reasons[layer] = UNKNOWN if named is None else f"its scale does not pass: {named}"
    return reasons


def reader_norms(readers: Readers, symmetries: Symmetries, parameters: Mapping[str, Tensor]) -> Tensor:
    r"""Return the norm of everything that reads each channel, :math:`\sqrt{\sum_r\lVert W_r[:, i]\rVert^{2/p_r}}`.

    Args:
        readers: from :func:`find_readers`.
        symmetries: of the network.
        parameters: parameters by the names in the symmetries.

    Returns:
        ``(channels,)`` in float64 on the CPU; NaN for channels whose readers are not known.
    """
    squares = squared_norms(symmetries.slices, parameters, torch.device("cpu")).double()
    slices, powers = torch.from_numpy(readers.slice), torch.from_numpy(readers.power)
    total = torch.zeros(len(readers.writers), dtype=torch.float64)
    total.index_add_(0, torch.from_numpy(readers.channel), squares[slices].pow(1 / powers))
    norms: Tensor = total.sqrt()
    return norms.masked_fill(torch.from_numpy(readers.writers == 0), torch.nan)


def reader_shares(readers: Readers, symmetries: Symmetries, parameters: Mapping[str, Tensor], gamma: Tensor) -> Tensor:
    """Return the share of each channel in the input of the units that read it, as :func:`input_shares` has it.

    It is the mean over the units of all weights that read the channel. Where several layers write a channel, as in a
    residual stream, its readers see the sum of their γ².

    Args:
        readers: from :func:`find_readers`.
        symmetries: of the network.
        parameters: parameters by the names in the symmetries.
        gamma: γ of all channels, in float64 on the CPU.

    Returns:
        ``(channels,)`` in [0, 1]; NaN for channels whose readers are not known, or that shrink by another power.
    """
    total, units = torch.zeros(2, len(gamma), dtype=torch.float64)
    unknown = torch.from_numpy(readers.writers == 0)
    unknown[torch.from_numpy(readers.channel[readers.power != 1])] = True
    for own in symmetries.slices:
        mine = (readers.slice >= own.start) & (readers.slice < own.stop)
        if mine.any():
            channels, places = (torch.from_numpy(ids[mine]) for ids in (readers.channel, readers.slice - own.start))
            shares, counted = _of_weight(own, parameters[own.parameter], channels, places, gamma.square())
            total += shares
            units += counted
    mean: Tensor = total / units
    return mean.masked_fill(unknown, torch.nan)


def _of_weight(
    own: Slices, weight: Tensor, channels: Tensor, places: Tensor, gamma_sq: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the sum of the shares of each channel in the units of one weight, and the number of its units."""
    energy = torch.zeros(own.count, dtype=torch.float64).index_add_(0, places, gamma_sq[channels])
    factors = energy.reshape(*own.sizes[:2], -1)[..., 0]
    matrix = weight.detach().reshape(*weight.shape[:2], -1) if weight.ndim > 1 else weight.detach().view(-1, 1, 1)
    if own.sizes[0] > 1 and matrix.shape[1] > factors.shape[1]:  # (inputs, outputs) in place of the reverse
        matrix, factors = matrix.transpose(0, 1), factors.T
    shared = len(factors) == 1  # by all units: a slice is a column
    by_slice = _by_slice(matrix, factors, shared)
    part = torch.where(energy[places] > 0, gamma_sq[channels] / energy[places], 0.0)
    total = torch.zeros(len(gamma_sq), dtype=torch.float64).index_add_(0, channels, by_slice[places] * part)
    rows = torch.zeros_like(places) if shared else places // factors.shape[1]
    pairs = torch.unique(torch.stack([channels, rows], 1), dim=0)[:, 0]
    each = len(matrix) if shared else 1
    return total, each * torch.bincount(pairs, minlength=len(gamma_sq)).double()


def _by_slice(matrix: Tensor, factors: Tensor, shared: bool) -> Tensor:
    """Return the shares of each slice, added up over the units that share it, a few units at a time.

    Args:
        matrix: a weight ``(units, channels, positions)``.
        factors: γ² of each of its slices, ``(1, channels)`` or ``(units, channels)``.
        shared: whether all units share the slices.
    """
    parts = []
    size = max(1, _BLOCK // max(1, matrix[:1].numel()))
    for start in range(0, len(matrix), size):
        squares = matrix[start : start + size].cpu().double().square().sum(2)
        shares = input_shares(squares, factors if shared else factors[start : start + size])
        parts.append(shares.sum(0) if shared else shares.reshape(-1))
    return torch.stack(parts).sum(0) if shared else torch.cat(parts)
