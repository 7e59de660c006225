"""Operators that move elements without computing on them. Shapes are taken from the result, where no -1 is left."""

from collections.abc import Sequence
from typing import Any

from fuser import dims
from fuser.content import FAR
from fuser.dims import Dim
from fuser.dtypes import DType
from fuser.fx.table import At, Number, aten, axes_of, back, rank
from fuser.graph import Value


def reshaped(at: At, x: Value, shape: Sequence[Dim]) -> Value:
    """`x` in another shape, all of it known; a 0 in it is a size."""
    if 0 in shape:
        return at.op("Reshape", x, shape=tuple(shape), allowzero=1)
    return at.op("Reshape", x, shape=tuple(shape))


@aten(
    "view.default", "reshape.default", "_unsafe_view.default", "flatten.using_ints", "unflatten.int", "view_as.default",
    "reshape_as.default",
)  # fmt: skip
def reshape(at: At, x: Value, *how: Any) -> Value:
    return reshaped(at, x, at.shape)


@aten("unsqueeze.default")
def unsqueeze(at: At, x: Value, dim: int) -> Value:
    """Axes of Unsqueeze count in the result."""
    return at.op("Unsqueeze", x, axes=(dim if dim >= 0 else dim + rank(x) + 1,))


@aten("squeeze.default", "squeeze.dim", "squeeze.dims")
def squeeze(at: At, x: Value, dim: int | Sequence[int] | None = None) -> Value:
    """An axis that is not of size 1 stays."""
    assert x.shape is not None
    axes = tuple(axis for axis in axes_of(dim, rank(x)) if x.shape[axis] == 1)
    return at.op("Squeeze", x, axes=axes) if axes else x


@aten("transpose.int", "swapaxes.default")
def transpose(at: At, x: Value, dim0: int, dim1: int) -> Value:
    order = list(range(rank(x)))
    if order:
        order[dim0], order[dim1] = order[dim1], order[dim0]
    return at.op("Transpose", x, perm=tuple(order))


@aten("permute.default")
def permute(at: At, x: Value, order: Sequence[int]) -> Value:
    return at.op("Transpose", x, perm=tuple(axis % rank(x) for axis in order))


@aten("t.default", "numpy_T.default")
def turned(at: At, x: Value) -> Value:
    return at.op("Transpose", x, perm=tuple(range(rank(x)))[::-1])


@aten("movedim.int")
def movedim(at: At, x: Value, source: int, destination: int) -> Value:
    order = [axis for axis in range(rank(x)) if axis != source % rank(x)]
    order.insert(destination % rank(x), source % rank(x))
    return at.op("Transpose", x, perm=tuple(order))


@aten("expand.default", "expand_as.default", "broadcast_to.default")
def expand(at: At, x: Value, *how: Any, implicit: bool = False) -> Value:
    return at.op("Expand", x, shape=at.shape)


@aten("copy.default")
def copy(at: At, x: Value, source: Value, non_blocking: bool = False) -> Value:
    """What is written over `x` whole."""
    assert x.shape is not None
    source = at.cast(source, at.dtype)
    return source if source.shape == x.shape else at.op("Expand", source, shape=x.shape)


@aten("cat.default", "concat.default")
def cat(at: At, tensors: Sequence[Value], dim: int = 0) -> Value:
    """torch lets a vector of size 0 stand for nothing among tensors of any rank."""
    full = len(at.shape)
    parts = [at.cast(x, at.dtype) for x in tensors if not (x.shape == (0,) and full > 1)]
    return at.op("Concat", *parts, axis=back(dim, full)) if len(parts) > 1 else parts[0]


@aten("stack.default")
def stack(at: At, tensors: Sequence[Value], dim: int = 0) -> Value:
    full = len(at.shape)
    parts = [at.op("Unsqueeze", at.cast(x, at.dtype), axes=(dim % full,)) for x in tensors]
    return at.op("Concat", *parts, axis=back(dim, full))


@aten("split.Tensor", "split_with_sizes.default", "chunk.default", "split.sizes")
def split(at: At, x: Value, how: Any, dim: int = 0) -> Sequence[Value]:
    parts = [at.sizes.of(part.shape[dim]) for part in at.result]
    if len(parts) == 1:
        return [x]
    return at.ops("Split", len(parts), x, axis=back(dim, rank(x)), split=tuple(parts))


@aten("unbind.int")
def unbind(at: At, x: Value, dim: int = 0) -> Sequence[Value]:
    axis, count = back(dim, rank(x)), len(at.result)
    parts = at.ops("Split", count, x, axis=axis, split=(1,) * count) if count > 1 else [x]
    return [at.op("Squeeze", part, axes=(axis,)) for part in parts]


@aten("select.int")
def select(at: At, x: Value, dim: int, index: Dim) -> Value:
    return at.op("Gather", x, at.scalar(index, DType.INT64), axis=back(dim, rank(x)))


def sliced(at: At, x: Value, axis: int, start: Dim, end: Dim, step: int = 1) -> Value:
    return at.op("Slice", x, starts=(start,), ends=(end,), axes=(axis,), steps=(step,))


@aten("slice.Tensor")
def slice_(at: At, x: Value, dim: int = 0, start: Dim | None = None, end: Dim | None = None, step: int = 1) -> Value:
    first, last = 0 if start is None else start, FAR if end is None else end
    if first == 0 and step == 1 and isinstance(last, int) and last >= FAR:
        return x
    return sliced(at, x, back(dim, rank(x)), first, last, step)


@aten("narrow.default")
def narrow(at: At, x: Value, dim: int, start: Dim, length: Dim) -> Value:
    """A start that counts from the end does so for its end as well."""
    assert x.shape is not None
    if isinstance(start, int) and start < 0:
        start = dims.add(x.shape[dim], start)
    return sliced(at, x, back(dim, rank(x)), start, dims.add(start, length))


@aten("slice_scatter.default")
def slice_scatter(
    at: At, x: Value, part: Value, dim: int = 0, start: Dim | None = None, end: Dim | None = None, step: int = 1
) -> Value:
    """What is written, between what is before and after it."""
    assert x.shape is not None and part.shape is not None
    axis, size = back(dim, rank(x)), x.shape[dim]
    first: Dim = 0 if start is None else start
    if isinstance(first, int) and first < 0:
        first = dims.maximum(0, dims.add(size, first))
    last = dims.add(first, dims.mul(step, part.shape[axis]))
    if step != 1:
        places = at.op("Range", *(at.scalar(bound, DType.INT64) for bound in (first, last, step)))
        column = at.op("Unsqueeze", places, axes=tuple(range(1, -axis))) if axis != -1 else places
        everywhere = at.op("Expand", column, shape=part.shape)
        return at.op("ScatterElements", x, everywhere, at.cast(part, at.dtype), axis=axis)
    pieces = [at.cast(part, at.dtype)]
    if first != 0:
        pieces.insert(0, sliced(at, x, axis, 0, first))
    if last != size:
        pieces.append(sliced(at, x, axis, last, FAR))
    return at.op("Concat", *pieces, axis=axis) if len(pieces) > 1 else pieces[0]


@aten("select_scatter.default")
def select_scatter(at: At, x: Value, part: Value, dim: int, index: int) -> Value:
    assert x.shape is not None
    row = at.op("Unsqueeze", part, axes=(dim % rank(x),))
    at.settle()
    first = dims.add(x.shape[dim], index) if index < 0 else index
    return slice_scatter(at, x, row, dim, first)


@aten("repeat.default", "tile.default")
def repeat(at: At, x: Value, repeats: Sequence[Dim]) -> Value:
    times = (1,) * (rank(x) - len(repeats)) + tuple(repeats)
    if all(by == 1 for by in times) and len(times) == rank(x):
        return x
    if len(times) > rank(x):
        x = at.op("Unsqueeze", x, axes=tuple(range(len(times) - rank(x))))
    return at.op("Tile", x, repeats=times)


@aten("repeat_interleave.self_int")
def repeat_interleave(at: At, x: Value, repeats: Dim, dim: int | None = None, output_size: int | None = None) -> Value:
    """Each element as often as said, side by side."""
    assert x.shape is not None
    if dim is None:
        x, dim = reshaped(at, x, (dims.product(x.shape),)), 0
        at.settle()
    assert x.shape is not None
    if repeats == 1:
        return x
    axis = dim % rank(x)
    wide = (*x.shape[: axis + 1], repeats, *x.shape[axis + 1 :])
    apart = at.op("Unsqueeze", x, axes=(axis + 1,))
    return reshaped(at, at.op("Expand", apart, shape=wide), at.shape)


@aten("flip.default")
def flip(at: At, x: Value, dim: Sequence[int]) -> Value:
    axes = tuple(back(axis, rank(x)) for axis in dim)
    if not axes:
        return x
    count = len(axes)
    return at.op("Slice", x, starts=(-1,) * count, ends=(-2 * FAR,) * count, axes=axes, steps=(-1,) * count)


@aten("roll.default")
def roll(at: At, x: Value, shifts: Sequence[Dim], axes: Sequence[int] = ()) -> Value:
    """Without axes, of all elements in a row."""
    assert x.shape is not None
    if not axes:
        line = reshaped(at, x, (dims.product(x.shape),))
        at.settle()
        return reshaped(at, roll(at, line, shifts, (0,)), at.shape)
    for shift, dim in zip(shifts, axes, strict=True):
        assert x.shape is not None
        axis, size = back(dim, rank(x)), dims.maximum(1, x.shape[dim])
        turned = dims.mul(-1, shift)
        cut = dims.sub(turned, dims.mul(size, dims.floordiv(turned, size)))
        if cut != 0:
            x = at.op("Concat", sliced(at, x, axis, cut, FAR), sliced(at, x, axis, 0, cut), axis=axis)
            at.settle()
    return x


def _triangle(at: At, x: Value, diagonal: Dim, upper: int) -> Value:
    """ONNX has no Trilu of booleans in every version of its runtimes; numbers stand for them."""
    return at.op("Trilu", x, at.scalar(diagonal, DType.INT64), upper=upper)


@aten("tril.default")
def tril(at: At, x: Value, diagonal: Dim = 0) -> Value:
    return _triangle(at, x, diagonal, 0)


@aten("triu.default")
def triu(at: At, x: Value, diagonal: Dim = 0) -> Value:
    return _triangle(at, x, diagonal, 1)


@aten("constant_pad_nd.default")
def constant_pad(at: At, x: Value, pad: Sequence[Dim], value: Number = 0) -> Value:
    return _padded(at, x, pad, "constant", value)


@aten("pad.default")
def pad(at: At, x: Value, pad: Sequence[Dim], mode: str = "constant", value: Number | None = None) -> Value:
    modes = {"constant": "constant", "reflect": "reflect", "replicate": "edge", "circular": "wrap"}
    return _padded(at, x, pad, modes[mode], 0 if value is None else value)


def _padded(at: At, x: Value, pads: Sequence[Dim], mode: str, value: Number) -> Value:
    """torch gives (before, after) from the last axis on; ONNX all befores, then all afters."""
    count = len(pads) // 2
    order = [2 * (count - 1 - i) for i in range(count)]
    amounts = at.vector([pads[i] for i in order] + [pads[i + 1] for i in order])
    axes = at.constant(list(range(-count, 0)), DType.INT64)
    fill = at.scalar(value, at.dtype) if mode == "constant" else None
    return at.op("Pad", x, amounts, fill, axes, mode=mode)
