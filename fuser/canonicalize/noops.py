"""Operators that do nothing go."""

from fuser.canonicalize.rules import become, emit, rule
from fuser.dtypes import DType
from fuser.graph import Graph, Node
from fuser.shapes import axis_of, broadcast


@rule("Identity")
def _identity(graph: Graph, node: Node) -> bool:
    value = node.inputs[0]
    return value is not None and become(graph, node, value)


@rule("Dropout")
def _dropout(graph: Graph, node: Node) -> bool:
    training = node.input(2)
    if (len(node.outputs) > 1 and (node.outputs[1].uses or node.outputs[1].pinned)) or node.outputs[0].captured:
        return False
    if training is not None and training.scalar != 0:
        return False
    value = node.inputs[0]
    return value is not None and become(graph, node, value)


@rule("Cast")
def _cast(graph: Graph, node: Node) -> bool:
    value = node.inputs[0]
    if value is None or value.dtype is None:
        return False
    if value.dtype is node.output.dtype:
        return become(graph, node, value)
    inner = value.producer
    if (
        inner is not None
        and inner.is_a("Cast")
        and inner.inputs[0] is not None
        and value.dtype.is_float
        and not value.captured
    ):
        source = inner.inputs[0]
        # Widening and coming back is exact; so is widening twice.
        if source.dtype is not None and source.dtype.is_float and source.dtype.bits < value.dtype.bits:
            graph.set_input(node, 0, source)
            return True
    return False


@rule("CastLike")
def _cast_like(graph: Graph, node: Node) -> bool:
    """A cast to the type of a value is a cast to that type."""
    value, like = node.inputs
    if value is None or like is None or like.dtype in (None, DType.OTHER):
        return False
    assert like.dtype is not None
    return become(graph, node, emit(graph, node, "Cast", [value], {**node.attributes, "to": like.dtype.onnx}))


@rule("Reshape", "Expand", "Flatten", "Squeeze", "Unsqueeze", "Tile")
def _same_shape(graph: Graph, node: Node) -> bool:
    value, shape = node.inputs[0], node.output.shape
    if (
        value is None
        or value.shape is None
        or shape is None
        or (len(node.inputs) > 1 and node.op not in ("Reshape", "Expand"))
    ):
        return False
    return value.shape == shape and become(graph, node, value)


@rule("Concat", "Sum", "Max", "Min", "Mean")
def _single(graph: Graph, node: Node) -> bool:
    if len(node.inputs) == 1:
        value = node.inputs[0]
        return value is not None and become(graph, node, value)
    if node.op == "Concat":
        # A part of size 0 adds nothing (exporters concatenate empty caches).
        for i, value in enumerate(node.inputs):
            if value is not None and value.shape is not None and value.shape[axis_of(node, len(value.shape), 0)] == 0:
                rest = [v for j, v in enumerate(node.inputs) if j != i]
                return become(graph, node, emit(graph, node, "Concat", rest, dict(node.attributes)))
    return False


@rule("Add", "Sub", "Mul", "Div")
def _neutral(graph: Graph, node: Node) -> bool:
    """x + 0, x - 0, x * 1, x / 1."""
    neutral = 0.0 if node.op in ("Add", "Sub") else 1.0
    for i in (1, 0) if node.op in ("Add", "Mul") else (1,):
        value, other = node.inputs[1 - i], node.inputs[i]
        if (
            value is None
            or other is None
            or other.scalar != neutral
            or value.shape is None
            or value.dtype is not node.output.dtype
        ):
            continue
        if value.shape == node.output.shape:
            return become(graph, node, value)
    return False


@rule("Add", "Sub", "Mul", "Div", "Where", "Equal", "Less", "Greater", "LessOrEqual", "GreaterOrEqual", "And", "Or")
def _needless_expand(graph: Graph, node: Node) -> bool:
    """An operand need not be expanded to what broadcasting gives anyway."""
    changed = False
    for i, value in enumerate(node.inputs):
        source = value.producer if value is not None else None
        if source is None or not source.is_a("Expand") or source.inputs[0] is None or source.inputs[0].shape is None:
            continue
        shapes = [v.shape if j != i else source.inputs[0].shape for j, v in enumerate(node.inputs) if v is not None]
        if (
            all(shape is not None for shape in shapes)
            and broadcast(*(s for s in shapes if s is not None)) == node.output.shape
        ):
            graph.set_input(node, i, source.inputs[0])
            changed = True
    return changed
