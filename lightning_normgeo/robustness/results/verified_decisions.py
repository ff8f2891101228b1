"""Decisions of attacks that searched in bfloat16 and were repeated in the model's own precision."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

CHANGED = 1
"""Is added to the reason if the repeated attack decides otherwise."""
NEAR, AUDITED = 1, 3
"""Reasons to attack a sample again: it came near to the decision boundary, or was drawn at random from the others."""


@dataclass(frozen=True)
class VerifiedDecisions:
    """Numbers of samples under an attack that was repeated in the model's own precision for some of them.

    Attributes:
        n: all samples.
        near: samples near the decision boundary, which were attacked again.
        near_changed: those of them that the repeated attack decided otherwise.
        audited: samples drawn at random from the others, which were attacked again.
        audited_changed: those of them that the repeated attack decided otherwise.
    """

    n: int
    near: int
    near_changed: int
    audited: int
    audited_changed: int

    @classmethod
    def of(cls, checked: Tensor) -> VerifiedDecisions:
        """Return the numbers of the column ``checked`` of per-sample results."""
        near, near_changed, audited, audited_changed = (
            int((checked == code).sum()) for code in (NEAR, NEAR + CHANGED, AUDITED, AUDITED + CHANGED)
        )
        return cls(len(checked), near + near_changed, near_changed, audited + audited_changed, audited_changed)


def verification_note(found: Mapping[str, VerifiedDecisions]) -> str:
    """Return a line on all attacks together; empty without attacks that were verified."""
    if not found:
        return ""
    n, near, near_changed, audited, audited_changed = (
        sum(getattr(one, name) for one in found.values()) for name in VerifiedDecisions.__dataclass_fields__
    )
    share = 100 * (near + audited) / max(n, 1)
    return (
        f"bf16, verified: {share:.1f} % of {n} attacks repeated in full: {near} near the boundary ({near_changed} "
        f"decisions changed), {audited} others at random ({audited_changed} changed)"
    )


def verification_warnings(name: str, found: VerifiedDecisions) -> list[str]:
    """Return a warning if audited decisions have changed under an attack; empty if none has."""
    if not found.audited_changed:
        return []
    return [
        f"{name}: {found.audited_changed} of {found.audited} samples that were drawn at random away from the decision "
        "boundary are decided otherwise in full precision, and so may be others that were not drawn. Leave autocast "
        "out for this model."
    ]
