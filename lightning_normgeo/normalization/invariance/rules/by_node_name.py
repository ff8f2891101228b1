"""All rules by the name of the autograd node."""

from __future__ import annotations

from collections.abc import Callable

from lightning_normgeo.normalization.invariance.node_context import NodeContext, NotInvariantError, name_of
from lightning_normgeo.normalization.invariance.row_layout import ScaleState
from lightning_normgeo.normalization.invariance.rules import (
    arithmetic,
    indexing,
    linear_maps,
    patches,
    shapes,
)

_BY_RULE: dict[Callable[[NodeContext], ScaleState | None], str] = {
    shapes.copy: "ToCopy Clone Alias Contiguous",
    arithmetic.homogeneous: "Relu LeakyRelu RreluWithNoise PreluKernel Abs Neg NativeDropout Tril Triu",
    shapes.pass_through: "RegisterPostBackwardFunction",  # fully_shard puts it around the inputs of a module
    shapes.checkpoint: "CheckpointFunction",
    shapes.view: "View ReshapeAlias UnsafeView Squeeze Unsqueeze Reshape",
    shapes.permute: "T Transpose Permute",
    shapes.expand: "Expand",
    shapes.spatial: (
        "MaxPool2DWithIndices MaxPool3DWithIndices AvgPool2D AvgPool3D AdaptiveAvgPool2D AdaptiveAvgPool3D "
        "AdaptiveMaxPool2D AdaptiveMaxPool3D MkldnnMaxPool2D UpsampleNearest1D UpsampleNearest2D UpsampleNearest3D "
        "UpsampleNearestExact1D UpsampleNearestExact2D UpsampleNearestExact3D UpsampleBilinear2DAa UpsampleBicubic2DAa "
        "UpsampleLinear1D UpsampleBilinear2D UpsampleBicubic2D UpsampleTrilinear3D ReflectionPad1D ReflectionPad2D "
        "ReflectionPad3D ReplicationPad1D ReplicationPad2D ReplicationPad3D"
    ),
    shapes.cut: "Slice Split SplitWithSizes Narrow Select Unbind",
    shapes.concatenate: "Cat",
    shapes.stack: "Stack",
    shapes.repeat: "Repeat",
    shapes.reorder: "Flip Roll",
    shapes.windows: "Unfold",
    patches.pixel_shuffle: "PixelShuffle",
    patches.pixel_unshuffle: "PixelUnshuffle",
    patches.channel_shuffle: "ChannelShuffle",
    patches.im2col: "Im2Col",
    patches.col2im: "Col2Im",
    patches.restride: "AsStrided",
    indexing.select: "IndexSelect",
    indexing.index: "Index",
    indexing.embedding: "Embedding",
    indexing.gather: "Gather",
    indexing.scatter: "Scatter ScatterAdd ScatterReduce IndexAdd IndexCopy",
    indexing.put: "IndexPut",
    indexing.where: "Where",
    indexing.masked_fill: "MaskedFill",
    indexing.pad: "ConstantPadNd",
    arithmetic.power(None): "Pow",
    arithmetic.power(0.5): "Sqrt",
    arithmetic.power(-0.5): "Rsqrt",
    arithmetic.power(-1.0): "Reciprocal",
    arithmetic.reduction(1.0): "Sum Mean Std LinalgVectorNorm Norm Amax Amin Max Min",
    arithmetic.reduction(2.0): "Var",
    arithmetic.reduction(2.0, 1.0): "VarMean",
    arithmetic.reduction(1.0, 1.0): "StdMean",
    arithmetic.add: "Add Sub",
    arithmetic.multiply: "Mul",
    arithmetic.divide: "Div",
    arithmetic.add_product(1): "Addcmul",
    arithmetic.add_product(-1): "Addcdiv",
    arithmetic.together: "Maximum Minimum Fmax Fmin Lerp",
    arithmetic.along: "Sort Topk Kthvalue Median Cumsum Cummax Cummin",
    arithmetic.clamp: "ClampMin ClampMax Clamp",
    linear_maps.convolution: "Convolution",
    linear_maps.matrix_product: "Mm Addmm Bmm Baddbmm",
    linear_maps.linear: "Linear",
    linear_maps.vector_product: "Mv Dot Vdot",
    linear_maps.sparse_product: "SparseAddmm",
    linear_maps.attention: (
        "ScaledDotProductFlashAttentionForCpu ScaledDotProductFlashAttention ScaledDotProductEfficientAttention "
        "ScaledDotProductCudnnAttention"
    ),
    linear_maps.batch_norm: "NativeBatchNorm CudnnBatchNorm MiopenBatchNorm SyncBatchNorm",
    linear_maps.group_norm: "NativeGroupNorm",
    linear_maps.layer_norm: "NativeLayerNorm",
    linear_maps.rms_norm: "FusedRmsNorm",
    linear_maps.weight_norm: "WeightNormInterface",
}
RULES = {name: function for function, names in _BY_RULE.items() for name in names.split()}


def apply(walk: NodeContext) -> ScaleState | None:
    """Return the state of a node's output; None if the output does not scale with the weight.

    Raises:
        NotInvariantError: if the output depends on the scale in a way that no normalization can cancel, or if there is
            no rule for the node.
    """
    function = RULES.get(name_of(walk.node))
    if function is None:
        raise NotInvariantError(
            f"its output is read by {name_of(walk.node)}, which is not known to be positively homogeneous"
        )
    try:
        return function(walk)
    except AttributeError as missing:  # the attributes that torch saves on its nodes differ between versions
        raise NotInvariantError(f"{name_of(walk.node)} is recorded in an unknown form ({missing})") from missing
