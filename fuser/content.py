"""What small integer tensors hold: the shape arithmetic exporters write, followed as dims.

`Value.content` is a tuple of dims for a vector, one dim for a scalar, Python bools for comparisons of them.
"""

from collections.abc import Callable
from functools import reduce
from typing import Any

from fuser import dims
from fuser.dims import Dim, Shape
from fuser.dtypes import DType
from fuser.graph import FUSER, Node, Value

CONTENT_LIMIT = 64  # elements: longer integer vectors are data, not shapes
FAR = 1 << 31  # a Slice bound at or past this means "to the end"


def content(value: Value | None) -> Any:
    """The known content of a small integer tensor: a tuple of dims, one dim, or None."""
    if value is None or value.content is not None:
        return None if value is None else value.content
    data = value.constant
    if data is None or not (data.dtype.is_integer or data.dtype is DType.BOOL):
        return None
    if len(data.shape) > 1 or data.size > CONTENT_LIMIT or data.dtype.bits < 8 or not data.is_known:
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


def clamp(bound: Dim, dim: Dim) -> Dim | None:
    """A Slice bound as a position in [0, dim]; None where it depends on sizes whether it counts from the end."""
    if isinstance(bound, int):
        if bound >= FAR:
            return dim
        if bound < 0:
            return 0 if bound <= -FAR else dims.maximum(0, dims.add(dim, bound))
        return 0 if bound == 0 else dims.minimum(bound, dim)
    if not dims.nonnegative(bound):
        return None
    return bound if dims.nonnegative(dims.sub(dim, bound)) else dims.minimum(bound, dim)


def shape_part(node: Node, shape: Shape) -> Shape:
    return shape[slice(node.attributes.get("start", 0), node.attributes.get("end"))]


def split_contents(node: Node) -> tuple[Any, ...] | None:
    """The contents of a Split's outputs, where a known vector is split at known places."""
    whole, sizes = content(node.inputs[0]), parameter(node, "split", 1)
    if not isinstance(whole, tuple) or sizes is None or not all(isinstance(size, int) for size in sizes):
        return None
    ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
    return tuple(whole[end - size : end] for end, size in zip(ends, sizes, strict=True))


def content_of(node: Node) -> Any:
    """The content of a node's only output where its inputs' contents tell it."""
    if node.domain == FUSER:
        return node.attributes["dims"] if node.op == "Dims" else None
    compute = _CONTENT.get(node.op) if not node.domain else None
    if compute is None or node.output.dtype not in _LIMITS:
        return None
    found = compute(node)
    items = found if isinstance(found, tuple) else (found,)
    low, high = _LIMITS[node.output.dtype]
    if len(items) > CONTENT_LIMIT or any(isinstance(item, int) and not low <= item <= high for item in items):
        return None
    return found


# The types shapes are computed in. Numbers past a type's limits wrap around, which is left to constant folding.
_LIMITS = {DType.INT64: (-(1 << 63), (1 << 63) - 1), DType.INT32: (-(1 << 31), (1 << 31) - 1), DType.BOOL: (0, 1)}


def _of_shape(node: Node) -> Any:
    value = node.inputs[0]
    return None if value is None or value.shape is None else shape_part(node, value.shape)


def _of_size(node: Node) -> Any:
    value = node.inputs[0]
    return None if value is None or value.shape is None else dims.product(value.shape)


def _through(node: Node) -> Any:
    return content(node.inputs[0])


def _of_cast(node: Node) -> Any:
    value = node.inputs[0]
    return None if value is None or DType.BOOL in (value.dtype, node.output.dtype) else content(value)


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


def _broadcast(*operands: Any) -> list[tuple[Any, ...]] | None:
    """Contents broadcast to one length, element by element; None where one is not known."""
    if any(operand is None for operand in operands):
        return None
    vectors = [operand if isinstance(operand, tuple) else (operand,) for operand in operands]
    lengths = {len(vector) for vector in vectors} - {1}
    length = lengths.pop() if lengths else 1
    return None if lengths else list(zip(*(v if len(v) == length else v * length for v in vectors), strict=True))


def _elementwise(function: Callable[[Any, Any], Any]) -> Callable[[Node], Any]:
    def compute(node: Node) -> Any:
        operands = [content(value) for value in node.inputs]
        rows = _broadcast(*operands)
        if rows is None:
            return None
        results = tuple(reduce(lambda a, b: None if a is None else function(a, b), row) for row in rows)
        if any(result is None for result in results):
            return None
        return results if any(isinstance(operand, tuple) for operand in operands) else results[0]

    return compute


def _divide(a: Any, b: Any) -> Any:
    # Truncation and floor differ below zero; sizes are not negative, other integers are left to constant folding.
    return dims.floordiv(a, b) if dims.nonnegative(a) and dims.nonnegative(b) and b != 0 else None


def _of_where(node: Node) -> Any:
    operands = [content(node.inputs[i]) for i in range(3)]
    rows = _broadcast(*operands)
    if rows is None or not all(isinstance(row[0], bool) for row in rows):
        return None
    results = tuple(a if chosen else b for chosen, a, b in rows)
    return results if any(isinstance(operand, tuple) for operand in operands) else results[0]


def _of_constant_of_shape(node: Node) -> Any:
    shape, value = parameter(node, "shape", 0), node.attributes.get("value")
    if shape is None or value is None or len(shape) > 1 or value.size != 1:
        return None
    fill = value.numpy().reshape(()).item()
    if not shape:
        return fill
    return (fill,) * shape[0] if isinstance(shape[0], int) and shape[0] <= CONTENT_LIMIT else None


def _of_product(node: Node) -> Any:
    found = content(node.inputs[0])
    return dims.product(found) if isinstance(found, tuple) and node.output.shape == () else None


_CONTENT: dict[str, Callable[[Node], Any]] = {
    "Shape": _of_shape, "Size": _of_size, "Identity": _through, "Cast": _of_cast,
    "Gather": _of_gather, "Slice": _of_slice, "Concat": _of_concat, "Unsqueeze": _of_unsqueeze, "Squeeze": _of_squeeze,
    "Reshape": _of_reshape, "Add": _elementwise(dims.add), "Sub": _elementwise(dims.sub), "Mul": _elementwise(dims.mul),
    "Div": _elementwise(_divide), "Max": _elementwise(dims.maximum), "Min": _elementwise(dims.minimum),
    "Equal": _elementwise(dims.equal), "Where": _of_where, "ConstantOfShape": _of_constant_of_shape, "ReduceProd": _of_product,
}  # fmt: skip
