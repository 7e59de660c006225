"""Removing what exporters add, by true identities only, until nothing changes.

Constants are folded, shape arithmetic becomes symbolic dims, operators that do nothing go, and the different spellings of
one computation become one: after this, exporters differ little, and what is structurally different stays a variant in
a pattern. Each rule looks at one node and says whether it changed anything.
"""

from collections.abc import Callable, Iterable
from typing import Any

from fuser import dims
from fuser.constants import Array, Constant, Transposed
from fuser.dims import Dim, Shape
from fuser.dtypes import DType
from fuser.errors import FuserError
from fuser.evaluation import evaluate, to_constant, to_tensor
from fuser.graph import FUSER, Graph, Node, Value
from fuser.shapes import CONTENT_LIMIT, axis_of, broadcast, clamp, content, infer_node, parameter, quotient, slice_bounds
from fuser.spelling import absorb

FOLD_LIMIT = 1 << 16  # elements: larger results of constant nodes are weights, and are left where they are
ROUNDS = 12

Rule = Callable[[Graph, Node], bool]
_RULES: dict[tuple[str, str], list[Rule]] = {}
_GENERAL: list[Rule] = []

UNARY = frozenset({"Abs", "Cast", "Ceil", "Erf", "Exp", "Floor", "Log", "Neg", "Reciprocal", "Relu", "Sigmoid", "Sqrt", "Tanh", "Gelu", "Softplus"})
# Results differ from call to call: never folded, never shared.
IMPURE = frozenset({"RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Multinomial", "Bernoulli", "Dropout"})
AXIS = frozenset({"Concat", "Gather", "GatherElements", "LayerNormalization", "LogSoftmax", "RMSNormalization", "SimplifiedLayerNormalization", "Softmax", "Split", "TopK", "ArgMax", "ArgMin", "ScatterElements"})


def canonicalize(graph: Graph) -> None:
    """Brings a graph to the one form patterns are written for. The graph stays valid throughout."""
    for round_ in range(ROUNDS):
        changed = 0
        for node in list(graph.nodes):
            if node not in graph.nodes:
                continue
            infer_node(graph, node)
            changed += sum(1 for rule in (*_RULES.get((node.domain, node.op), ()), *_GENERAL) if node in graph.nodes and rule(graph, node))
        changed += _share(graph) + graph.prune()
        graph.sort()
        if not changed and round_:
            break


def rule(*ops: str, domain: str = "") -> Callable[[Rule], Rule]:
    """Registers a rule for some operators; for every node when none is named."""

    def register(function: Rule) -> Rule:
        for op in ops:
            _RULES.setdefault((domain, op), []).append(function)
        if not ops:
            _GENERAL.append(function)
        return function

    return register


# -- building ------------------------------------------------------------------------------------------------------


def _new(graph: Graph, like: Node, op: str, inputs: Iterable[Value | None], attributes: dict[str, Any] | None = None, domain: str = "") -> Value:
    node = graph.add(op, inputs, attributes, domain=domain, outputs=[like.output.name], like=like)
    infer_node(graph, node)
    return node.output


def _become(graph: Graph, node: Node, new: Value) -> bool:
    """Replaces a node's only output and removes the node, unless a control-flow body reads it by name."""
    if any(value.captured for value in node.outputs):
        return False
    new.dtype = new.dtype or node.output.dtype
    graph.replace(node.output, new)
    if not any(value.uses or value.is_output for value in node.outputs):
        graph.remove(node)
    return True


def _scalar_like(graph: Graph, number: float, like: Value | None) -> Value:
    dtype = like.dtype if like is not None and like.dtype is not None else DType.FLOAT32
    return graph.constant(Array.of(number, dtype), "scalar")


def _sole(value: Value | None, node: Node) -> bool:
    """Whether `node` is the only reader of `value`."""
    return value is not None and not value.pinned and value.consumers == [node]


# -- constants and shape arithmetic ----------------------------------------------------------------------------------


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


@rule()
def _known_content(graph: Graph, node: Node) -> bool:
    """Shape arithmetic gives way to the dims it computes."""
    if len(node.outputs) != 1 or node.is_a("Dims", FUSER) or node.output.captured:
        return False
    value, found = node.output, node.output.content
    if found is None:
        return False
    flat = found if isinstance(found, tuple) else (found,)
    if all(isinstance(item, (int, bool)) for item in flat) and value.dtype is not None:
        return _become(graph, node, graph.constant(Array.of(found, value.dtype), value.name))
    if value.dtype is not DType.INT64 or any(symbol not in graph.dim_sources for symbol in dims.symbols(flat)):
        return False
    if any(graph.dim_sources[symbol][0].producer is node for symbol in dims.symbols(flat)):
        return False
    return _become(graph, node, _new(graph, node, "Dims", [], {"dims": found}, FUSER))


@rule()
def _fold(graph: Graph, node: Node) -> bool:
    """A node of constants becomes a constant, unless the result is large."""
    if node.op in IMPURE or node.domain not in ("", FUSER) or node.op == "Dims" or node.captures or node.carried:
        return False
    if not node.inputs and node.op != "ConstantOfShape":
        return False
    if any(value is not None and (value.constant is None or value.constant.size > FOLD_LIMIT) for value in node.inputs):
        return False
    for value in node.outputs:
        if value.shape is None or not all(isinstance(dim, int) for dim in value.shape) or value.captured:
            return False
        if dims.product(value.shape) > FOLD_LIMIT:
            return False
    try:
        results = evaluate(node, [None if v is None or v.constant is None else to_tensor(v.constant.numpy()) for v in node.inputs], {}, opset=graph.opset)
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
    if tuple(node.attributes.get("perm", (1, 0))) != (1, 0) or not _sole(value, node):
        return False
    base = value.constant
    data: Constant = base.base if isinstance(base, Transposed) else Transposed(base)
    return _become(graph, node, graph.constant(data, value.name))


# -- operators that do nothing ---------------------------------------------------------------------------------------


@rule("Identity")
def _identity(graph: Graph, node: Node) -> bool:
    value = node.inputs[0]
    return value is not None and _become(graph, node, value)


@rule("Dropout")
def _dropout(graph: Graph, node: Node) -> bool:
    training = node.input(2)
    if (len(node.outputs) > 1 and (node.outputs[1].uses or node.outputs[1].pinned)) or node.outputs[0].captured:
        return False
    if training is not None and training.scalar != 0:
        return False
    value = node.inputs[0]
    return value is not None and _become(graph, node, value)


@rule("Cast")
def _cast(graph: Graph, node: Node) -> bool:
    value = node.inputs[0]
    if value is None or value.dtype is None:
        return False
    if value.dtype is node.output.dtype:
        return _become(graph, node, value)
    inner = value.producer
    if inner is not None and inner.is_a("Cast") and inner.inputs[0] is not None and value.dtype.is_float and not value.captured:
        source = inner.inputs[0]
        # Widening and coming back is exact; so is widening twice.
        if source.dtype is not None and source.dtype.is_float and source.dtype.bits < value.dtype.bits:
            graph.set_input(node, 0, source)
            return True
    return False


@rule("Reshape", "Expand", "Flatten", "Squeeze", "Unsqueeze", "Tile")
def _same_shape(graph: Graph, node: Node) -> bool:
    value, shape = node.inputs[0], node.output.shape
    if value is None or value.shape is None or shape is None or len(node.inputs) > 1 and node.op not in ("Reshape", "Expand"):
        return False
    return value.shape == shape and _become(graph, node, value)


@rule("Transpose")
def _transpose(graph: Graph, node: Node) -> bool:
    value = node.inputs[0]
    if value is None or value.shape is None:
        return False
    order = tuple(node.attributes.get("perm", range(len(value.shape))[::-1]))
    if order == tuple(range(len(order))):
        return _become(graph, node, value)
    inner = value.producer
    if inner is None or not inner.is_a("Transpose") or value.captured or inner.inputs[0] is None:
        return False
    first = tuple(inner.attributes.get("perm", range(len(order))[::-1]))
    node.attributes["perm"] = tuple(first[i] for i in order)
    graph.set_input(node, 0, inner.inputs[0])
    return True


@rule("Reshape", "Flatten", "Squeeze", "Unsqueeze")
def _reshape_chain(graph: Graph, node: Node) -> bool:
    """Only the last of several reshapes matters."""
    value, shape = node.inputs[0], node.output.shape
    inner = value.producer if value is not None else None
    if inner is None or value is None or shape is None or value.captured or len(node.inputs) > 1 or len(inner.inputs) > 1:
        return False
    if inner.domain or inner.op not in ("Reshape", "Flatten", "Squeeze", "Unsqueeze") or inner.inputs[0] is None:
        return False
    if 0 in shape or any(symbol not in graph.dim_sources or graph.dim_sources[symbol][0] in (value, node.output) for symbol in dims.symbols(shape)):
        return False
    return _become(graph, node, _new(graph, node, "Reshape", [inner.inputs[0]], {"shape": shape}))


@rule("Slice")
def _slice(graph: Graph, node: Node) -> bool:
    """A slice of everything is nothing; slices that partition one axis are one Split."""
    value, bounds = node.inputs[0], slice_bounds(node)
    if value is None or value.shape is None or bounds is None:
        return False
    taken = {a: (clamp(s, value.shape[a]), clamp(e, value.shape[a])) for a, (s, e, step) in bounds.items() if step == 1}
    if len(taken) != len(bounds):
        return False
    if all(span == (0, value.shape[axis]) for axis, span in taken.items()):
        return _become(graph, node, value)
    if len(taken) != 1:
        return False
    ((axis, _),) = taken.items()
    parts: dict[tuple[Dim, Dim], Node] = {}
    for user in value.consumers:
        other = slice_bounds(user) if user.is_a("Slice") and user.inputs[0] is value else None
        if other is None or set(other) != {axis} or other[axis][2] != 1 or user.output.captured:
            continue
        parts.setdefault((clamp(other[axis][0], value.shape[axis]), clamp(other[axis][1], value.shape[axis])), user)
    order = _partition(list(parts), value.shape[axis])
    if order is None:
        return False
    whole = graph.add("Split", [value], {"axis": axis - len(value.shape), "split": tuple(dims.sub(end, start) for start, end in order)}, outputs=[parts[span].output.name for span in order], like=parts[order[0]])
    infer_node(graph, whole)
    for span, part in zip(order, whole.outputs, strict=True):
        _become(graph, parts[span], part)
    return True


def _partition(spans: list[tuple[Dim, Dim]], size: Dim) -> list[tuple[Dim, Dim]] | None:
    """The spans in order when they tile [0, size) exactly, each once."""
    if len(spans) < 2 or not all(isinstance(x, int) for span in spans for x in span):
        return None
    order = sorted(spans)
    ends = [0, *(end for _, end in order)]
    return order if ends[-1] == size and all(start == end for (start, _), end in zip(order, ends, strict=False)) else None


@rule("Concat", "Sum", "Max", "Min", "Mean")
def _single(graph: Graph, node: Node) -> bool:
    if len(node.inputs) == 1:
        value = node.inputs[0]
        return value is not None and _become(graph, node, value)
    if node.op == "Concat":
        # A part of size 0 adds nothing (exporters concatenate empty caches).
        for i, value in enumerate(node.inputs):
            if value is not None and value.shape is not None and value.shape[axis_of(node, len(value.shape), 0)] == 0:
                rest = [v for j, v in enumerate(node.inputs) if j != i]
                return _become(graph, node, _new(graph, node, "Concat", rest, dict(node.attributes)))
    return False


@rule("Add", "Sub", "Mul", "Div")
def _neutral(graph: Graph, node: Node) -> bool:
    """x + 0, x - 0, x * 1, x / 1."""
    neutral = 0.0 if node.op in ("Add", "Sub") else 1.0
    for i in (1, 0) if node.op in ("Add", "Mul") else (1,):
        value, other = node.inputs[1 - i], node.inputs[i]
        if value is None or other is None or other.scalar != neutral or value.shape is None or value.dtype is not node.output.dtype:
            continue
        if value.shape == node.output.shape:
            return _become(graph, node, value)
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
        if all(shape is not None for shape in shapes) and broadcast(*(s for s in shapes if s is not None)) == node.output.shape:
            graph.set_input(node, i, source.inputs[0])
            changed = True
    return changed


# -- one spelling ----------------------------------------------------------------------------------------------------


@rule("Div")
def _div(graph: Graph, node: Node) -> bool:
    """x / c is x * (1/c); a / sqrt(b) is a * rsqrt(b)."""
    a, b = node.inputs
    if a is None or b is None or node.output.dtype is None or not node.output.dtype.is_float:
        return False
    if b.constant is not None and b.scalar:
        reciprocal = graph.constant(Array.of(1.0 / b.constant.numpy().astype("float64"), node.output.dtype), "reciprocal")
        return _become(graph, node, _new(graph, node, "Mul", [a, reciprocal]))
    if b.producer is not None and b.producer.is_a("Sqrt"):
        inverse = _new(graph, node, "Rsqrt", [b.producer.inputs[0]], domain=FUSER)
        if a.scalar == 1.0 and inverse.shape == node.output.shape:
            return _become(graph, node, inverse)
        return _become(graph, node, _new(graph, node, "Mul", [a, inverse]))
    if a.scalar == 1.0 and b.shape == node.output.shape:
        return _become(graph, node, _new(graph, node, "Reciprocal", [b]))
    return False


@rule("Reciprocal")
def _reciprocal(graph: Graph, node: Node) -> bool:
    value = node.inputs[0]
    if value is None or value.producer is None or not value.producer.is_a("Sqrt"):
        return False
    return _become(graph, node, _new(graph, node, "Rsqrt", [value.producer.inputs[0]], domain=FUSER))


@rule("Sqrt")
def _sqrt(graph: Graph, node: Node) -> bool:
    """sqrt(1/x) is rsqrt(x)."""
    value = node.inputs[0]
    if value is None or value.producer is None or not value.producer.is_a("Reciprocal"):
        return False
    return _become(graph, node, _new(graph, node, "Rsqrt", [value.producer.inputs[0]], domain=FUSER))


@rule("Pow")
def _pow(graph: Graph, node: Node) -> bool:
    x, exponent = node.inputs
    if x is None or exponent is None or x.shape is None or x.shape != node.output.shape or x.dtype is None or not x.dtype.is_float:
        return False
    power = exponent.scalar
    if power == 1.0:
        return _become(graph, node, x)
    if power == 2.0:
        return _become(graph, node, _new(graph, node, "Mul", [x, x]))
    if power == 3.0:
        return _become(graph, node, _new(graph, node, "Mul", [x, _new(graph, node, "Mul", [x, x])]))
    if power == 0.5:
        return _become(graph, node, _new(graph, node, "Sqrt", [x]))
    return power == -0.5 and _become(graph, node, _new(graph, node, "Rsqrt", [x], domain=FUSER))


@rule("Sub")
def _sub(graph: Graph, node: Node) -> bool:
    """x - c is x + (-c)."""
    a, b = node.inputs
    if a is None or b is None or b.constant is None or b.scalar is None or b.dtype is None or not b.dtype.is_float:
        return False
    negative = graph.constant(Array.of(-b.constant.numpy(), b.dtype), "negative")
    return _become(graph, node, _new(graph, node, "Add", [a, negative]))


@rule("ReduceSumSquare")
def _reduce_sum_square(graph: Graph, node: Node) -> bool:
    value = node.inputs[0]
    return value is not None and _become(graph, node, _new(graph, node, "ReduceSum", [_new(graph, node, "Mul", [value, value]), *node.inputs[1:]], dict(node.attributes)))


@rule("ReduceSum")
def _mean(graph: Graph, node: Node) -> bool:
    """sum(x) * (1/n) is mean(x)."""
    value, axes = node.inputs[0], node.attributes.get("axes")
    if value is None or value.shape is None or not isinstance(axes, tuple) or not node.output.uses or node.output.pinned:
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
    mean = _new(graph, node, "ReduceMean", list(node.inputs), dict(node.attributes))
    for user in node.output.consumers:
        _become(graph, user, mean)
    return True


@rule("Gemm")
def _gemm(graph: Graph, node: Node) -> bool:
    """Gemm is MatMul and Add, like every other linear."""
    a, b, bias = node.input(0), node.input(1), node.input(2)
    scale = node.attributes.get("alpha", 1.0) != 1.0 or (bias is not None and node.attributes.get("beta", 1.0) != 1.0)
    if a is None or b is None or scale or a.dtype is None or not a.dtype.is_float:
        return False
    if node.attributes.get("transA"):
        a = _new(graph, node, "Transpose", [a], {"perm": (1, 0)})
    if node.attributes.get("transB"):
        b = _new(graph, node, "Transpose", [b], {"perm": (1, 0)})
    result = _new(graph, node, "MatMul", [a, b])
    return _become(graph, node, result if bias is None else _new(graph, node, "Add", [result, bias]))


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
    return before[len(before) - kept :] == after[1:] and dims.equal(dims.product(before[: len(before) - kept]), after[0]) is True


@rule("MatMul")
def _flat_matmul(graph: Graph, node: Node) -> bool:
    """Flattening moves below a linear, where it meets the reshape that undoes it."""
    whole, weight = _flattened(node.inputs[0], node), node.inputs[1]
    if whole is None or weight is None or weight.shape is None or len(weight.shape) != 2 or node.output.shape is None:
        return False
    return _become(graph, node, _new(graph, node, "Reshape", [_new(graph, node, "MatMul", [whole, weight])], {"shape": node.output.shape}))


@rule("Add")
def _flat_bias(graph: Graph, node: Node) -> bool:
    for i, bias in ((0, node.inputs[1]), (1, node.inputs[0])):
        whole = _flattened(node.inputs[i], node)
        if whole is not None and bias is not None and bias.shape is not None and len(bias.shape) == 1 and node.output.shape is not None:
            return _become(graph, node, _new(graph, node, "Reshape", [_new(graph, node, "Add", [whole, bias])], {"shape": node.output.shape}))
    return False


@rule("Reshape")
def _lift_unflatten(graph: Graph, node: Node) -> bool:
    """A linear over flattened rows whose result is unflattened works on the unflattened rows."""
    value, shape = node.inputs[0], node.output.shape
    if value is None or value.shape is None or shape is None or len(node.inputs) > 1 or not _sole(value, node):
        return False
    if len(value.shape) != 2 or len(shape) <= 2 or shape[-1] != value.shape[-1]:
        return False
    chain: list[Node] = []
    step = value.producer
    while step is not None and step.is_a("Add") and (at := _bias_at(step)) is not None:
        chain.append(step)
        inner = step.inputs[1 - at]
        step = inner.producer if _sole(inner, step) and inner is not None else None
    weight = step.input(1) if step is not None and step.is_a("MatMul") else None
    if step is None or weight is None or weight.shape is None or len(weight.shape) != 2:
        return False
    rows = step.inputs[0]
    if rows is None or rows.shape is None or len(rows.shape) != 2 or rows.producer is None or not rows.producer.is_a("Reshape"):
        return False
    result = _new(graph, step, "MatMul", [_new(graph, step, "Reshape", [rows], {"shape": (*shape[:-1], rows.shape[-1])}), weight])
    for add in reversed(chain):
        result = _new(graph, add, "Add", [result, add.inputs[_bias_at(add) or 0]])
    return _become(graph, node, result)


def _bias_at(node: Node) -> int | None:
    """Which input of an Add is a bias: one dim, while the other has more."""
    ranks = [None if value is None else value.rank for value in node.inputs]
    return ranks.index(1) if 1 in ranks and ranks.count(1) == 1 else None


@rule(*sorted(UNARY))
def _flat_unary(graph: Graph, node: Node) -> bool:
    whole = _flattened(node.inputs[0], node)
    if whole is None or node.output.shape is None or not _sole(node.inputs[0], node):
        return False
    return _become(graph, node, _new(graph, node, "Reshape", [_new(graph, node, node.op, [whole], dict(node.attributes))], {"shape": node.output.shape}))


# -- sharing ---------------------------------------------------------------------------------------------------------


def _share(graph: Graph) -> int:
    """Makes equal computations one (common subexpressions), and equal small constants one."""
    constants: dict[Any, Value] = {}
    number: dict[int, int] = {}
    shared = 0

    def key_of(value: Value | None) -> Any:
        if value is None or value.constant is None or value.constant.size > CONTENT_LIMIT or value.dtype is DType.STRING:
            return id(value)
        if id(value) not in number:
            data = value.constant.numpy()
            number[id(value)] = id(constants.setdefault((value.dtype, data.shape, data.tobytes()), value))
        return number[id(value)]

    seen: dict[Any, Node] = {}
    for node in list(graph.nodes):
        if node.op in IMPURE or node.carried or node.captures:
            continue
        attributes = tuple((k, id(v) if isinstance(v, Constant) else v) for k, v in sorted(node.attributes.items()))
        key = (node.op, node.domain, attributes, tuple(map(key_of, node.inputs)), len(node.outputs))
        first = seen.setdefault(key, node)
        if first is node or any(value.captured for value in node.outputs):
            continue
        if any(a.is_output and b.is_output for a, b in zip(first.outputs, node.outputs, strict=True)):
            continue
        for old, new in zip(node.outputs, first.outputs, strict=True):
            graph.replace(old, new)
        graph.remove(node)
        shared += 1
    return shared


__all__ = ["canonicalize", "content", "parameter", "quotient", "rule"]
