"""Shape, type and content inference: what is known about every value before anything runs.

One rule an operator gives the outputs' dtypes and shapes over symbolic dims. Small integer tensors are followed as
well (`Value.content`), so that what an exporter computes with Shape, Gather and Concat is known as dims. Operators
outside the table fall back to ONNX's own inference, and beyond that stay unknown, which is always safe.
"""

from collections.abc import Callable, Sequence
from typing import Any

import onnx
import sympy

from fuser import dims
from fuser.dims import Dim, Shape
from fuser.dtypes import DType
from fuser.graph import FUSER, MICROSOFT, Graph, Node, Value

Inferred = tuple[DType | None, Sequence[Dim | None] | None]
Rule = Callable[[Graph, Node], list[Inferred]]

RULES: dict[tuple[str, str], Rule] = {}
CONTENT_LIMIT = 64  # elements: longer integer vectors are data, not shapes
FAR = 1 << 31  # a Slice bound at or past this means "to the end"


def rule(*ops: str, domain: str = "") -> Callable[[Rule], Rule]:
    """Registers the inference rule of some operators."""

    def register(function: Rule) -> Rule:
        for op in ops:
            RULES[(domain, op)] = function
        return function

    return register


def infer(graph: Graph) -> None:
    """Infers every value of the graph, in order."""
    for node in graph.nodes:
        infer_node(graph, node)


def infer_node(graph: Graph, node: Node) -> None:
    """Sets dtype, shape and content of a node's outputs from its inputs."""
    found = RULES.get((node.domain, node.op))
    results = found(graph, node) if found else _fallback(graph, node)
    for i, value in enumerate(node.outputs):
        dtype, shape = results[i] if i < len(results) else (None, None)
        if dtype is not None:
            value.dtype = dtype
        if shape is not None:
            _settle(graph, value, shape)
    if len(node.outputs) == 1 and (content := _content_of(node)) is not None:
        node.output.content = content


def _settle(graph: Graph, value: Value, shape: Sequence[Dim | None]) -> None:
    """Gives `value` its shape; a dim nobody can tell becomes a symbol of its own (the same one each time)."""
    before = value.shape if value.shape is not None and len(value.shape) == len(shape) else None
    settled: list[Dim] = []
    for axis, dim in enumerate(shape):
        if dim is None:
            own = dims.symbol(f"{value.name}[{axis}]")
            dim = before[axis] if before else own
            if dim == own:
                graph.dim_sources.setdefault(own, (value, axis))
        settled.append(dim)
    value.shape = tuple(settled)


# -- reading inputs and attributes ---------------------------------------------------------------------------------


def content(value: Value | None) -> Any:
    """The known content of a small integer tensor: a tuple of dims, one dim, or None."""
    if value is None or value.content is not None:
        return None if value is None else value.content
    data = value.constant
    if data is None or not (data.dtype.is_integer or data.dtype is DType.BOOL):
        return None
    if len(data.shape) > 1 or data.size > CONTENT_LIMIT or data.dtype.bits < 8:
        return None
    array = data.numpy()
    value.content = tuple(array.tolist()) if data.shape else array.item()
    return value.content


def parameter(node: Node, name: str, index: int) -> Any:
    """A parameter that is an attribute or, in newer or older opsets, an input; None when absent or unknown."""
    if name in node.attributes:
        return node.attributes[name]
    found = content(node.input(index))
    return found if found is None or isinstance(found, tuple) else (found,)


def is_absent(node: Node, name: str, index: int) -> bool:
    return name not in node.attributes and node.input(index) is None


def axis_of(node: Node, rank: int, default: int) -> int:
    """The node's `axis`, counted from the front."""
    axis = int(node.attributes.get("axis", default))
    return axis + rank if axis < 0 else axis


def broadcast(*shapes: Shape) -> tuple[Dim | None, ...]:
    """Numpy's broadcasting over symbolic dims; None where the result depends on the symbols' values."""
    rank = max(map(len, shapes))
    result: list[Dim | None] = []
    for axis in range(-rank, 0):
        merged: Dim | None = 1
        for shape in shapes:
            if len(shape) < -axis:
                continue
            dim = shape[axis]
            if dim == 1 or dim == merged:
                continue
            if merged == 1:
                merged = dim
            elif merged is None:
                continue
            elif not isinstance(merged, int) and not isinstance(dim, int):
                merged = _one_of(merged, dim)
            elif isinstance(dim, int):
                merged = dim
        result.append(merged)
    return tuple(result)


def _one_of(a: Dim, b: Dim) -> Dim | None:
    """Two sizes that must be equal, or one of them 1: `Min(n, c)` against `n` (a slice of a table of c rows) is n."""
    for clamped, size in ((a, b), (b, a)):
        if isinstance(clamped, sympy.Min) and size in clamped.args and all(x == size or (x.is_Integer and x > 1) for x in clamped.args):
            return size
    return None


def _shapes(node: Node, *indices: int) -> list[Shape] | None:
    found = []
    for i in indices or range(len(node.inputs)):
        value = node.input(i)
        if value is None or value.shape is None:
            return None
        found.append(value.shape)
    return found


def _dtype(node: Node, index: int = 0) -> DType | None:
    value = node.input(index)
    return None if value is None else value.dtype


# -- rules ---------------------------------------------------------------------------------------------------------


@rule(
    "Abs", "Acos", "Acosh", "Asin", "Asinh", "Atan", "Atanh", "BitwiseNot", "Ceil", "Celu", "Clip", "Cos", "Cosh", "CumSum",
    "Elu", "Erf", "Exp", "Floor", "Gelu", "HardSigmoid", "HardSwish", "Hardmax", "Identity", "LeakyRelu", "Log", "LogSoftmax",
    "Mish", "Neg", "Not", "Reciprocal", "Relu", "RMSNormalization", "RotaryEmbedding", "Round", "Selu", "Sigmoid", "Sign",
    "Sin", "Sinh", "Softmax", "Softplus", "Softsign", "Sqrt", "Swish", "Tan", "Tanh", "ThresholdedRelu", "Trilu", "ScatterND",
    "ScatterElements", "Dropout", "SimplifiedLayerNormalization",
)  # fmt: skip
def _same(graph: Graph, node: Node) -> list[Inferred]:
    value = node.inputs[0]
    assert value is not None
    same = (value.dtype, value.shape)
    return [same, (DType.BOOL, value.shape)] if node.op == "Dropout" else [same]


for _op in ("QuickGelu", "Gelu", "FastGelu", "BiasGelu", "RotaryEmbedding"):
    RULES[(MICROSOFT, _op)] = _same
RULES[(FUSER, "Rsqrt")] = _same


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
    shapes = _shapes(node, 0)
    if shapes is None:
        return [(_dtype(node), None)]
    statistics: Shape = (*shapes[0][:-1], 1)
    whole = (_dtype(node), shapes[0])
    return [whole, (DType.FLOAT32, statistics), (DType.FLOAT32, statistics), whole]


RULES[(MICROSOFT, "SkipLayerNormalization")] = _skip_normalization
RULES[(MICROSOFT, "SkipSimplifiedLayerNormalization")] = _skip_normalization


@rule("Add", "Sub", "Mul", "Div", "Pow", "Mod", "BitwiseAnd", "BitwiseOr", "BitwiseXor", "BitShift", "PRelu", "Min", "Max", "Sum", "Mean")
def _broadcasting(graph: Graph, node: Node) -> list[Inferred]:
    shapes = _shapes(node)
    return [(_dtype(node), broadcast(*shapes) if shapes else None)]


@rule("Equal", "Less", "Greater", "LessOrEqual", "GreaterOrEqual", "And", "Or", "Xor", "IsNaN", "IsInf")
def _comparing(graph: Graph, node: Node) -> list[Inferred]:
    shapes = _shapes(node)
    return [(DType.BOOL, broadcast(*shapes) if shapes else None)]


@rule("Where")
def _where(graph: Graph, node: Node) -> list[Inferred]:
    shapes = _shapes(node)
    return [(_dtype(node, 1), broadcast(*shapes) if shapes else None)]


@rule("Cast")
def _cast(graph: Graph, node: Node) -> list[Inferred]:
    shapes = _shapes(node)
    return [(DType.from_onnx(node.attributes["to"]), shapes[0] if shapes else None)]


@rule("CastLike")
def _cast_like(graph: Graph, node: Node) -> list[Inferred]:
    shapes = _shapes(node, 0)
    return [(_dtype(node, 1), shapes[0] if shapes else None)]


@rule("MatMul")
def _matmul(graph: Graph, node: Node) -> list[Inferred]:
    shapes = _shapes(node)
    if shapes is None or not shapes[0] or not shapes[1]:
        return [(_dtype(node), None)]
    a, b = shapes
    batch = broadcast(a[:-2], b[:-2]) if a[:-2] or b[:-2] else ()
    rows = a[-2:-1] if len(a) > 1 else ()
    columns = b[-1:] if len(b) > 1 else ()
    return [(_dtype(node), (*batch, *rows, *columns))]


@rule("Gemm")
def _gemm(graph: Graph, node: Node) -> list[Inferred]:
    shapes = _shapes(node, 0, 1)
    if shapes is None:
        return [(_dtype(node), None)]
    rows = shapes[0][1 if node.attributes.get("transA") else 0]
    columns = shapes[1][0 if node.attributes.get("transB") else 1]
    return [(_dtype(node), (rows, columns))]


@rule("Transpose")
def _transpose(graph: Graph, node: Node) -> list[Inferred]:
    shapes = _shapes(node)
    if shapes is None:
        return [(_dtype(node), None)]
    order = node.attributes.get("perm", range(len(shapes[0]))[::-1])
    return [(_dtype(node), tuple(shapes[0][i] for i in order))]


@rule("Reshape")
def _reshape(graph: Graph, node: Node) -> list[Inferred]:
    wanted, shapes = parameter(node, "shape", 1), _shapes(node, 0)
    if wanted is None:
        length = node.input(1)
        rank = length.shape[0] if length is not None and length.shape else None
        return [(_dtype(node), (None,) * rank if isinstance(rank, int) else None)]
    allow_zero = node.attributes.get("allowzero", 0)
    result: list[Dim | None] = []
    for axis, dim in enumerate(wanted):
        if dim == 0 and not allow_zero:
            result.append(shapes[0][axis] if shapes else None)
        else:
            result.append(None if dim == -1 else dim)
    if -1 in wanted and shapes:
        at = wanted.index(-1)
        rest = [dim for axis, dim in enumerate(result) if axis != at]
        if all(dim is not None for dim in rest):
            result[at] = quotient(shapes[0], [dim for dim in rest if dim is not None])
    return [(_dtype(node), result)]


def quotient(whole: Sequence[Dim], part: Sequence[Dim]) -> Dim | None:
    """product(whole) / product(part) with equal factors cancelled first; None where it is not exact."""
    numerator, denominator = list(whole), []
    for dim in part:
        if dim in numerator:
            numerator.remove(dim)
        else:
            denominator.append(dim)
    below = dims.product(denominator)
    if below == 0:
        return None
    result = dims.floordiv(dims.product(numerator), below)
    return result if dims.equal(dims.mul(result, below), dims.product(numerator)) else None


@rule("Squeeze")
def _squeeze(graph: Graph, node: Node) -> list[Inferred]:
    shapes, axes = _shapes(node, 0), parameter(node, "axes", 1)
    if shapes is None or (axes is None and not is_absent(node, "axes", 1)):
        return [(_dtype(node), None)]
    shape = shapes[0]
    if axes is None:
        if not all(isinstance(dim, int) for dim in shape):
            return [(_dtype(node), None)]
        return [(_dtype(node), tuple(dim for dim in shape if dim != 1))]
    gone = {int(axis) % len(shape) for axis in axes}
    return [(_dtype(node), tuple(dim for i, dim in enumerate(shape) if i not in gone))]


@rule("Unsqueeze")
def _unsqueeze(graph: Graph, node: Node) -> list[Inferred]:
    shapes, axes = _shapes(node, 0), parameter(node, "axes", 1)
    if shapes is None or axes is None:
        return [(_dtype(node), None)]
    rank = len(shapes[0]) + len(axes)
    new = {int(axis) % rank for axis in axes}
    rest = iter(shapes[0])
    return [(_dtype(node), tuple(1 if i in new else next(rest) for i in range(rank)))]


@rule("Flatten")
def _flatten(graph: Graph, node: Node) -> list[Inferred]:
    shapes = _shapes(node)
    if shapes is None:
        return [(_dtype(node), None)]
    axis = axis_of(node, len(shapes[0]), 1)
    return [(_dtype(node), (dims.product(shapes[0][:axis]), dims.product(shapes[0][axis:])))]


@rule("Concat")
def _concat(graph: Graph, node: Node) -> list[Inferred]:
    shapes = _shapes(node)
    if shapes is None:
        return [(_dtype(node), None)]
    axis = axis_of(node, len(shapes[0]), 0)
    total: Dim = 0
    for shape in shapes:
        total = dims.add(total, shape[axis])
    result = [_agree(shape[i] for shape in shapes) for i in range(len(shapes[0]))]
    result[axis] = total
    return [(_dtype(node), result)]


def _agree(candidates: Any) -> Dim:
    """One of several names for the same size: an int if there is one."""
    found = list(candidates)
    return next((dim for dim in found if isinstance(dim, int)), found[0])


@rule("Split")
def _split(graph: Graph, node: Node) -> list[Inferred]:
    shapes, sizes, count = _shapes(node, 0), parameter(node, "split", 1), len(node.outputs)
    if shapes is None:
        return [(_dtype(node), None)] * count
    axis = axis_of(node, len(shapes[0]), 0)
    whole = shapes[0][axis]
    if sizes is None and is_absent(node, "split", 1) and isinstance(whole, int):
        chunk = -(-whole // count)
        sizes = tuple(min(chunk, whole - i * chunk) for i in range(count))
    parts: Sequence[Dim | None] = sizes if sizes is not None else (None,) * count
    return [(_dtype(node), (*shapes[0][:axis], part, *shapes[0][axis + 1 :])) for part in parts]


@rule("Slice")
def _slice(graph: Graph, node: Node) -> list[Inferred]:
    shapes = _shapes(node, 0)
    if shapes is None:
        return [(_dtype(node), None)]
    bounds = slice_bounds(node)
    result: list[Dim | None] = list(shapes[0])
    if bounds is None:
        axes = parameter(node, "axes", 3)
        touched = range(len(result)) if axes is None else [int(axis) % len(result) for axis in axes]
        for axis in touched:
            result[axis] = None
        return [(_dtype(node), result)]
    for axis, (start, end, step) in bounds.items():
        dim = shapes[0][axis]
        first, last = clamp(start, dim), clamp(end, dim)
        if step == 1:
            length = dims.sub(last, first)
            result[axis] = max(0, length) if isinstance(length, int) else length
        elif isinstance(dim, int) and isinstance(start, int) and isinstance(end, int):
            result[axis] = len(range(*slice(start, end if end > -FAR else None, step).indices(dim)))
        else:
            result[axis] = None
    return [(_dtype(node), result)]


def slice_bounds(node: Node) -> dict[int, tuple[Dim, Dim, int]] | None:
    """axis -> (start, end, step) of a Slice whose parameters are known; axes are counted from the front."""
    value = node.inputs[0]
    starts, ends = parameter(node, "starts", 1), parameter(node, "ends", 2)
    if starts is None or ends is None or value is None or value.shape is None:
        return None
    axes = tuple(range(len(starts))) if is_absent(node, "axes", 3) else parameter(node, "axes", 3)
    steps = (1,) * len(starts) if is_absent(node, "steps", 4) else parameter(node, "steps", 4)
    if axes is None or steps is None:
        return None
    rank = len(value.shape)
    return {int(a) % rank: (s, e, int(t)) for a, s, e, t in zip(axes, starts, ends, steps, strict=True)}


def clamp(bound: Dim, dim: Dim) -> Dim:
    """A Slice bound as a position in [0, dim]."""
    if isinstance(bound, int):
        if bound >= FAR:
            return dim
        if bound < 0:
            from_end = dims.add(dim, max(bound, -FAR))
            return max(0, from_end) if isinstance(from_end, int) else (0 if bound <= -FAR else from_end)
        return 0 if bound == 0 else dims.minimum(bound, dim)
    if dims.equal(bound, dim) or getattr(dims.sub(dim, bound), "is_nonnegative", False):
        return bound
    return dims.minimum(bound, dim)


@rule("Gather")
def _gather(graph: Graph, node: Node) -> list[Inferred]:
    shapes = _shapes(node)
    if shapes is None:
        return [(_dtype(node), None)]
    data, indices = shapes
    axis = axis_of(node, len(data), 0)
    return [(_dtype(node), (*data[:axis], *indices, *data[axis + 1 :]))]


@rule("GatherElements")
def _gather_elements(graph: Graph, node: Node) -> list[Inferred]:
    shapes = _shapes(node, 1)
    return [(_dtype(node), shapes[0] if shapes else None)]


@rule("GatherND")
def _gather_nd(graph: Graph, node: Node) -> list[Inferred]:
    shapes = _shapes(node)
    if shapes is None or not isinstance(shapes[1][-1], int):
        return [(_dtype(node), None)]
    data, indices = shapes
    batch = int(node.attributes.get("batch_dims", 0))
    return [(_dtype(node), (*indices[:-1], *data[batch + shapes[1][-1] :]))]


@rule("Expand")
def _expand(graph: Graph, node: Node) -> list[Inferred]:
    wanted, shapes = parameter(node, "shape", 1), _shapes(node, 0)
    if wanted is None or shapes is None:
        return [(_dtype(node), None)]
    return [(_dtype(node), broadcast(shapes[0], tuple(wanted)))]


@rule("Tile")
def _tile(graph: Graph, node: Node) -> list[Inferred]:
    repeats, shapes = parameter(node, "repeats", 1), _shapes(node, 0)
    if repeats is None or shapes is None:
        return [(_dtype(node), (None,) * len(shapes[0]) if shapes else None)]
    return [(_dtype(node), tuple(dims.mul(dim, by) for dim, by in zip(shapes[0], repeats, strict=True)))]


@rule("Shape")
def _shape(graph: Graph, node: Node) -> list[Inferred]:
    shapes = _shapes(node)
    return [(DType.INT64, (len(_shape_part(node, shapes[0])),) if shapes else (None,))]


def _shape_part(node: Node, shape: Shape) -> Shape:
    return shape[slice(node.attributes.get("start", 0), node.attributes.get("end"))]


@rule("Constant")
def _constant(graph: Graph, node: Node) -> list[Inferred]:
    kinds = {"value_float": (DType.FLOAT32, ()), "value_int": (DType.INT64, ())}
    return [next((kinds[name] for name in node.attributes if name in kinds), (None, None))]


@rule("Size")
def _size(graph: Graph, node: Node) -> list[Inferred]:
    return [(DType.INT64, ())]


@rule("Dims", domain=FUSER)
def _dims(graph: Graph, node: Node) -> list[Inferred]:
    found = node.attributes["dims"]
    return [(DType.INT64, (len(found),) if isinstance(found, tuple) else ())]


@rule("Range")
def _range(graph: Graph, node: Node) -> list[Inferred]:
    start, limit, step = (content(node.input(i)) for i in range(3))
    if start is None or limit is None or step != 1:
        return [(_dtype(node), (None,))]
    return [(_dtype(node), (dims.sub(limit, start),))]


@rule("ConstantOfShape")
def _constant_of_shape(graph: Graph, node: Node) -> list[Inferred]:
    value = node.attributes.get("value")
    dtype = DType.FLOAT32 if value is None else value.dtype
    return [(dtype, parameter(node, "shape", 0))]


@rule(
    "ReduceMean", "ReduceSum", "ReduceMax", "ReduceMin", "ReduceProd", "ReduceL1", "ReduceL2", "ReduceSumSquare",
    "ReduceLogSum", "ReduceLogSumExp",
)  # fmt: skip
def _reduce(graph: Graph, node: Node) -> list[Inferred]:
    shapes, axes = _shapes(node, 0), parameter(node, "axes", 1)
    if shapes is None or (axes is None and not is_absent(node, "axes", 1)):
        return [(_dtype(node), None)]
    shape = shapes[0]
    if not axes and node.attributes.get("noop_with_empty_axes", 0):
        return [(_dtype(node), shape)]
    gone = {int(axis) % len(shape) for axis in axes} if axes else set(range(len(shape)))
    if node.attributes.get("keepdims", 1):
        return [(_dtype(node), tuple(1 if i in gone else dim for i, dim in enumerate(shape)))]
    return [(_dtype(node), tuple(dim for i, dim in enumerate(shape) if i not in gone))]


@rule("ArgMax", "ArgMin")
def _arg_reduce(graph: Graph, node: Node) -> list[Inferred]:
    shapes = _shapes(node)
    if shapes is None:
        return [(DType.INT64, None)]
    axis, shape = axis_of(node, len(shapes[0]), 0), shapes[0]
    kept: Shape = (1,) if node.attributes.get("keepdims", 1) else ()
    return [(DType.INT64, (*shape[:axis], *kept, *shape[axis + 1 :]))]


@rule("TopK")
def _top_k(graph: Graph, node: Node) -> list[Inferred]:
    shapes, k = _shapes(node, 0), parameter(node, "k", 1)
    if shapes is None:
        return [(_dtype(node), None), (DType.INT64, None)]
    axis, shape = axis_of(node, len(shapes[0]), -1), list[Dim | None](shapes[0])
    shape[axis] = k[0] if k else None
    return [(_dtype(node), shape), (DType.INT64, shape)]


@rule("Attention")
def _attention(graph: Graph, node: Node) -> list[Inferred]:
    shapes = _shapes(node, 0, 1, 2)
    if shapes is None:
        return [(_dtype(node), None)] * 4
    q, k, v = shapes
    past = node.input(4)
    if len(q) == 3:
        heads, groups = node.attributes["q_num_heads"], node.attributes["kv_num_heads"]
        width = dims.floordiv(v[2], groups)
        result: tuple[Dim | None, ...] = (q[0], q[1], dims.mul(heads, width))
        new, key_width = k[1], dims.floordiv(k[2], groups)
    else:
        heads, groups, width = q[1], k[1], v[3]
        result = (q[0], heads, q[2], width)
        new, key_width = k[2], k[3]
    length: Dim | None = new
    if past is not None:
        length = dims.add(past.shape[2], new) if past.shape is not None else None
    rows = q[1] if len(q) == 3 else q[2]
    return [
        (_dtype(node), result),
        (_dtype(node), (q[0], groups, length, key_width)),
        (_dtype(node), (q[0], groups, length, width)),
        (_dtype(node), (q[0], heads, rows, length)),
    ]


def _fallback(graph: Graph, node: Node) -> list[Inferred]:
    """ONNX's own inference for a standard operator, with every symbolic dim passed through by name."""
    from fuser.onnx_nodes import node_proto  # the exporter's spelling; imported late to keep the layers apart

    if node.domain or node.captures or any(v is not None and (v.dtype is None or v.shape is None) for v in node.inputs):
        return []
    names: dict[str, Dim] = {}
    types: dict[str, onnx.TypeProto] = {}
    data: dict[str, onnx.TensorProto] = {}
    for value in node.inputs:
        if value is None or value.shape is None or value.dtype is None:
            continue
        named: list[int | str] = []
        for dim in value.shape:
            names[str(dim)] = dim
            named.append(dim if isinstance(dim, int) else str(dim))
        types[value.name] = onnx.helper.make_tensor_type_proto(value.dtype.onnx, named)
        if value.constant is not None and value.constant.size <= CONTENT_LIMIT:
            data[value.name] = onnx.numpy_helper.from_array(value.constant.numpy(), value.name)
    try:
        schema = onnx.defs.get_schema(node.op, graph.opset, node.domain)
        found = onnx.shape_inference.infer_node_outputs(
            schema, node_proto(node), types, data, opset_imports=[onnx.helper.make_opsetid("", graph.opset)]
        )
    except (onnx.defs.SchemaError, onnx.shape_inference.InferenceError, ValueError, RuntimeError):
        return []
    results: list[Inferred] = []
    for value in node.outputs:
        tensor = found[value.name].tensor_type if value.name in found else None
        if tensor is None or not tensor.elem_type:
            results.append((None, None))
            continue
        shape: list[Dim | None] | None = None
        if tensor.HasField("shape"):
            shape = [d.dim_value if d.HasField("dim_value") else names.get(d.dim_param) for d in tensor.shape.dim]
        results.append((DType.from_onnx(tensor.elem_type), shape))
    return results


# -- content: integer arithmetic on dims ---------------------------------------------------------------------------


def _content_of(node: Node) -> Any:
    """The content of a node's only output where its inputs' contents tell it."""
    if node.domain == FUSER:
        return node.attributes["dims"] if node.op == "Dims" else None
    compute = _CONTENT.get(node.op) if not node.domain else None
    dtype = node.output.dtype
    if compute is None or dtype is None or not (dtype.is_integer or dtype is DType.BOOL):
        return None
    found = compute(node)
    return None if isinstance(found, tuple) and len(found) > CONTENT_LIMIT else found


def _of_shape(node: Node) -> Any:
    value = node.inputs[0]
    return None if value is None or value.shape is None else _shape_part(node, value.shape)


def _of_size(node: Node) -> Any:
    value = node.inputs[0]
    return None if value is None or value.shape is None else dims.product(value.shape)


def _through(node: Node) -> Any:
    return content(node.inputs[0])


def _of_gather(node: Node) -> Any:
    data, indices = content(node.inputs[0]), content(node.inputs[1])
    if not isinstance(data, tuple) or indices is None:
        return None
    if isinstance(indices, tuple):
        return tuple(data[i] for i in indices) if all(_within(i, data) for i in indices) else None
    return data[indices] if _within(indices, data) else None


def _within(index: Any, data: tuple[Any, ...]) -> bool:
    return isinstance(index, int) and -len(data) <= index < len(data)


def _of_slice(node: Node) -> Any:
    data, bounds = content(node.inputs[0]), slice_bounds(node)
    if not isinstance(data, tuple) or bounds is None or set(bounds) != {0}:
        return None
    start, end, step = bounds[0]
    return data[slice(start, end, step)] if isinstance(start, int) and isinstance(end, int) else None


def _of_concat(node: Node) -> Any:
    parts = [content(value) for value in node.inputs]
    return sum(parts, ()) if all(isinstance(part, tuple) for part in parts) else None


def _of_unsqueeze(node: Node) -> Any:
    found, axes = content(node.inputs[0]), parameter(node, "axes", 1)
    return (found,) if found is not None and not isinstance(found, tuple) and axes in ((0,), (-1,)) else None


def _of_squeeze(node: Node) -> Any:
    found = content(node.inputs[0])
    return found[0] if isinstance(found, tuple) and len(found) == 1 else None


def _of_reshape(node: Node) -> Any:
    found, shape = content(node.inputs[0]), node.output.shape
    if found is None or shape is None or len(shape) > 1:
        return None
    flat = found if isinstance(found, tuple) else (found,)
    return flat if shape else flat[0]


def _elementwise(function: Callable[[Any, Any], Any]) -> Callable[[Node], Any]:
    def compute(node: Node) -> Any:
        a, b = content(node.inputs[0]), content(node.inputs[1])
        if a is None or b is None:
            return None
        if not isinstance(a, tuple) and not isinstance(b, tuple):
            return function(a, b)
        length = max(len(x) for x in (a, b) if isinstance(x, tuple))
        left, right = (x if isinstance(x, tuple) and len(x) == length else (x[0] if isinstance(x, tuple) else x,) * length for x in (a, b))
        results = tuple(function(x, y) for x, y in zip(left, right, strict=True))
        return None if any(x is None for x in results) else results

    return compute


def _divide(a: Any, b: Any) -> Any:
    # Truncation and floor differ below zero; sizes are not negative, other integers are left to constant folding.
    if isinstance(a, int) and (a < 0 or (isinstance(b, int) and b < 0)):
        return None
    return None if b == 0 else dims.floordiv(a, b)


def _of_where(node: Node) -> Any:
    chosen, a, b = (content(node.inputs[i]) for i in range(3))
    if not isinstance(chosen, tuple):
        return (a if chosen else b) if isinstance(chosen, bool) else None
    if any(x is None for x in (a, b)):
        return None
    left, right = (x if isinstance(x, tuple) and len(x) == len(chosen) else (x[0] if isinstance(x, tuple) else x,) * len(chosen) for x in (a, b))
    return tuple(x if c else y for c, x, y in zip(chosen, left, right, strict=True))


def _of_constant_of_shape(node: Node) -> Any:
    shape, value = parameter(node, "shape", 0), node.attributes.get("value")
    if shape is None or value is None or len(shape) > 1 or value.scalar is None:
        return None
    fill = bool(value.scalar) if value.dtype is DType.BOOL else int(value.scalar)
    if not shape:
        return fill
    return (fill,) * shape[0] if isinstance(shape[0], int) and shape[0] <= CONTENT_LIMIT else None


def _of_product(node: Node) -> Any:
    found = content(node.inputs[0])
    return dims.product(found) if isinstance(found, tuple) and node.output.shape == () else None


_CONTENT: dict[str, Callable[[Node], Any]] = {
    "Shape": _of_shape, "Size": _of_size, "Identity": _through, "Cast": lambda n: _through(n) if _dtype(n) is not DType.BOOL else None,
    "Gather": _of_gather, "Slice": _of_slice, "Concat": _of_concat, "Unsqueeze": _of_unsqueeze, "Squeeze": _of_squeeze,
    "Reshape": _of_reshape, "Add": _elementwise(dims.add), "Sub": _elementwise(dims.sub), "Mul": _elementwise(dims.mul),
    "Div": _elementwise(_divide), "Max": _elementwise(dims.maximum), "Min": _elementwise(dims.minimum),
    "Equal": _elementwise(dims.equal), "Where": _of_where, "ConstantOfShape": _of_constant_of_shape, "ReduceProd": _of_product,
}  # fmt: skip
