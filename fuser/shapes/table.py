"""The table of inference rules, and applying it to a node."""

from collections.abc import Callable, Sequence

import onnx
import sympy

from fuser import dims
from fuser.content import CONTENT_LIMIT, content_of, split_contents
from fuser.dims import Dim, Shape
from fuser.dtypes import DType
from fuser.errors import InputError
from fuser.graph import Graph, Node, Value

# What Python raises when a node's inputs or attributes are not what its operator takes.
MISFITS = (ArithmeticError, AttributeError, IndexError, KeyError, TypeError, ValueError)

Inferred = tuple[DType | None, Sequence[Dim | None] | None]
Rule = Callable[[Graph, Node], list[Inferred]]

RULES: dict[tuple[str, str], Rule] = {}


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
    infer_one = RULES.get((node.domain, node.op))
    try:
        results = infer_one(graph, node) if infer_one else _fallback(graph, node)
        for i, value in enumerate(node.outputs):
            dtype, shape = results[i] if i < len(results) else (None, None)
            if dtype is not None:
                value.dtype = dtype
            if shape is not None:
                _settle(graph, value, shape)
        contents = (
            split_contents(node) if node.is_a("Split") else (content_of(node),) if len(node.outputs) == 1 else None
        )
    except MISFITS as error:
        raise InputError(f"{node.op} '{node.name}' does not fit its inputs: {node} ({error})") from error
    for value, found in zip(node.outputs, contents or (), strict=False):
        if found is not None:
            value.content = found


def _settle(graph: Graph, value: Value, shape: Sequence[Dim | None]) -> None:
    """Gives `value` its shape; a dim nobody can tell becomes a symbol of its own (the same one each time)."""
    before = value.shape if value.shape is not None and len(value.shape) == len(shape) else None
    settled: list[Dim] = []
    for axis, dim in enumerate(shape):
        if dim is None:
            own = dims.symbol(f"{value.name}[{axis}]")
            dim = before[axis] if before else own
            if dim == own:
                graph.define(own, value, axis)
        elif before and before[axis] != dim and graph.dim_sources.get(before[axis]) == (value, axis):
            found = dims.replace(dim, graph.learned)
            if before[axis] not in dims.symbols([found]):
                graph.learned[before[axis]] = found
        settled.append(dim)
    value.shape = tuple(settled)


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
        if (
            isinstance(clamped, sympy.Min)
            and size in clamped.args
            and all(x == size or (x.is_Integer and x > 1) for x in clamped.args)
        ):
            return size
    return None


def shapes_of(node: Node, *indices: int) -> list[Shape] | None:
    found = []
    for i in indices or range(len(node.inputs)):
        value = node.input(i)
        if value is None or value.shape is None:
            return None
        found.append(value.shape)
    return found


def dtype_of(node: Node, index: int = 0) -> DType | None:
    value = node.input(index)
    return None if value is None else value.dtype


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
        if value.constant is not None and value.constant.size <= CONTENT_LIMIT and value.constant.is_known:
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
