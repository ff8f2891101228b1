"""ChannelEvaluation: the channels of batch normalizations, and what removing them costs."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lightning_normgeo.callbacks._channels.trainer_hooks import ChannelHooks
from lightning_normgeo.channels.report import MaskingReport
from lightning_normgeo.channels.settings import MaskingSettings
from lightning_normgeo.robustness.inputs import images_and_labels
from lightning_normgeo.utilities.checked_values import flag, whole
from lightning_normgeo.utilities.notebook import one_line


class ChannelEvaluation(ChannelHooks):
    r"""Measures the channels of all batch normalizations, and the accuracy with a share of them masked.

    Sun et al. 2020 (section 2.2) propose to prune channels with small γ, or channels with similar (γ, β). This shows
    what that costs without retraining, beside criteria that do not depend on the scale of γ, which has no meaning of
    its own, and beside channels drawn at random.

    Runs in ``trainer.test`` and ``trainer.validate``; with ``after_fit=True`` also at the end of ``trainer.fit``, on
    the test data, else on the validation data. Weights, gradients, buffers, training modes and random states are left
    unchanged, bit for bit. A model without batch normalization, or data without labels, is skipped with one warning.

    ===================================================  ====  ====================================================
    key                                                  unit  meaning
    ===================================================  ====  ====================================================
    ``channels/clean/accuracy``                          1     fraction classified correctly by the whole network
    ``channels/{criterion}/{replace}/{ratio}/accuracy``  1     the same with this share of channels masked
    ``channels/close_pairs``                             1     share of pairs of a layer that are close in (γ, β)
    ``channels/redundant_pairs``                         1     share of pairs that are close and correlated
    ===================================================  ====  ====================================================

    Two files are written to the run's folder: ``channels.json`` with the results, their 95 % Wilson intervals, and a
    line for each layer; and ``channels.csv`` with a row for each channel. Loggers with tables (W&B) get both as
    ``channels/results`` and ``channels/table``. The masks are in :attr:`report`, for Torch-Pruning by its
    ``pruning_idxs``.

    The model is called as ``pl_module(images)`` and has to return logits: as a tensor, as the attribute ``.logits``, or
    in a tuple. For anything else override :meth:`logits`, for other batches :meth:`unpack`. Of several loaders the
    first is evaluated.

    Cost: one forward pass of the data for each condition and one more, 43 with the defaults; ``limit_batches`` bounds
    it.

    Args:
        ratios: Shares of channels to remove, each in (0, 1).
        criteria: Criteria by which channels are removed: one or several of ``gamma``, ``product``, ``share``,
            ``similar``, ``pairs``, ``random``, and one of the first five with ``_shuffled``, see
            :func:`lightning_normgeo.masking`. Default: the six and ``share_shuffled``.
        replace: What a masked channel's output becomes: ``zero``, ``mean`` (its β) or ``partner`` (a multiple of the
            most similar channel's output, for ``similar`` and ``pairs``).
        limit_batches: Evaluate only so many batches. Default: all.
        after_fit: Also evaluate at the end of ``fit``, with the last weights.
        seed: Seed of the random control.
        streams: Whether channels of residual streams are candidates, each layer's by themselves.

    Raises:
        ConfigurationError: for settings out of range, on construction.
    """

    def __init__(
        self,
        ratios: list[float] | float = [0.1, 0.3, 0.5],  # noqa: B006 - shown by --help; never changed
        criteria: list[str] | str | None = None,
        replace: list[str] | str = ["zero", "mean"],  # noqa: B006
        limit_batches: int | None = None,
        after_fit: bool = False,
        seed: int = 0,
        streams: bool = True,
    ) -> None:
        super().__init__()
        self.settings = MaskingSettings.checked(ratios, criteria, replace, seed, streams)
        self.limit_batches = None if limit_batches is None else whole("limit_batches", limit_batches, 1)
        self.after_fit = flag("after_fit", after_fit)

    def __repr__(self) -> str:
        settings = ", ".join(f"{name}={value!r}" for name, value in self.settings.describe().items())
        return one_line(f"{type(self).__name__}({settings})")

    @property
    def report(self) -> MaskingReport | None:
        """The report of the last evaluation; None before the first one."""
        return self._report

    def logits(self, pl_module: Any, images: Tensor) -> Any:
        """Return class logits ``(batch, classes)`` for images as the loader yields them. Override for other models.

        Args:
            pl_module: the LightningModule, in evaluation mode.
            images: ``(batch, channels, …)``, on the module's device.

        Returns:
            A tensor, an object with ``.logits`` or ``["logits"]``, or a tuple with one tensor.
        """
        return pl_module(images)

    def unpack(self, batch: Any) -> tuple[Tensor, Tensor]:
        """Return (images, labels) of a batch. Override for other batches.

        Args:
            batch: as the loader yields it, on the module's device.

        Returns:
            Images ``(batch, channels, …)`` and labels ``(batch,)`` (class indices) or ``(batch, classes)`` (one-hot).

        Raises:
            UnsuitableError: if no images and labels are found in the batch, or several that could be meant.
        """
        return images_and_labels(batch)
