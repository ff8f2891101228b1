"""Search for the scale symmetries of a training, in the backward passes of its first batches."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from lightning_normgeo.normalization.autograd.compiled_modules import runs_compiled_code
from lightning_normgeo.normalization.autograd.graph import Graph
from lightning_normgeo.normalization.autograd.zero_constants import ZeroConstants
from lightning_normgeo.probes.sharded.unsharded import UnshardedParameters
from lightning_normgeo.symmetries.search import symmetries_in
from lightning_normgeo.symmetries.symmetries import Symmetries
from lightning_normgeo.symmetries.transformations.batch_norms import BatchNormNodes


class GraphSearch:
    """Collects the scale symmetries of every loss between :meth:`begin` and :meth:`leave`.

    Compiled modules run uncompiled in between, since nothing is seen of a compiled graph.

    Args:
        unsharded: tracker of unsharded parameters, for a sharded model.

    Attributes:
        found: symmetries of each graph; several losses with the same graph have one entry.
    """

    def __init__(self, unsharded: UnshardedParameters | None = None) -> None:
        self.found: list[Symmetries] = []
        self._unsharded = unsharded
        self._signatures: set[Any] = set()
        self._open: ExitStack | None = None
        self._constants: ZeroConstants | None = None
        self._batch_norms: BatchNormNodes | None = None

    def begin(self, module: nn.Module) -> None:
        """Watch the forward passes to come."""
        self.leave()
        self._open, self.found, self._signatures = ExitStack(), [], set()
        if runs_compiled_code(module):
            self._open.enter_context(torch.compiler.set_stance("force_eager"))
        if self._unsharded is not None:
            self._unsharded.watch()
            self._open.callback(self._unsharded.rest)
        self._batch_norms = self._open.enter_context(BatchNormNodes(module))
        self._constants = ZeroConstants()
        self._constants.begin()
        self._open.callback(self._constants.leave)

    def read(self, module: nn.Module, loss: Tensor) -> None:
        """Add the symmetries in the graph of a loss, before its backward pass."""
        if self._open is None or self._constants is None or self._batch_norms is None:
            return
        unsharded = None if self._unsharded is None else self._unsharded.names
        graph = Graph(loss, unsharded=unsharded, constants=self._constants.records())
        if not (graph.compiled or graph.anonymous) and graph.signature not in self._signatures:
            self._signatures.add(graph.signature)
            self.found.append(symmetries_in(graph, module, self._batch_norms.nodes))

    def leave(self) -> None:
        """Stop watching; what was found stays, and no graph is kept alive."""
        opened, self._open = self._open, None
        self._constants = self._batch_norms = None
        if opened is not None:
            opened.close()
