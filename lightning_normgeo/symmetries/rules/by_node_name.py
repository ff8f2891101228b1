"""All rules by the name of the autograd node."""

from __future__ import annotations

from collections.abc import Callable

from lightning_normgeo.symmetries.degrees.degree import Degree
from lightning_normgeo.symmetries.degrees.nodes import (
    ATTENTIONS,
    BATCH_NORMS,
    COPIES,
    CUTS,
    PASSED,
    PERMUTATIONS,
    POOLINGS,
    VIEWS,
)
from lightning_normgeo.symmetries.rules import elementwise, indexing, linear_maps, patches, shapes, statistics
from lightning_normgeo.symmetries.rules.context import NoRuleError, Operation

Rule = Callable[[Operation], Degree]

_NOT_HOMOGENEOUS = (
    "Gelu Silu Sigmoid Tanh Softplus Exp Exp2 Expm1 Log Log2 Log10 Log1P Erf Hardswish Hardsigmoid Hardtanh Mish Elu "
    "LogSigmoid Sin Cos Tan Asin Acos Atan Sinh Cosh Softmax SafeSoftmax LogSoftmax Logsumexp Threshold Softshrink "
    "Hardshrink "
    "MseLoss NllLoss NllLoss2D BinaryCrossEntropyWithLogits BinaryCrossEntropy SmoothL1Loss L1Loss HuberLoss KlDiv "
    "SoftMarginLoss MultiMarginLoss MultilabelMarginLoss PoissonNllLoss CtcLoss"
)
NOT_HOMOGENEOUS = frozenset(_NOT_HOMOGENEOUS.split())
"""Operations that are known to keep no scale; all others without a rule are unknown."""

_BY_RULE: dict[Rule, str] = {
    elementwise.homogeneous: (
        "Relu LeakyRelu RreluWithNoise Abs Neg NativeDropout FusedDropout Tril Triu Conj Resolve"
    ),
    elementwise.sign: "Sign",
    elementwise.with_sign_of: "Copysign",
    elementwise.prelu: "PreluKernel",
    elementwise.gated: "Glu",
    elementwise.total: "Add Sub Rsub",
    elementwise.product: "Mul",
    elementwise.quotient: "Div",
    elementwise.power(None): "Pow",
    elementwise.power(0.5): "Sqrt",
    elementwise.power(-0.5): "Rsqrt",
    elementwise.power(-1.0): "Reciprocal",
    elementwise.added_product(1.0): "Addcmul",
    elementwise.added_product(-1.0): "Addcdiv",
    elementwise.together: "Maximum Minimum Fmax Fmin Where",
    elementwise.interpolation: "Lerp",
    elementwise.beside_constant: "MaskedFill",
    elementwise.clamp: "ClampMin ClampMax Clamp",
    shapes.copy: " ".join(sorted(COPIES - PASSED)),
    shapes.pass_through: " ".join(sorted(PASSED)),
    shapes.checkpoint: "CheckpointFunction",
    shapes.view: " ".join(sorted(VIEWS)),
    shapes.permute: " ".join(sorted(PERMUTATIONS)),
    shapes.expand: "Expand",
    shapes.repeat: "Repeat",
    shapes.cut: " ".join(sorted(CUTS)),
    shapes.flip: "Flip",
    shapes.rotate: "Rot90",
    shapes.roll: "Roll",
    shapes.concatenate: "Cat Stack",
    shapes.pad: "ConstantPadNd",
    indexing.index_select: "IndexSelect",
    indexing.index: "Index",
    indexing.gather: "Gather",
    indexing.written: "Scatter ScatterAdd ScatterReduce IndexAdd IndexCopy",
    indexing.put: "IndexPut",
    indexing.embedding: "Embedding",
    indexing.bags: "EmbeddingBag",
    patches.same_everywhere: "MaskedSelect",
    patches.sampled: "GridSampler2D GridSampler3D",
    patches.image: "Col2Im",
    patches.patches: "Im2Col",
    patches.windows: "Unfold",
    patches.pixel_shuffle: "PixelShuffle",
    patches.pixel_unshuffle: "PixelUnshuffle",
    patches.channel_shuffle: "ChannelShuffle",
    patches.as_complex: "ViewAsComplex",
    patches.as_real: "ViewAsReal",
    patches.restride: "AsStrided",
    linear_maps.matrix_product: "Mm Addmm Bmm Baddbmm",
    linear_maps.linear: "Linear",
    linear_maps.sparse_product: "SparseAddmm",
    linear_maps.vector_product: "Mv Dot Vdot",
    linear_maps.convolution: "Convolution",
    linear_maps.fourier: "FftR2C FftC2R FftC2C",
    linear_maps.attention: " ".join(sorted(ATTENTIONS)),
    statistics.batch_norm: " ".join(sorted(BATCH_NORMS)),
    statistics.group_norm: "NativeGroupNorm",
    statistics.layer_norm: "NativeLayerNorm FusedRmsNorm",
    statistics.weight_norm: "WeightNormInterface",
    statistics.reduction(1.0): "Sum Mean Std Amax Amin",
    statistics.norm: "LinalgVectorNorm Norm",
    statistics.reduction(2.0): "Var",
    statistics.reduction(2.0, 1.0): "VarMean",
    statistics.reduction(1.0, 1.0): "StdMean",
    statistics.extremum: "Max Min Median Kthvalue Mode",
    statistics.along: "Cumsum Cummax Cummin Sort Topk",
    statistics.pooling: " ".join(sorted(POOLINGS | {"MaxUnpool2D", "MaxUnpool3D"})),
}
RULES: dict[str, Rule] = {name: rule for rule, names in _BY_RULE.items() for name in names.split()}


def degree_of(walk: Operation) -> Degree:
    """Return the degree of the result of an operation.

    Raises:
        NoRuleError: if the operation is not understood.
    """
    if walk.name in NOT_HOMOGENEOUS:
        return elementwise.not_homogeneous(walk)
    rule = RULES.get(walk.name)
    if rule is None:
        raise NoRuleError
    try:
        return rule(walk)
    except AttributeError as missing:  # the attributes that torch saves on its nodes differ between versions
        raise NoRuleError from missing
