"""Operators that rearrange, select, reduce or make tensors."""

from collections.abc import Sequence
from typing import Any

from fuser import dims
from fuser.content import FAR, clamp, content, is_absent, parameter, shape_part, slice_bounds
from fuser.dims import Dim, Shape
from fuser.dtypes import DType
from fuser.graph import FUSER, Graph, Node
from fuser.shapes.table import Inferred, axis_of, broadcast, dtype_of, rule, shapes_of


@rule("Transpose")
def _transpose(graph: Graph, node: Node) -> list[Inferred]:
    shapes = shapes_of(node)
    if shapes is None:
        return [(dtype_of(node), None)]
    order = node.attributes.get("perm", range(len(shapes[0]))[::-1])
    return [(dtype_of(node), tuple(shapes[0][i] for i in order))]


@rule("Reshape")
def _reshape(graph: Graph, node: Node) -> list[Inferred]:
    wanted, shapes = parameter(node, "shape", 1), shapes_of(node, 0)
    if wanted is None:
        length = node.input(1)
        rank = length.shape[0] if length is not None and length.shape else None
        return [(dtype_of(node), (None,) * rank if isinstance(rank, int) else None)]
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
    return [(dtype_of(node), result)]


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
    shapes, axes = shapes_of(node, 0), parameter(node, "axes", 1)
    if shapes is None or (axes is None and not is_absent(node, "axes", 1)):
        return [(dtype_of(node), None)]
    shape = shapes[0]
    if axes is None:
        if not all(isinstance(dim, int) for dim in shape):
            return [(dtype_of(node), None)]
        return [(dtype_of(node), tuple(dim for dim in shape if dim != 1))]
    gone = {int(axis) % len(shape) for axis in axes}
    return [(dtype_of(node), tuple(dim for i, dim in enumerate(shape) if i not in gone))]


@rule("Unsqueeze")
def _unsqueeze(graph: Graph, node: Node) -> list[Inferred]:
    shapes, axes = shapes_of(node, 0), parameter(node, "axes", 1)
    if shapes is None or axes is None:
        return [(dtype_of(node), None)]
    rank = len(shapes[0]) + len(axes)
    new = {int(axis) % rank for axis in axes}
    rest = iter(shapes[0])
    return [(dtype_of(node), tuple(1 if i in new else next(rest) for i in range(rank)))]


@rule("Flatten")
def _flatten(graph: Graph, node: Node) -> list[Inferred]:
    shapes = shapes_of(node)
    if shapes is None:
        return [(dtype_of(node), None)]
    axis = axis_of(node, len(shapes[0]), 1)
    return [(dtype_of(node), (dims.product(shapes[0][:axis]), dims.product(shapes[0][axis:])))]


@rule("Concat")
def _concat(graph: Graph, node: Node) -> list[Inferred]:
    shapes = shapes_of(node)
    if shapes is None:
        return [(dtype_of(node), None)]
    axis = axis_of(node, len(shapes[0]), 0)
    total: Dim = 0
    for shape in shapes:
        total = dims.add(total, shape[axis])
    result = [_agree(shape[i] for shape in shapes) for i in range(len(shapes[0]))]
    result[axis] = total
    return [(dtype_of(node), result)]


def _agree(candidates: Any) -> Dim:
    """One of several names for the same size: an int if there is one."""
    found = list(candidates)
    return next((dim for dim in found if isinstance(dim, int)), found[0])


@rule("Split")
def _split(graph: Graph, node: Node) -> list[Inferred]:
    shapes, sizes, count = shapes_of(node, 0), parameter(node, "split", 1), len(node.outputs)
    if shapes is None:
        return [(dtype_of(node), None)] * count
    axis = axis_of(node, len(shapes[0]), 0)
    whole = shapes[0][axis]
    if sizes is None and is_absent(node, "split", 1) and isinstance(whole, int):
        chunk = -(-whole // count)
        sizes = tuple(min(chunk, whole - i * chunk) for i in range(count))
    parts: Sequence[Dim | None] = sizes if sizes is not None else (None,) * count
    return [(dtype_of(node), (*shapes[0][:axis], part, *shapes[0][axis + 1 :])) for part in parts]


@rule("Slice")
def _slice(graph: Graph, node: Node) -> list[Inferred]:
    shapes = shapes_of(node, 0)
    if shapes is None:
        return [(dtype_of(node), None)]
    bounds = slice_bounds(node)
    result: list[Dim | None] = list(shapes[0])
    if bounds is None:
        axes = parameter(node, "axes", 3)
        touched = range(len(result)) if axes is None else [int(axis) % len(result) for axis in axes]
        for axis in touched:
            result[axis] = None
        return [(dtype_of(node), result)]
    for axis, (start, end, step) in bounds.items():
        dim = shapes[0][axis]
        first, last = clamp(start, dim), clamp(end, dim)
        if step == 1:
            result[axis] = None if first is None or last is None else dims.distance(first, last)
        elif isinstance(dim, int) and isinstance(start, int) and isinstance(end, int):
            result[axis] = len(range(*slice(start, end if end > -FAR else None, step).indices(dim)))
        else:
            result[axis] = None
    return [(dtype_of(node), result)]


@rule("Gather")
def _gather(graph: Graph, node: Node) -> list[Inferred]:
    shapes = shapes_of(node)
    if shapes is None:
        return [(dtype_of(node), None)]
    data, indices = shapes
    axis = axis_of(node, len(data), 0)
    return [(dtype_of(node), (*data[:axis], *indices, *data[axis + 1 :]))]


@rule("GatherElements")
def _gather_elements(graph: Graph, node: Node) -> list[Inferred]:
    shapes = shapes_of(node, 1)
    return [(dtype_of(node), shapes[0] if shapes else None)]


@rule("GatherND")
def _gather_nd(graph: Graph, node: Node) -> list[Inferred]:
    shapes = shapes_of(node)
    if shapes is None or not isinstance(shapes[1][-1], int):
        return [(dtype_of(node), None)]
    data, indices = shapes
    batch = int(node.attributes.get("batch_dims", 0))
    return [(dtype_of(node), (*indices[:-1], *data[batch + shapes[1][-1] :]))]


@rule("Expand")
def _expand(graph: Graph, node: Node) -> list[Inferred]:
    wanted, shapes = parameter(node, "shape", 1), shapes_of(node, 0)
    if wanted is None or shapes is None:
        return [(dtype_of(node), None)]
    return [(dtype_of(node), broadcast(shapes[0], tuple(wanted)))]


@rule("Tile")
def _tile(graph: Graph, node: Node) -> list[Inferred]:
    repeats, shapes = parameter(node, "repeats", 1), shapes_of(node, 0)
    if repeats is None or shapes is None:
        return [(dtype_of(node), (None,) * len(shapes[0]) if shapes else None)]
    return [(dtype_of(node), tuple(dims.mul(dim, by) for dim, by in zip(shapes[0], repeats, strict=True)))]


@rule("Shape")
def _shape(graph: Graph, node: Node) -> list[Inferred]:
    shapes = shapes_of(node)
    return [(DType.INT64, (len(shape_part(node, shapes[0])),) if shapes else (None,))]


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
        return [(dtype_of(node), (None,))]
    return [(dtype_of(node), (dims.distance(start, limit),))]


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
    shapes, axes = shapes_of(node, 0), parameter(node, "axes", 1)
    if shapes is None or (axes is None and not is_absent(node, "axes", 1)):
        return [(dtype_of(node), None)]
    shape = shapes[0]
    if not axes and node.attributes.get("noop_with_empty_axes", 0):
        return [(dtype_of(node), shape)]
    gone = {int(axis) % len(shape) for axis in axes} if axes else set(range(len(shape)))
    if node.attributes.get("keepdims", 1):
        return [(dtype_of(node), tuple(1 if i in gone else dim for i, dim in enumerate(shape)))]
    return [(dtype_of(node), tuple(dim for i, dim in enumerate(shape) if i not in gone))]


@rule("ArgMax", "ArgMin")
def _arg_reduce(graph: Graph, node: Node) -> list[Inferred]:
    shapes = shapes_of(node)
    if shapes is None:
        return [(DType.INT64, None)]
    axis, shape = axis_of(node, len(shapes[0]), 0), shapes[0]
    kept: Shape = (1,) if node.attributes.get("keepdims", 1) else ()
    return [(DType.INT64, (*shape[:axis], *kept, *shape[axis + 1 :]))]


@rule("TopK")
def _top_k(graph: Graph, node: Node) -> list[Inferred]:
    shapes, k = shapes_of(node, 0), parameter(node, "k", 1)
    if shapes is None:
        return [(dtype_of(node), None), (DType.INT64, None)]
    axis, shape = axis_of(node, len(shapes[0]), -1), list[Dim | None](shapes[0])
    shape[axis] = k[0] if k else None
    return [(dtype_of(node), shape), (DType.INT64, shape)]
