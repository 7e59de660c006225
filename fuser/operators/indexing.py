"""Gathers, scatters, selection and ordering."""

import math

import torch
from torch import Tensor

from fuser.errors import FuserError, UnsupportedOperator
from fuser.operators.table import Ints, axis_of, one_int, operator

_REDUCTIONS = {"add": "sum", "mul": "prod", "max": "amax", "min": "amin"}


def _wrapped(indices: Tensor, dim: int) -> Tensor:
    """Indices as int64, with the negative ones counted from the end."""
    indices = indices.to(torch.int64)
    return torch.where(indices < 0, indices + dim, indices)


@operator("Gather")
def gather(data: Tensor, indices: Tensor, *, axis: int = 0) -> Tensor:
    axis = axis_of(axis, data.dim())
    flat = data.index_select(axis, _wrapped(indices, data.shape[axis]).reshape(-1))
    return flat.reshape([*data.shape[:axis], *indices.shape, *data.shape[axis + 1 :]])


@operator("GatherElements")
def gather_elements(data: Tensor, indices: Tensor, *, axis: int = 0) -> Tensor:
    return torch.gather(data, axis, _wrapped(indices, data.shape[axis]))


@operator("GatherND")
def gather_nd(data: Tensor, indices: Tensor, *, batch_dims: int = 0) -> Tensor:
    batch, depth = data.shape[:batch_dims], indices.shape[-1]
    rest = data.shape[batch_dims + depth :]
    rows = _row_numbers(indices, data.shape[batch_dims : batch_dims + depth]).reshape(math.prod(batch), -1)
    table = data.reshape(math.prod(batch), -1, *rest)
    picked = table[torch.arange(math.prod(batch), device=data.device)[:, None], rows]
    return picked.reshape([*indices.shape[:-1], *rest])


def _row_numbers(indices: Tensor, dims: torch.Size) -> Tensor:
    """Index tuples [..., k] into dims [k] as row-major numbers [...]; raises FuserError for one outside."""
    rows = torch.zeros(indices.shape[:-1], dtype=torch.int64, device=indices.device)
    for i, dim in enumerate(dims):
        index = _wrapped(indices[..., i], dim)
        if bool(((index < 0) | (index >= dim)).any()):
            raise FuserError(f"indices must be in [{-dim}, {dim}) along axis {i} of {list(dims)}")
        rows = rows * dim + index
    return rows


@operator("ScatterElements", "Scatter")
def scatter_elements(
    data: Tensor, indices: Tensor, updates: Tensor, *, axis: int = 0, reduction: str = "none"
) -> Tensor:
    index = _wrapped(indices, data.shape[axis])
    if reduction == "none":
        return data.scatter(axis, index, updates)
    return data.scatter_reduce(axis, index, updates, _reduction(reduction))


@operator("ScatterND")
def scatter_nd(data: Tensor, indices: Tensor, updates: Tensor, *, reduction: str = "none") -> Tensor:
    depth = indices.shape[-1]
    rows = _row_numbers(indices, data.shape[:depth]).reshape(-1)
    table = data.reshape(math.prod(data.shape[:depth]), -1)
    values = updates.reshape(rows.shape[0], -1)
    index = rows[:, None].expand_as(values)
    if reduction == "none":
        return table.scatter(0, index, values).reshape(data.shape)
    return table.scatter_reduce(0, index, values, _reduction(reduction)).reshape(data.shape)


def _reduction(name: str) -> str:
    if name not in _REDUCTIONS:
        raise UnsupportedOperator(f"reduction {name!r}")
    return _REDUCTIONS[name]


@operator("TensorScatter")
def tensor_scatter(
    past_cache: Tensor, update: Tensor, write_indices: Tensor | None = None, *, axis: int = -2, mode: str = "linear"
) -> Tensor:
    """Writes update [B, ..., S, ...] into a copy of the cache [B, ..., T, ...] from position write_indices [B]."""
    axis = axis_of(axis, past_cache.dim())
    B, S, T = past_cache.shape[0], update.shape[axis], past_cache.shape[axis]
    first = torch.zeros(B, dtype=torch.int64, device=update.device) if write_indices is None else write_indices
    position = first.reshape(B, 1) + torch.arange(S, device=update.device)
    if mode == "circular":
        position = position % T
    index = position.reshape([B if i == 0 else S if i == axis else 1 for i in range(update.dim())])
    return past_cache.scatter(axis, index.expand_as(update), update)


@operator("OneHot")
def one_hot(indices: Tensor, depth: Tensor, values: Tensor, *, axis: int = -1) -> Tensor:
    """values is [off, on]; an index outside [-depth, depth) gives a row of off."""
    classes = int(depth.item())
    axis = axis_of(axis, indices.dim() + 1)
    hot = _wrapped(indices, classes).unsqueeze(axis)
    label = torch.arange(classes, device=indices.device)
    label = label.reshape([-1 if i == axis else 1 for i in range(hot.dim())])
    return torch.where(hot == label, values[1], values[0])


@operator("NonZero")
def non_zero(x: Tensor) -> Tensor:
    return torch.nonzero(x).T.contiguous()


@operator("Compress")
def compress(x: Tensor, condition: Tensor, *, axis: int | None = None) -> Tensor:
    """The condition may be shorter than the axis; what it does not reach is dropped."""
    if axis is None:
        x, axis = x.reshape(-1), 0
    return x.index_select(axis, torch.nonzero(condition).reshape(-1))


@operator("TopK")
def top_k(x: Tensor, k: Ints, *, axis: int = -1, largest: int = 1, sorted: int = 1) -> tuple[Tensor, Tensor]:
    """Of equal elements the one with the lower index comes first."""
    values, indices = torch.sort(x, dim=axis, descending=bool(largest), stable=True)
    count = one_int(k)
    return values.narrow(axis, 0, count), indices.narrow(axis, 0, count)
