"""Families of generators: those that do the same to corresponding slices of the same parameters."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import numpy.typing as npt
from scipy.sparse import csr_array

from lightning_normgeo.normalization.names import layer_name
from lightning_normgeo.symmetries.equations.exponents import Ids, Mask
from lightning_normgeo.symmetries.slices import Slices

Role = Literal["invariant alone", "invariant jointly", "rescaling", "without effect"]
ROLES: tuple[Role, ...] = ("without effect", "invariant alone", "invariant jointly", "rescaling")
_SHOWN = 4
_NUMBER = re.compile(r"(?<![^._])\d+(?=\.)")


@dataclass(frozen=True)
class Member:
    """Slices of one parameter that a generator scales.

    Attributes:
        slices: the parameter and its slices.
        exponent: their exponent s: the symmetry multiplies them by e^(s·t).
        count: number of slices that one generator scales.
        offset: the index of the first slice, where each generator scales one.
    """

    slices: Slices
    exponent: float
    count: int
    offset: int = 0

    def __str__(self) -> str:
        power = "" if abs(self.exponent) == 1 else f"^{abs(self.exponent):g}"
        return self.slices.text(self.count, self.offset) + power


@dataclass(frozen=True)
class Family:
    """Generators that scale corresponding slices of the same parameters with the same exponents.

    Attributes:
        role: ``invariant alone``: the scale of slices of one layer has no effect; ``invariant jointly``: of slices of
            several layers together; ``rescaling``: some grow while others shrink; ``without effect``: the loss does not
            depend on the slices at all.
        members: the slices that each generator scales.
        generators: numbers of the generators.
        cause: normalizations that remove the scale, in words; empty for rescalings.
    """

    role: Role
    members: tuple[Member, ...]
    generators: npt.NDArray[np.int64]
    cause: str

    @property
    def count(self) -> int:
        """The number of generators."""
        return len(self.generators)

    @property
    def text(self) -> str:
        """The slices that each generator scales."""
        growing, shrinking = (
            [str(member) for member in self.members if (member.exponent > 0) == up] for up in (True, False)
        )
        return f"{_listed(growing)} against {_listed(shrinking)}" if shrinking else _listed(growing)

    def __str__(self) -> str:
        return f"{self.count}× {self.text}"


def in_layers(families: Sequence[Family]) -> list[tuple[list[Family], str]]:
    """Return sets of families that differ only in numbers in the names of parameters, with * for these in the text."""
    alike: dict[tuple[object, ...], list[Family]] = {}
    for family in families:
        key = (family.role, family.count, family.cause, _NUMBER.sub("*", family.text))
        alike.setdefault(key, []).append(family)
    return [(found, _common([family.text for family in found])) for found in alike.values()]


def reasons_in_layers(reasons: Mapping[str, str]) -> list[tuple[int, str, str]]:
    """Return the number of parameters whose names differ only in numbers, their common name, and the reason."""
    alike: dict[tuple[str, str], list[str]] = {}
    for name, reason in reasons.items():
        alike.setdefault((reason, _NUMBER.sub("*", name)), []).append(name)
    return [(len(names), _common(names), reason) for (reason, _), names in alike.items()]


def _common(texts: Sequence[str]) -> str:
    """Return texts that differ only in numbers as one, with * for the numbers that differ."""
    numbers = zip(*(_NUMBER.findall(text) for text in texts), strict=True)
    shown = iter([different[0] if len(set(different)) == 1 else "*" for different in numbers])
    return _NUMBER.sub(lambda _: next(shown), texts[0])


def _listed(texts: Sequence[str]) -> str:
    if len(texts) <= _SHOWN:
        return ", ".join(texts)
    return f"{len(texts)} parameters ({texts[0]}, {texts[1]}, …, {texts[-1]})"


def families(
    matrix: csr_array,
    slices: Sequence[Slices],
    dead: Mask,
    causes: Sequence[str],
    basis: csr_array,
    removed_by: csr_array,
) -> list[Family]:
    """Return the families of generators, the largest roles first.

    Args:
        matrix: generators of shape (generators, slices).
        slices: what the columns are.
        dead: columns that the loss does not depend on.
        causes: normalizations in words.
        basis: generators of shape (generators, unknowns), in the same order.
        removed_by: the normalizations that remove each unknown, of shape (unknowns, normalizations).

    Cost: linear in the entries of these matrices.
    """
    if not matrix.shape[0]:
        return []
    owner = np.repeat(np.arange(len(slices)), [own.count for own in slices])
    _, first, back, sizes = np.unique(
        _signatures(matrix, owner), return_index=True, return_inverse=True, return_counts=True
    )
    together = np.split(np.argsort(back.ravel(), kind="stable"), np.cumsum(sizes)[:-1])
    found = []
    for own, example in zip(together, first, strict=True):
        row = slice(matrix.indptr[example], matrix.indptr[example + 1])
        columns, exponents = matrix.indices[row], matrix.data[row]
        members = _members(columns, exponents, owner, slices)
        role = _role(members, bool(dead[columns].all()))
        cause = "" if role == "rescaling" else _cause(basis, int(example), causes, removed_by)
        scaled = matrix[own]
        found.append(Family(role, tuple(_placed(member, scaled) for member in members), own, cause))
    order = {role: k for k, role in enumerate(("invariant jointly", "invariant alone", "rescaling", "without effect"))}
    return sorted(found, key=lambda family: (order[family.role], family.members[0].slices.start))


def _signatures(matrix: csr_array, owner: Ids) -> npt.NDArray[np.uint64]:
    """Return a number for each generator, equal for those with the same parameters, exponents and counts.

    It is a sum of random numbers, one for each pair of slices and exponent, so that equal sums by accident are as
    unlikely as equal random numbers of 64 bits.
    """
    exponents, codes = np.unique(np.round(matrix.data, 9), return_inverse=True)
    keys = owner[matrix.indices] * len(exponents) + codes.ravel()
    different, places = np.unique(keys, return_inverse=True)
    numbers = np.random.default_rng(0).integers(1, 2**63, size=len(different), dtype=np.uint64)
    sums: npt.NDArray[np.uint64] = np.add.reduceat(numbers[places.ravel()], matrix.indptr[:-1])
    return sums


def _members(
    columns: Ids, exponents: npt.NDArray[np.float64], owner: Ids, slices: Sequence[Slices]
) -> tuple[Member, ...]:
    counts = Counter(zip(owner[columns].tolist(), np.round(exponents, 9).tolist(), strict=True))
    return tuple(Member(slices[own], exponent, count) for (own, exponent), count in sorted(counts.items()))


def _placed(member: Member, own: csr_array) -> Member:
    """Return a member with the offset of its slices, if the generators of its family scale neighboring ones."""
    if member.count != 1:
        return member
    slices = member.slices
    of_member = (own.indices >= slices.start) & (own.indices < slices.stop) & np.isclose(own.data, member.exponent)
    columns = np.unique(own.indices[of_member])
    together = len(columns) == own.shape[0] and columns[-1] - columns[0] == len(columns) - 1
    return replace(member, offset=int(columns[0]) - slices.start) if together else member


def _role(members: Sequence[Member], dead: bool) -> Role:
    if dead:
        return "without effect"
    if len({member.exponent > 0 for member in members}) > 1:
        return "rescaling"
    layers = {layer_name(member.slices.parameter).removesuffix(".bias") for member in members}
    return "invariant alone" if len(layers) == 1 else "invariant jointly"


def _cause(basis: csr_array, generator: int, causes: Sequence[str], removed_by: csr_array) -> str:
    """Return the normalizations that remove the scale of a generator, with their number if there are several."""
    unknowns = basis.indices[basis.indptr[generator] : basis.indptr[generator + 1]]
    counts = Counter(causes[one] for one in np.unique(removed_by[unknowns].indices))
    return ", ".join(title if count == 1 else f"{count} × {title}" for title, count in counts.items())
