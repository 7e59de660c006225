"""What small integer tensors hold: the shape arithmetic exporters write, followed as dims.

`Value.content` is a tuple of dims for a vector, one dim for a scalar, Python bools for comparisons of them.
"""

from collections.abc import Callable
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
    dtype = node.output.dtype
    if compute is None or dtype is None or not (dtype.is_integer or dtype is DType.BOOL):
        return None
    found = compute(node)
    return None if isinstance(found, tuple) and len(found) > CONTENT_LIMIT else found


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
    return None if value is None or value.dtype is DType.BOOL else content(value)


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
        left, right = (
            x if isinstance(x, tuple) and len(x) == length else (x[0] if isinstance(x, tuple) else x,) * length
            for x in (a, b)
        )
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
    left, right = (
        x if isinstance(x, tuple) and len(x) == len(chosen) else (x[0] if isinstance(x, tuple) else x,) * len(chosen)
        for x in (a, b)
    )
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
    "Shape": _of_shape, "Size": _of_size, "Identity": _through, "Cast": _of_cast,
    "Gather": _of_gather, "Slice": _of_slice, "Concat": _of_concat, "Unsqueeze": _of_unsqueeze, "Squeeze": _of_squeeze,
    "Reshape": _of_reshape, "Add": _elementwise(dims.add), "Sub": _elementwise(dims.sub), "Mul": _elementwise(dims.mul),
    "Div": _elementwise(_divide), "Max": _elementwise(dims.maximum), "Min": _elementwise(dims.minimum),
    "Equal": _elementwise(dims.equal), "Where": _of_where, "ConstantOfShape": _of_constant_of_shape, "ReduceProd": _of_product,
}  # fmt: skip
