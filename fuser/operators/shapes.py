"""Operators that ask for a shape, change it, or move elements without computing on them."""

import math

import torch
from torch import Tensor

from fuser.errors import FuserError, UnsupportedOperator
from fuser.operators.table import Ints, axis_of, ints, one_int, operator, same_dtype, scalar_like


@operator("Shape")
def shape(x: Tensor, *, start: int = 0, end: int | None = None) -> Tensor:
    return torch.tensor(x.shape[start:end], dtype=torch.int64, device=x.device)


@operator("Size")
def size(x: Tensor) -> Tensor:
    return torch.tensor(x.numel(), dtype=torch.int64, device=x.device)


@operator("Reshape")
def reshape(x: Tensor, shape: Ints, *, allowzero: int = 0) -> Tensor:
    """A 0 keeps the input's dim unless allowzero; one -1 takes what remains.

    Dims that are kept cancel before the rest is divided, so that an empty tensor (no past, say) has a -1 too.
    """
    dims = ints(shape)
    kept = set() if allowzero else {i for i, dim in enumerate(dims) if dim == 0}
    if -1 in dims:
        given = math.prod(dim for i, dim in enumerate(dims) if dim != -1 and i not in kept)
        remaining = math.prod(dim for i, dim in enumerate(x.shape) if i not in kept)
        if not given or remaining % given or dims.count(-1) > 1:
            raise FuserError(f"cannot infer the -1 of {dims} from the shape {list(x.shape)}")
        dims = [remaining // given if dim == -1 else dim for dim in dims]
    return x.reshape([x.shape[i] if i in kept else dim for i, dim in enumerate(dims)])


@operator("Flatten")
def flatten(x: Tensor, *, axis: int = 1) -> Tensor:
    axis = axis + x.dim() if axis < 0 else axis
    return x.reshape(math.prod(x.shape[:axis]), math.prod(x.shape[axis:]))


@operator("Squeeze")
def squeeze(x: Tensor, axes: Ints | None = None) -> Tensor:
    if axes is None:
        return x.squeeze()
    drop = {axis_of(axis, x.dim()) for axis in ints(axes)}
    if any(x.shape[axis] != 1 for axis in drop):
        raise FuserError(f"axes {sorted(drop)} must have size 1, the shape is {list(x.shape)}")
    return x.reshape([dim for axis, dim in enumerate(x.shape) if axis not in drop])


@operator("Unsqueeze")
def unsqueeze(x: Tensor, axes: Ints) -> Tensor:
    """Axes count in the output's rank."""
    added = ints(axes)
    rank = x.dim() + len(added)
    for axis in sorted(axis_of(axis, rank) for axis in added):
        x = x.unsqueeze(axis)
    return x


@operator("Transpose")
def transpose(x: Tensor, *, perm: list[int] | None = None) -> Tensor:
    return x.permute(list(reversed(range(x.dim()))) if perm is None else list(perm))


@operator("Expand")
def expand(x: Tensor, shape: Ints) -> Tensor:
    """Broadcasts both ways: a 1 in `shape` keeps the input's dim."""
    wanted: torch.Size = torch.broadcast_shapes(x.shape, ints(shape))  # type: ignore[no-untyped-call]
    return x.broadcast_to(wanted)


@operator("Tile")
def tile(x: Tensor, repeats: Ints) -> Tensor:
    return x.repeat(ints(repeats))


@operator("Concat")
def concat(*parts: Tensor, axis: int) -> Tensor:
    same_dtype(*parts)
    return torch.cat(parts, axis)


@operator("Split")
def split(
    x: Tensor, split: Ints | None = None, *, axis: int = 0, num_outputs: int | None = None, outputs: int
) -> tuple[Tensor, ...]:
    """By sizes, or into equal parts of which the last may be smaller."""
    if split is not None:
        return torch.split(x, ints(split), axis)
    dim, parts = x.shape[axis], num_outputs or outputs
    if num_outputs is None and dim % parts:
        raise FuserError(f"{dim} does not split into {parts} equal parts; give split or num_outputs")
    chunk = math.ceil(dim / parts)
    sizes = [max(0, min(chunk, dim - i * chunk)) for i in range(parts)]
    return torch.split(x, sizes, axis)


@operator("Slice")
def slice_(x: Tensor, starts: Ints, ends: Ints, axes: Ints | None = None, steps: Ints | None = None) -> Tensor:
    firsts, lasts = ints(starts), ints(ends)
    along = range(len(firsts)) if axes is None else ints(axes)
    strides = [1] * len(firsts) if steps is None else ints(steps)
    for first, last, axis, step in zip(firsts, lasts, along, strides, strict=True):
        axis = axis_of(axis, x.dim())
        first, last, step = slice(first, last, step).indices(x.shape[axis])
        if step > 0:
            x = x[(slice(None),) * axis + (slice(first, max(first, last), step),)]
        else:
            x = x.index_select(axis, torch.arange(first, min(first, last), step, device=x.device))
    return x


@operator("Trilu")
def trilu(x: Tensor, k: Tensor | None = None, *, upper: int = 1) -> Tensor:
    diagonal = 0 if k is None else one_int(k)
    return torch.triu(x, diagonal) if upper else torch.tril(x, diagonal)


@operator("Pad")
def pad(
    x: Tensor,
    pads: Ints,
    value: Tensor | float | None = None,
    axes: Ints | None = None,
    *,
    mode: str = "constant",
) -> Tensor:
    """Negative pads crop. In modes reflect, edge and wrap the padding repeats the data."""
    amounts = ints(pads)
    along = list(range(x.dim())) if axes is None else [axis_of(axis, x.dim()) for axis in ints(axes)]
    befores, afters = amounts[: len(along)], amounts[len(along) :]
    for axis, before, after in zip(along, befores, afters, strict=True):
        dim = x.shape[axis]
        position = torch.arange(-before, dim + after, device=x.device)
        if dim:
            padded = x.index_select(axis, _source(position, dim, mode))
        else:
            padded = x.new_empty([*x.shape[:axis], len(position), *x.shape[axis + 1 :]])
        if mode == "constant":
            outside = ((position < 0) | (position >= dim)).reshape([-1 if i == axis else 1 for i in range(x.dim())])
            padded = torch.where(outside, scalar_like(0.0 if value is None else value, x), padded)
        x = padded
    return x


def _source(position: Tensor, dim: int, mode: str) -> Tensor:
    """The index along an axis of size `dim` that each padded position copies."""
    if mode in ("constant", "edge"):
        return position.clamp(0, dim - 1)
    if mode == "wrap":
        return position % dim
    if mode == "reflect":
        period = max(2 * (dim - 1), 1)
        folded = position % period
        return torch.minimum(folded, period - folded).clamp(max=dim - 1)
    raise UnsupportedOperator(f"mode {mode!r}")
