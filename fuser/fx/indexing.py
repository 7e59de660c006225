"""Gathers, scatters and selection."""

from collections.abc import Sequence

from fuser.dims import Dim, Shape, product
from fuser.dtypes import DType
from fuser.errors import UnsupportedOperator
from fuser.fx.table import At, Number, aten, back, rank
from fuser.graph import Value
from fuser.shapes import broadcast

Indices = Sequence[Value | None]


@aten("embedding.default")
def embedding(
    at: At, weight: Value, indices: Value, padding_idx: int = -1, scale_grad_by_freq: bool = False, sparse: bool = False
) -> Value:
    return at.op("Gather", weight, indices, axis=-rank(weight))


@aten("index_select.default")
def index_select(at: At, x: Value, dim: int, index: Value) -> Value:
    return at.op("Gather", x, index, axis=back(dim, rank(x)))


@aten("gather.default")
def gather(at: At, x: Value, dim: int, index: Value, sparse_grad: bool = False) -> Value:
    return at.op("GatherElements", x, index, axis=back(dim, rank(x)))


@aten("take_along_dim.default")
def take_along_dim(at: At, x: Value, indices: Value, dim: int | None = None) -> Value:
    """Along an axis of what both are broadcast to, or in what both are flattened to."""
    assert x.shape is not None and indices.shape is not None
    if dim is None:
        line = at.op("Reshape", x, shape=(product(x.shape),))
        return at.op("GatherElements", line, at.op("Reshape", indices, shape=at.shape), axis=-1)
    axis, wide = back(dim, rank(x)), list(at.shape)
    wide[axis] = x.shape[axis]
    x = x if x.shape == tuple(wide) else at.op("Expand", x, shape=tuple(wide))
    indices = indices if indices.shape == at.shape else at.op("Expand", indices, shape=at.shape)
    return at.op("GatherElements", x, indices, axis=axis)


@aten("index.Tensor")
def index(at: At, x: Value, indices: Indices) -> Value:
    """numpy's indexing: along one axis a Gather, along several a GatherND of the indices, broadcast together."""
    given = [(axis, i) for axis, i in enumerate(indices) if i is not None]
    if any(i.dtype in (DType.BOOL, DType.UINT8) for _, i in given):
        return _masked(at, x, given)
    axes = [axis for axis, _ in given]
    if len(given) == 1:
        return at.op("Gather", x, given[0][1], axis=back(axes[0], rank(x)))
    adjacent = axes == list(range(axes[0], axes[0] + len(axes)))
    rest = [axis for axis in range(rank(x)) if axis not in axes]
    front = x if axes == list(range(len(axes))) else at.op("Transpose", x, perm=(*axes, *rest))
    chosen = _tuples(at, [i for _, i in given])
    found = at.op("GatherND", front, chosen)
    width = rank(chosen) - 1
    if not adjacent or axes[0] == 0:
        return found
    # What the indices give stands where the first indexed axis stood.
    before = axes[0]
    order = (*range(width, width + before), *range(width), *range(width + before, width + len(rest)))
    return at.op("Transpose", found, perm=order)


def _tuples(at: At, indices: Sequence[Value]) -> Value:
    """Indices into several axes as tuples [..., axes]."""
    shape = _common(indices)
    columns = []
    for i in indices:
        wide = at.cast(i, DType.INT64)
        if wide.shape is None:
            at.settle()
        wide = wide if wide.shape == shape else at.op("Expand", wide, shape=shape)
        columns.append(at.op("Unsqueeze", wide, axes=(len(shape),)))
    joined = at.op("Concat", *columns, axis=-1) if len(columns) > 1 else columns[0]
    at.settle()
    return joined


def _common(indices: Sequence[Value]) -> Shape:
    shapes = [i.shape for i in indices if i.shape is not None]
    found: list[Dim] = []
    for axis, dim in enumerate(broadcast(*shapes)):
        if dim is None:  # equal, as the program was traced
            back_ = axis - max(map(len, shapes))
            dim = next(shape[back_] for shape in shapes if len(shape) >= -back_ and shape[back_] != 1)
        found.append(dim)
    return tuple(found)


def _masked(at: At, x: Value, given: Sequence[tuple[int, Value]]) -> Value:
    """The elements where a mask over the first axes holds."""
    if len(given) != 1 or given[0][0] != 0:
        raise UnsupportedOperator("indexing by a mask over other than the first axes")
    places = at.op("NonZero", at.cast(given[0][1], DType.BOOL))
    return at.op("GatherND", x, at.op("Transpose", places, perm=(1, 0)))


@aten("index_put.default")
def index_put(at: At, x: Value, indices: Indices, values: Value, accumulate: bool = False) -> Value:
    assert x.shape is not None
    given = [(axis, i) for axis, i in enumerate(indices) if i is not None]
    axes = [axis for axis, _ in given]
    first = given[0][1]
    if first.dtype is DType.BOOL:
        if len(given) > 1 or axes != [0] or values.shape not in ((), (1,)) or accumulate:
            raise UnsupportedOperator("writing several values where a mask holds")
        inner = tuple(range(rank(first), rank(x)))
        mask = at.op("Unsqueeze", first, axes=inner) if inner else first
        return at.op("Where", mask, at.cast(values, at.dtype), x)
    rest = [axis for axis in range(rank(x)) if axis not in axes]
    order = (*axes, *rest)
    moved = order != tuple(range(rank(x)))
    adjacent = axes == list(range(axes[0], axes[0] + len(axes)))
    if moved and adjacent and rank(values) > 0:
        raise UnsupportedOperator("writing along axes that are not the first ones")
    front = at.op("Transpose", x, perm=order) if moved else x
    chosen = _tuples(at, [i for _, i in given])
    assert chosen.shape is not None
    updates = at.op("Expand", at.cast(values, at.dtype), shape=(*chosen.shape[:-1], *(x.shape[axis] for axis in rest)))
    written = at.op("ScatterND", front, chosen, updates, reduction="add" if accumulate else "none")
    return at.op("Transpose", written, perm=tuple(order.index(axis) for axis in range(rank(x)))) if moved else written


def _scattered(at: At, x: Value, dim: int, index: Value, updates: Value, reduction: str) -> Value:
    """ONNX wants as many updates as indices; torch ignores those beyond."""
    assert index.shape is not None and updates.shape is not None
    spans = [(axis - rank(index), size) for axis, size in enumerate(index.shape) if updates.shape[axis] != size]
    if spans:
        axes, ends = zip(*spans, strict=True)
        updates = at.op("Slice", updates, starts=(0,) * len(axes), ends=ends, axes=axes, steps=(1,) * len(axes))
    return at.op("ScatterElements", x, index, updates, axis=back(dim, rank(x)), reduction=reduction)


@aten("scatter.src")
def scatter(at: At, x: Value, dim: int, index: Value, src: Value) -> Value:
    return _scattered(at, x, dim, index, src, "none")


@aten("scatter.value")
def scatter_value(at: At, x: Value, dim: int, index: Value, value: Number) -> Value:
    assert index.shape is not None
    filled = at.op("Expand", at.scalar(value, at.dtype), shape=index.shape)
    at.settle()
    return _scattered(at, x, dim, index, filled, "none")


@aten("scatter_add.default")
def scatter_add(at: At, x: Value, dim: int, index: Value, src: Value) -> Value:
    return _scattered(at, x, dim, index, src, "add")


@aten("scatter_reduce.two")
def scatter_reduce(
    at: At, x: Value, dim: int, index: Value, src: Value, reduce: str, include_self: bool = True
) -> Value:  # fmt: skip
    reductions = {"sum": "add", "prod": "mul", "amax": "max", "amin": "min"}
    if reduce not in reductions or not include_self:
        raise UnsupportedOperator(f"scatter_reduce to the {reduce}" + ("" if include_self else " of what is written"))
    return _scattered(at, x, dim, index, src, reductions[reduce])


@aten("index_add.default")
def index_add(at: At, x: Value, dim: int, index: Value, source: Value, alpha: Number = 1) -> Value:
    assert source.shape is not None
    axis = back(dim, rank(x))
    added = source if alpha == 1 else at.op("Mul", source, at.scalar(alpha, at.dtype))
    if axis == -rank(x):
        return at.op("ScatterND", x, at.op("Unsqueeze", index, axes=(1,)), added, reduction="add")
    column = at.op("Unsqueeze", index, axes=tuple(range(1, -axis))) if axis != -1 else index
    everywhere = at.op("Expand", column, shape=source.shape)
    return at.op("ScatterElements", x, everywhere, added, axis=axis, reduction="add")


@aten("nonzero.default")
def nonzero(at: At, x: Value) -> Value:
    return at.op("Transpose", at.op("NonZero", x), perm=(1, 0))


@aten("one_hot.default")
def one_hot(at: At, x: Value, num_classes: int = -1) -> Value:
    if num_classes < 0:
        raise UnsupportedOperator("one_hot of as many classes as there happen to be")
    labels = at.constant(list(range(num_classes)), DType.INT64)
    return at.cast(at.op("Equal", at.op("Unsqueeze", x, axes=(rank(x),)), labels), DType.INT64)
