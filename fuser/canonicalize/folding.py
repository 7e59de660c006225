"""Constants are folded, and shape arithmetic becomes symbolic dims."""

from fuser import dims
from fuser.canonicalize.rules import IMPURE, become, rule, sole
from fuser.constants import Array, Constant, Transposed
from fuser.dtypes import DType
from fuser.errors import FuserError
from fuser.evaluation import evaluate
from fuser.graph import FUSER, Graph, Node, Value
from fuser.shapes import infer_node
from fuser.spelling import absorb
from fuser.tensors import to_constant, to_tensor

FOLD_LIMIT = 1 << 16  # elements: larger results of constant nodes are weights, and are left where they are
AXIS = frozenset(
    {
        "Concat",
        "Gather",
        "GatherElements",
        "LayerNormalization",
        "LogSoftmax",
        "RMSNormalization",
        "SimplifiedLayerNormalization",
        "Softmax",
        "Split",
        "TopK",
        "ArgMax",
        "ArgMin",
        "ScatterElements",
    }
)


@rule()
def _absorb(graph: Graph, node: Node) -> bool:
    return absorb(graph, node)


@rule()
def _negative_axis(graph: Graph, node: Node) -> bool:
    """Axes are counted from the back: the same number whatever the rank."""
    value = node.input(0)
    if node.domain or value is None or value.shape is None:
        return False
    rank = len(value.shape)
    if node.op in AXIS and isinstance(axis := node.attributes.get("axis"), int) and axis >= 0:
        node.attributes["axis"] = axis - rank
        return True
    axes = node.attributes.get("axes")
    if not isinstance(axes, tuple) or node.op == "Unsqueeze" or all(axis < 0 for axis in axes):
        return False
    node.attributes["axes"] = tuple(axis - rank if axis >= 0 else axis for axis in axes)
    return True


@rule("Unsqueeze")
def _new_axis(graph: Graph, node: Node) -> bool:
    """Axes that are new count from the front, but a last one is -1."""
    axes, shape = node.attributes.get("axes"), node.output.shape
    if not isinstance(axes, tuple) or shape is None:
        return False
    rank = len(shape)
    counted = sorted(axis % rank for axis in axes)
    plain = tuple(-1 if axis == rank - 1 > 0 else axis for axis in counted)
    if plain == axes:
        return False
    node.attributes["axes"] = plain
    return True


@rule()
def _known_content(graph: Graph, node: Node) -> bool:
    """Shape arithmetic gives way to the dims it computes."""
    if node.is_a("Dims", FUSER):
        return False
    changed = False
    for value in node.outputs:
        if value.captured or not (value.uses or value.is_output):
            continue
        known = _stated(graph, node, value)
        if known is not None:
            graph.replace(value, known)
            changed = True
    return changed


def _stated(graph: Graph, node: Node, value: Value) -> Value | None:
    """A constant, or a `Dims` leaf, that holds what `value` is known to hold."""
    if value.content is None or value.dtype is None:
        return None
    flat = value.content if isinstance(value.content, tuple) else (value.content,)
    if all(isinstance(item, (int, bool)) for item in flat):
        return graph.constant(Array.of(value.content, value.dtype), value.name)
    if value.dtype is not DType.INT64:
        return None
    for symbol in dims.symbols(flat):
        if symbol not in graph.dim_sources or graph.dim_sources[symbol][0].producer is node:
            return None
    stated = graph.add("Dims", [], {"dims": value.content}, domain=FUSER, outputs=[value.name], like=node)
    infer_node(graph, stated)
    return stated.output


def _is_small(value: Value) -> bool:
    return value.constant is not None and value.constant.size <= FOLD_LIMIT and value.constant.is_known


@rule()
def _fold(graph: Graph, node: Node) -> bool:
    """A node of constants becomes a constant, unless the result is large."""
    if node.op in IMPURE or node.domain not in ("", FUSER) or node.op == "Dims" or node.captures or node.carried:
        return False
    if not node.inputs and node.op != "ConstantOfShape":
        return False
    if not all(value is None or _is_small(value) for value in node.inputs):
        return False
    for value in node.outputs:
        if value.shape is None or not all(isinstance(dim, int) for dim in value.shape) or value.captured:
            return False
        if dims.product(value.shape) > FOLD_LIMIT:
            return False
    try:
        results = evaluate(
            node,
            [None if v is None or v.constant is None else to_tensor(v.constant.numpy()) for v in node.inputs],
            {},
            opset=graph.opset,
        )
        constants = [None if result is None else to_constant(result) for result in results]
    except (FuserError, ValueError):
        return False
    if any(constant is None and value.uses for constant, value in zip(constants, node.outputs, strict=True)):
        return False
    for constant, value in zip(constants, node.outputs, strict=True):
        if constant is not None:
            graph.replace(value, graph.constant(constant, value.name))
    graph.remove(node)
    return True


@rule("Transpose")
def _fold_transposed_weight(graph: Graph, node: Node) -> bool:
    """A transposed weight nobody else reads is stored transposed. A shared (tied) one stays single in the file."""
    value = node.inputs[0]
    if value is None or value.constant is None or len(value.constant.shape) != 2 or value.constant.dtype.bits < 8:
        return False
    if tuple(node.attributes.get("perm", (1, 0))) != (1, 0) or not sole(value, node):
        return False
    base = value.constant
    data: Constant = base.base if isinstance(base, Transposed) else Transposed(base)
    return become(graph, node, graph.constant(data, value.name))
