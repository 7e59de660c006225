"""One computation, one form: the spellings of division, roots, powers and means become one."""

import ml_dtypes

from fuser import dims
from fuser.canonicalize.rules import become, emit, rule
from fuser.constants import Array
from fuser.dtypes import DType
from fuser.graph import FUSER, Graph, Node


@rule("Div")
def _div(graph: Graph, node: Node) -> bool:
    """x / c is x * (1/c); a / sqrt(b) is a * rsqrt(b)."""
    a, b = node.inputs
    if a is None or b is None or node.output.dtype is None or not node.output.dtype.is_float:
        return False
    if b.constant is not None and b.scalar and _is_normal(1.0 / b.scalar, node.output.dtype):
        reciprocal = graph.constant(
            Array.of(1.0 / b.constant.numpy().astype("float64"), node.output.dtype), "reciprocal"
        )
        return become(graph, node, emit(graph, node, "Mul", [a, reciprocal]))
    if b.producer is not None and b.producer.is_a("Sqrt"):
        inverse = emit(graph, node, "Rsqrt", [b.producer.inputs[0]], domain=FUSER, absorbing=b.producer)
        if a.scalar == 1.0 and inverse.shape == node.output.shape:
            return become(graph, node, inverse)
        return become(graph, node, emit(graph, node, "Mul", [a, inverse]))
    if a.scalar == 1.0 and b.shape == node.output.shape:
        return become(graph, node, emit(graph, node, "Reciprocal", [b]))
    return False


def _is_normal(number: float, dtype: DType) -> bool:
    """Whether a dtype holds a number at its full precision: neither subnormal nor infinite."""
    limits = ml_dtypes.finfo(dtype.numpy)
    return float(limits.tiny) <= abs(number) <= float(limits.max)


@rule("Reciprocal", "Sqrt")
def _rsqrt(graph: Graph, node: Node) -> bool:
    """1/sqrt(x) and sqrt(1/x) are rsqrt(x)."""
    value = node.inputs[0]
    inner = value.producer if value is not None else None
    if inner is None or not inner.is_a("Sqrt" if node.op == "Reciprocal" else "Reciprocal"):
        return False
    return become(graph, node, emit(graph, node, "Rsqrt", [inner.inputs[0]], domain=FUSER, absorbing=inner))


@rule("Pow")
def _pow(graph: Graph, node: Node) -> bool:
    x, exponent = node.inputs
    if (
        x is None
        or exponent is None
        or x.shape is None
        or x.shape != node.output.shape
        or x.dtype is None
        or not x.dtype.is_float
    ):
        return False
    power = exponent.scalar
    if power == 1.0:
        return become(graph, node, x)
    if power == 2.0:
        return become(graph, node, emit(graph, node, "Mul", [x, x]))
    if power == 3.0:
        return become(graph, node, emit(graph, node, "Mul", [x, emit(graph, node, "Mul", [x, x])]))
    if power == 0.5:
        return become(graph, node, emit(graph, node, "Sqrt", [x]))
    return power == -0.5 and become(graph, node, emit(graph, node, "Rsqrt", [x], domain=FUSER))


@rule("Sub")
def _sub(graph: Graph, node: Node) -> bool:
    """x - c is x + (-c)."""
    a, b = node.inputs
    if a is None or b is None or b.constant is None or b.scalar is None or b.dtype is None or not b.dtype.is_float:
        return False
    negative = graph.constant(Array.of(-b.constant.numpy(), b.dtype), "negative")
    return become(graph, node, emit(graph, node, "Add", [a, negative]))


@rule("ReduceSumSquare")
def _reduce_sum_square(graph: Graph, node: Node) -> bool:
    value = node.inputs[0]
    return value is not None and become(
        graph,
        node,
        emit(
            graph,
            node,
            "ReduceSum",
            [emit(graph, node, "Mul", [value, value]), *node.inputs[1:]],
            dict(node.attributes),
        ),
    )


@rule("ReduceSum")
def _mean(graph: Graph, node: Node) -> bool:
    """sum(x) * (1/n) is mean(x)."""
    value, axes = node.inputs[0], node.attributes.get("axes")
    if value is None or value.shape is None or not axes or not node.output.uses or node.output.pinned:
        return False
    count = dims.product(value.shape[axis] for axis in axes)
    if not isinstance(count, int):
        return False
    for user in node.output.consumers:
        if not user.is_a("Mul"):
            return False
        other = user.inputs[1] if user.inputs[0] is node.output else user.inputs[0]
        if other is None or other.scalar is None or abs(other.scalar * count - 1.0) > 1e-6 or user.output.captured:
            return False
    attributes = {name: item for name, item in node.attributes.items() if name != "noop_with_empty_axes"}
    mean = emit(graph, node, "ReduceMean", [value], attributes)
    for user in node.output.consumers:
        become(graph, user, mean)
    return True
