"""SphereProjection, which trains scale-invariant weights on spheres of fixed radius (section 2.2 of the paper)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, get_args

import torch
from lightning_utilities.core.rank_zero import rank_zero_info
from torch import Tensor
from torch.optim import SGD, Optimizer

from lightning_normgeo._lightning import QuietCallback
from lightning_normgeo.callbacks._monitors.sharded_models import find_shards, runs_under, unsharded_of
from lightning_normgeo.callbacks._projection import messages
from lightning_normgeo.callbacks._projection.graph_search import GraphSearch
from lightning_normgeo.callbacks._projection.projection_log import log_projection
from lightning_normgeo.callbacks._projection.projector import Mode, Projector
from lightning_normgeo.callbacks._projection.sharded_parameters import local_parameters
from lightning_normgeo.errors import ConfigurationError, nearest_names, warn_once
from lightning_normgeo.normalization.names import named_weights
from lightning_normgeo.probes.sharded.shards import Shards
from lightning_normgeo.symmetries.transformations.optimizer_states import known_optimizers, scaling_of
from lightning_normgeo.utilities.checked_values import plain_values, short_repr, whole
from lightning_normgeo.utilities.notebook import one_line

_BATCHES = 16
"""Batches in which an optimizer's first step is waited for, with watched forward passes."""


class SphereProjection(QuietCallback):
    r"""Keeps every scale-invariant block of weights on a sphere of fixed radius during training.

    A block is what the loss does not feel the scale of: a filter in front of a batch normalization, the filters of a
    group, a layer, or all weights that write into a residual stream. Free training moves a direction at the effective
    learning rate :math:`\eta/\lVert W\rVert^2`, which falls while norms grow. On spheres it is fixed. Blocks are found
    in the first batch, whatever the network; a network without any is trained unchanged, with one warning.

    Modes, for a block W on the sphere of radius r and the update D of the optimizer:

    - ``retract``: W + D is rescaled to r. Momentum and averages of squared gradients follow, as do running statistics
      of batch normalizations. Directions move exactly as in free training with the learning rate that is logged as
      ``sphere/equivalent_lr``.
    - ``tangent``: the radial parts of the gradient and of the momentum are removed before the step, then as
      ``retract``. For SGD, with or without momentum.
    - ``geodesic``: W moves along a great circle, as far as the tangential part of D is long (Cho and Lee 2017). For
      plain SGD.
    - ``hyperball``: :math:`W^+ = r N(W - \eta r N(u))` with D = −ηu (arXiv 2606.16899): η is the tangent of the angle
      per step, whatever the size of u.

    Weight decay λ keeps an effect. Decoupled, it acts as the learning rate η/(1 − ηλ), with averages of gradients that
    shrink by 1 − ηλ per step; added to the gradient, what momentum keeps of it is no longer radial in later steps. A
    line at the start says which.

    This callback changes the training. Measured increments of :class:`NormGrowthMonitor` are those of the optimizer's
    step, before the projection.

    Works with every optimizer whose state is known to scale, 16-mixed and bf16-mixed precision, accumulation, several
    optimizers, DDP, ``fully_shard`` and torch.compile (the first batch runs uncompiled). Checkpoints hold the radii.

    Cost: for ``retract`` two passes over the weights and one over the state of the optimizer per step, about as long as
    a step of SGD; no memory. ``geodesic`` and ``hyperball`` keep a copy of the weights.

    Args:
        mode: ``retract``, ``tangent``, ``geodesic`` or ``hyperball``. Default: ``retract``.
        radius: norm of every block, above 0; running statistics follow. Default: the norm that each has at the start.
        every_n_steps: number of optimizer steps between two projections, at least 1. Default: 1.
        transport: whether the state of the optimizer follows. Without it directions differ from free training.
            Default: true.

    Raises:
        ConfigurationError: for settings, optimizers and dtypes that cannot work, when constructed or before training.
    """

    def __init__(
        self, mode: Mode = "retract", radius: float | None = None, every_n_steps: int = 1, transport: bool = True
    ) -> None:
        super().__init__()
        if mode not in get_args(Mode):
            known = nearest_names(str(mode), get_args(Mode), 4)
            raise ConfigurationError(f"SphereProjection(mode={short_repr(mode)}): choose one of {known}.")
        radius = plain_values(radius)
        if radius is not None and not (isinstance(radius, int | float) and 0 < radius < math.inf):
            raise ConfigurationError(
                f"SphereProjection(radius={short_repr(radius)}): must be a number above 0. Leave it out to keep the "
                "norm that each block has at the start."
            )
        self.mode: Mode = mode
        self.radius = radius
        self.every_n_steps = whole("every_n_steps", every_n_steps, 1)
        if mode in ("geodesic", "hyperball") and self.every_n_steps > 1:
            raise ConfigurationError(
                f"SphereProjection(mode={mode!r}, every_n_steps={every_n_steps}): this mode replaces every step of the "
                "optimizer. Leave out every_n_steps, or choose retract or tangent."
            )
        self.transport = bool(transport)
        self._projector: Projector | None = None
        self._search = GraphSearch()
        self._shards: Shards | None = None
        self._hooks: list[Any] = []
        self._batches = 0
        self._restored: Mapping[str, Mapping[str, Tensor]] = {}

    def __repr__(self) -> str:
        return one_line(f"SphereProjection(mode={self.mode!r}, radius={self.radius})")

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Check everything that can be checked before training starts."""
        strategy = runs_under(trainer, "FSDPStrategy", "DeepSpeedStrategy", "XLAFSDPStrategy")
        if strategy is not None:
            raise ConfigurationError(
                f"SphereProjection cannot work with {strategy}, which does not keep parameters as the optimizer sees "
                "them. Use ddp, or ModelParallelStrategy with fully_shard, or remove the callback."
            )
        for optimizer in trainer.optimizers:
            self._check_optimizer(optimizer)
        for name, weight in named_weights(pl_module):
            if weight.dtype in (torch.float16, torch.bfloat16):
                raise ConfigurationError(
                    f"SphereProjection: {name} is stored in {weight.dtype}, whose rounding is as large as a step: its "
                    "norm cannot be held. Train with precision='bf16-mixed' or '16-mixed', which keep float32 weights."
                )
        self._shards = find_shards("SphereProjection", trainer, pl_module)
        self._search = GraphSearch(None if self._shards is None else unsharded_of(pl_module, self._shards))
        self._projector = Projector(self.mode, self.radius, self.every_n_steps, self.transport, trainer.optimizers)
        self._projector.restore(self._restored)
        self._batches = 0

    def _check_optimizer(self, optimizer: Any) -> None:
        """Check that the blocks of an optimizer can be projected."""
        kind = type(optimizer).__name__
        if not isinstance(optimizer, Optimizer):
            raise ConfigurationError(
                f"SphereProjection cannot follow {kind}, which is not a torch.optim.Optimizer. Derive it from that, or "
                "remove the callback."
            )
        if self.mode == "geodesic" and not (
            isinstance(optimizer, SGD) and not any(group["momentum"] for group in optimizer.param_groups)
        ):
            raise ConfigurationError(
                f"SphereProjection(mode='geodesic') is defined for SGD without momentum, and the optimizer is {kind}"
                f"{' with momentum' if isinstance(optimizer, SGD) else ''}. Choose retract, tangent or hyperball."
            )
        scaling = scaling_of(optimizer)
        if self.mode == "tangent" and (scaling is None or scaling.rate != 2):
            raise ConfigurationError(
                "SphereProjection(mode='tangent') is for optimizers whose steps are proportional to gradients, as SGD, "
                f"and the optimizer is {kind}: without the radial part, elements that never have a gradient would get "
                "one, and full steps. Choose retract or hyperball."
            )
        if self.mode == "retract" and self.transport and scaling is None:
            raise ConfigurationError(
                f"SphereProjection does not know how the state of {kind} scales with the weights. Known are "
                f"{known_optimizers()}. Choose transport=False to leave the state as it is; directions then differ "
                "from those of free training."
            )

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Watch the forward passes of the first batches."""
        if self._projector is None or self._projector.complete:
            return
        self._batches += 1
        if self._batches <= _BATCHES:
            self._search.begin(pl_module)

    def on_before_backward(self, trainer: Any, pl_module: Any, loss: Tensor) -> None:
        """Read the graph of a loss."""
        self._search.read(pl_module, loss)

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        """Find the blocks of an optimizer before its first step, and prepare each step."""
        projector = self._projector
        if projector is None:
            return
        if projector.lacks(optimizer):
            self._search.leave()
            projector.add(optimizer, self._search.found, pl_module, local_parameters(pl_module, self._shards))
            # registered this late, it runs after the hooks of monitors, which measure the step of the optimizer itself
            self._hooks.append(optimizer.register_step_post_hook(self._after_step))
            if projector.complete:
                self._report(projector, trainer)
        projector.before_step(optimizer)

    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if self._projector is not None:
            self._projector.after_step(optimizer)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Project what several optimizers move, and log."""
        self._search.leave()
        projector = self._projector
        if projector is None:
            return
        stepped = projector.end_batch()
        if not projector.complete and self._batches == _BATCHES:
            self._batches += 1
            self._report(projector, trainer)
        if stepped:
            log_projection(projector, trainer)

    def _report(self, projector: Projector, trainer: Any) -> None:
        """Print what is projected, once; a warning if nothing is."""
        if projector.groups:
            rank_zero_info(messages.opening(projector.groups, self.mode, self.every_n_steps, trainer.optimizers))
            return
        warn_once(
            "SphereProjection projects nothing: no weight that an optimizer moves is scale invariant. "
            "print(scale_symmetries(model, batch)) names the operations that are in the way."
        )

    def state_dict(self) -> dict[str, Any]:
        """Return the radii, and how far free training would be from them."""
        return dict(self._restored if self._projector is None else self._projector.state())

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the radii of a checkpoint."""
        self._restored = state_dict

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Remove every hook."""
        self._close()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Remove every hook: after an exception Lightning calls nothing else."""
        self._close()

    def _close(self) -> None:
        self._search.leave()
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        self._shards = None
