"""Every linear map is MatMul and Add on the rows as the model has them, not flattened for the operator's sake."""

from fuser import dims
from fuser.canonicalize.rules import become, emit, rule, sole
from fuser.dims import Shape
from fuser.graph import Graph, Node, Value

UNARY = (
    "Abs", "Cast", "Ceil", "Erf", "Exp", "Floor", "Gelu", "Log", "Neg", "Reciprocal", "Relu", "Sigmoid", "Softplus", "Sqrt",
    "Tanh",
)  # fmt: skip


@rule("Gemm")
def _gemm(graph: Graph, node: Node) -> bool:
    """Gemm is MatMul and Add, like every other linear."""
    a, b, bias = node.input(0), node.input(1), node.input(2)
    scale = node.attributes.get("alpha", 1.0) != 1.0 or (bias is not None and node.attributes.get("beta", 1.0) != 1.0)
    if a is None or b is None or scale or a.dtype is None or not a.dtype.is_float:
        return False
    if node.attributes.get("transA"):
        a = emit(graph, node, "Transpose", [a], {"perm": (1, 0)})
    if node.attributes.get("transB"):
        b = emit(graph, node, "Transpose", [b], {"perm": (1, 0)})
    result = emit(graph, node, "MatMul", [a, b])
    return become(graph, node, result if bias is None else emit(graph, node, "Add", [result, bias]))


def _flattened(value: Value | None, reader: Node) -> Value | None:
    """What stands behind a Reshape that only merges leading dims, read by `reader` alone."""
    node = value.producer if value is not None else None
    if node is None or value is None or not node.is_a("Reshape") or len(node.inputs) > 1 or node.inputs[0] is None:
        return None
    before, after = node.inputs[0].shape, value.shape
    if before is None or after is None or len(after) >= len(before) or not after or before[-1] != after[-1]:
        return None
    return node.inputs[0] if _tail(before, after) and not value.pinned else None


def _tail(before: Shape, after: Shape) -> bool:
    """Whether `after` is `before` with leading dims merged into one."""
    kept = len(after) - 1
    return (
        before[len(before) - kept :] == after[1:]
        and dims.equal(dims.product(before[: len(before) - kept]), after[0]) is True
    )


def _above_flattening(graph: Graph, node: Node, inputs: list[Value | None]) -> bool:
    """The operator works on what was flattened; the flattening comes after it, where it meets the reshape that undoes it."""
    if node.output.shape is None:
        return False
    result = emit(graph, node, node.op, inputs, dict(node.attributes))
    return become(graph, node, emit(graph, node, "Reshape", [result], {"shape": node.output.shape}))


@rule("MatMul")
def _flat_matmul(graph: Graph, node: Node) -> bool:
    whole, weight = _flattened(node.inputs[0], node), node.inputs[1]
    return (
        whole is not None
        and weight is not None
        and weight.rank == 2
        and _above_flattening(graph, node, [whole, weight])
    )


@rule("Add")
def _flat_bias(graph: Graph, node: Node) -> bool:
    for i, bias in ((0, node.inputs[1]), (1, node.inputs[0])):
        whole = _flattened(node.inputs[i], node)
        if whole is not None and bias is not None and bias.rank == 1:
            return _above_flattening(graph, node, [whole, bias])
    return False


@rule("Add")
def _flat_residual(graph: Graph, node: Node) -> bool:
    """Two values flattened alike are added before they are flattened."""
    a, b = (_flattened(value, node) for value in node.inputs)
    return (
        a is not None and b is not None and a is not b and a.shape == b.shape and _above_flattening(graph, node, [a, b])
    )


@rule("LayerNormalization", "RMSNormalization", "SimplifiedLayerNormalization")
def _flat_norm(graph: Graph, node: Node) -> bool:
    """A norm over the last axis does not mind how the rows are laid out."""
    whole = _flattened(node.inputs[0], node)
    if whole is None or node.attributes.get("axis", -1) != -1 or any(v.uses or v.pinned for v in node.outputs[1:]):
        return False
    return _above_flattening(graph, node, [whole, *node.inputs[1:]])


@rule(*UNARY)
def _flat_unary(graph: Graph, node: Node) -> bool:
    whole = _flattened(node.inputs[0], node)
    return whole is not None and sole(node.inputs[0], node) and _above_flattening(graph, node, [whole])


@rule("Reshape")
def _lift_unflatten(graph: Graph, node: Node) -> bool:
    """A linear over flattened rows whose result is unflattened works on the unflattened rows."""
    value, shape = node.inputs[0], node.output.shape
    if value is None or value.shape is None or shape is None or len(node.inputs) > 1 or not sole(value, node):
        return False
    if len(value.shape) != 2 or len(shape) <= 2 or shape[-1] != value.shape[-1]:
        return False
    chain: list[Node] = []
    step = value.producer
    while step is not None and step.is_a("Add") and (at := _bias_at(step)) is not None:
        chain.append(step)
        inner = step.inputs[1 - at]
        step = inner.producer if sole(inner, step) and inner is not None else None
    weight = step.input(1) if step is not None and step.is_a("MatMul") else None
    if step is None or weight is None or weight.shape is None or len(weight.shape) != 2:
        return False
    rows = step.inputs[0]
    if (
        rows is None
        or rows.shape is None
        or len(rows.shape) != 2
        or rows.producer is None
        or not rows.producer.is_a("Reshape")
    ):
        return False
    result = emit(
        graph, step, "MatMul", [emit(graph, step, "Reshape", [rows], {"shape": (*shape[:-1], rows.shape[-1])}), weight]
    )
    for add in reversed(chain):
        result = emit(graph, add, "Add", [result, add.inputs[_bias_at(add) or 0]])
    return become(graph, node, result)


def _bias_at(node: Node) -> int | None:
    """Which input of an Add is a bias: one dim, while the other has more."""
    ranks = [None if value is None else value.rank for value in node.inputs]
    return ranks.index(1) if 1 in ranks and ranks.count(1) == 1 else None
