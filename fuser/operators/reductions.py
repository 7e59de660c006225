"""Reductions, arg-reductions, scans and the softmax family."""

from collections.abc import Callable

import torch
from torch import Tensor

from fuser.operators.table import Ints, axis_of, ints, one_int, operator, wide


def _reduction(name: str, compute: Callable[[Tensor, list[int], bool], Tensor]) -> None:
    """float16 and bfloat16 are reduced in float32; an integer result wraps in its dtype."""

    @operator(name)
    def _(data: Tensor, axes: Ints | None = None, *, keepdims: int = 1, noop_with_empty_axes: int = 0) -> Tensor:
        chosen = [] if axes is None else [axis_of(axis, data.dim()) for axis in ints(axes)]
        if not chosen and noop_with_empty_axes:
            return compute(wide(data).unsqueeze(0), [0], False).to(data.dtype)  # each element is its own set
        if not chosen:
            chosen = list(range(data.dim()))
        if not chosen:
            return compute(wide(data).reshape(1), [0], False).to(data.dtype)
        return compute(wide(data), chosen, bool(keepdims)).to(data.dtype)


def _real(x: Tensor) -> Tensor:
    return x if x.dtype.is_floating_point else x.double()


def _sum(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    return x.sum(axes, keepdim=keep)


def _mean(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    return _real(x).mean(axes, keepdim=keep)


def _product(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    for axis in sorted(axes, reverse=True):
        x = x.prod(axis, keepdim=keep)
    return x


def _extreme(x: Tensor, axes: list[int], keep: bool, largest: bool) -> Tensor:
    """The extreme of an empty set is the dtype's own lowest (or highest) value."""
    if x.numel() == 0:
        if x.dtype is torch.bool:
            end: float = not largest
        elif x.dtype.is_floating_point:
            end = -torch.inf if largest else torch.inf
        else:
            end = torch.iinfo(x.dtype).min if largest else torch.iinfo(x.dtype).max
        return torch.full_like(x.sum(axes, keepdim=keep), end, dtype=x.dtype)
    return x.amax(axes, keepdim=keep) if largest else x.amin(axes, keepdim=keep)


def _log_sum_exp(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    return torch.logsumexp(_real(x), axes, keepdim=keep)


def _root_sum_square(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    return _real(_sum(x * x, axes, keep)).sqrt()


for _name, _compute in {
    "ReduceSum": _sum,
    "ReduceMean": _mean,
    "ReduceProd": _product,
    "ReduceMax": lambda x, axes, keep: _extreme(x, axes, keep, largest=True),
    "ReduceMin": lambda x, axes, keep: _extreme(x, axes, keep, largest=False),
    "ReduceL1": lambda x, axes, keep: _sum(x.abs(), axes, keep),
    "ReduceL2": _root_sum_square,
    "ReduceSumSquare": lambda x, axes, keep: _sum(x * x, axes, keep),
    "ReduceLogSum": lambda x, axes, keep: _real(_sum(x, axes, keep)).log(),
    "ReduceLogSumExp": _log_sum_exp,
}.items():
    _reduction(_name, _compute)


def _arg_extreme(name: str, largest: bool) -> None:
    @operator(name)
    def _(x: Tensor, *, axis: int = 0, keepdims: int = 1, select_last_index: int = 0) -> Tensor:
        pick = torch.argmax if largest else torch.argmin
        if select_last_index:
            return x.shape[axis] - 1 - pick(x.flip(axis), axis, keepdim=bool(keepdims))
        return pick(x, axis, keepdim=bool(keepdims))


_arg_extreme("ArgMax", largest=True)
_arg_extreme("ArgMin", largest=False)


def _scan(
    x: Tensor, axis: Ints, exclusive: int, reverse: int, scan: Callable[[Tensor, int], Tensor], unit: int
) -> Tensor:
    along = axis_of(one_int(axis), x.dim())
    y = wide(x)
    y = y.flip(along) if reverse else y
    if exclusive and x.shape[along]:
        y = torch.cat([torch.full_like(y.narrow(along, 0, 1), unit), y.narrow(along, 0, x.shape[along] - 1)], along)
    y = scan(y, along)
    return (y.flip(along) if reverse else y).to(x.dtype)


@operator("CumSum")
def cumulative_sum(x: Tensor, axis: Ints, *, exclusive: int = 0, reverse: int = 0) -> Tensor:
    return _scan(x, axis, exclusive, reverse, torch.cumsum, 0)


@operator("CumProd")
def cumulative_product(x: Tensor, axis: Ints, *, exclusive: int = 0, reverse: int = 0) -> Tensor:
    return _scan(x, axis, exclusive, reverse, torch.cumprod, 1)


def _over_axis(x: Tensor, axis: int | None, opset: int, compute: Callable[[Tensor, int], Tensor]) -> Tensor:
    """Before opset 13 these operators flattened the input to two dims at `axis` (1 by default)."""
    y = wide(x)
    if opset < 13:
        front = axis_of(1 if axis is None else axis, x.dim())
        rows = y.reshape(int(torch.Size(x.shape[:front]).numel()), -1)
        return compute(rows, 1).reshape(x.shape).to(x.dtype)
    return compute(y, -1 if axis is None else axis).to(x.dtype)


@operator("Softmax")
def softmax(x: Tensor, *, axis: int | None = None, opset: int) -> Tensor:
    return _over_axis(x, axis, opset, torch.softmax)


@operator("LogSoftmax")
def log_softmax(x: Tensor, *, axis: int | None = None, opset: int) -> Tensor:
    return _over_axis(x, axis, opset, torch.log_softmax)


def _first_maximum(x: Tensor, axis: int) -> Tensor:
    return torch.zeros_like(x).scatter(axis, torch.argmax(x, axis, keepdim=True), 1)


@operator("Hardmax")
def hardmax(x: Tensor, *, axis: int | None = None, opset: int) -> Tensor:
    return _over_axis(x, axis, opset, _first_maximum)
