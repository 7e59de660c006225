"""Operators whose outputs are shaped like their inputs, broadcast."""

from fuser.dims import Shape
from fuser.dtypes import DType
from fuser.graph import FUSER, MICROSOFT, Graph, Node
from fuser.shapes.table import RULES, Inferred, axis_of, broadcast, dtype_of, rule, shapes_of


@rule(
    "Abs", "Acos", "Acosh", "Asin", "Asinh", "Atan", "Atanh", "BitwiseNot", "Ceil", "Celu", "Clip", "Cos", "Cosh", "CumSum",
    "Elu", "Erf", "Exp", "Floor", "Gelu", "HardSigmoid", "HardSwish", "Hardmax", "Identity", "LeakyRelu", "Log", "LogSoftmax",
    "Mish", "Neg", "Not", "Reciprocal", "Relu", "RotaryEmbedding", "Round", "Selu", "Sigmoid", "Sign",
    "Sin", "Sinh", "Softmax", "Softplus", "Softsign", "Sqrt", "Swish", "Tan", "Tanh", "ThresholdedRelu", "Trilu", "ScatterND",
    "ScatterElements", "Dropout",
)  # fmt: skip
def _same(graph: Graph, node: Node) -> list[Inferred]:
    value = node.inputs[0]
    assert value is not None
    same = (value.dtype, value.shape)
    return [same, (DType.BOOL, value.shape)] if node.op == "Dropout" else [same]


for _op in ("QuickGelu", "Gelu", "FastGelu", "BiasGelu", "RotaryEmbedding"):
    RULES[(MICROSOFT, _op)] = _same
RULES[(FUSER, "Rsqrt")] = _same


@rule("RMSNormalization", "SimplifiedLayerNormalization")
def _rms_normalization(graph: Graph, node: Node) -> list[Inferred]:
    """The result has the weight's type, which may differ from the input's."""
    value = node.inputs[0]
    assert value is not None
    return [(dtype_of(node, 1) or value.dtype, value.shape)]


@rule("LayerNormalization")
def _layer_normalization(graph: Graph, node: Node) -> list[Inferred]:
    value = node.inputs[0]
    assert value is not None
    if value.shape is None:
        return [(value.dtype, None)]
    axis = axis_of(node, len(value.shape), -1)
    statistics: Shape = (*value.shape[:axis], *(1 for _ in value.shape[axis:]))
    return [(value.dtype, value.shape), (DType.FLOAT32, statistics), (DType.FLOAT32, statistics)]


def _skip_normalization(graph: Graph, node: Node) -> list[Inferred]:
    shapes = shapes_of(node, 0)
    if shapes is None:
        return [(dtype_of(node), None)]
    statistics: Shape = (*shapes[0][:-1], 1)
    whole = (dtype_of(node), shapes[0])
    return [whole, (DType.FLOAT32, statistics), (DType.FLOAT32, statistics), whole]


RULES[(MICROSOFT, "SkipLayerNormalization")] = _skip_normalization
RULES[(MICROSOFT, "SkipSimplifiedLayerNormalization")] = _skip_normalization


@rule(
    "Add",
    "Sub",
    "Mul",
    "Div",
    "Pow",
    "Mod",
    "BitwiseAnd",
    "BitwiseOr",
    "BitwiseXor",
    "BitShift",
    "PRelu",
    "Min",
    "Max",
    "Sum",
    "Mean",
)
def _broadcasting(graph: Graph, node: Node) -> list[Inferred]:
    shapes = shapes_of(node)
    return [(dtype_of(node), broadcast(*shapes) if shapes else None)]


@rule("Equal", "Less", "Greater", "LessOrEqual", "GreaterOrEqual", "And", "Or", "Xor", "IsNaN", "IsInf")
def _comparing(graph: Graph, node: Node) -> list[Inferred]:
    shapes = shapes_of(node)
    return [(DType.BOOL, broadcast(*shapes) if shapes else None)]


@rule("Where")
def _where(graph: Graph, node: Node) -> list[Inferred]:
    shapes = shapes_of(node)
    return [(dtype_of(node, 1), broadcast(*shapes) if shapes else None)]


@rule("Cast")
def _cast(graph: Graph, node: Node) -> list[Inferred]:
    shapes = shapes_of(node)
    return [(DType.from_onnx(node.attributes["to"]), shapes[0] if shapes else None)]


@rule("CastLike")
def _cast_like(graph: Graph, node: Node) -> list[Inferred]:
    shapes = shapes_of(node, 0)
    return [(dtype_of(node, 1), shapes[0] if shapes else None)]
