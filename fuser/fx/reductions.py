"""Reductions, scans, the softmax family, and ordering."""

import math
from collections.abc import Sequence
from typing import Any

from fuser import dims
from fuser.dims import Dim
from fuser.dtypes import DType
from fuser.errors import UnsupportedOperator
from fuser.fx.table import At, Number, Row, aten, axes_of, back, rank
from fuser.graph import Value

Axes = int | Sequence[int] | None


def _reduced(at: At, op: str, x: Value, dim: Axes, keepdim: bool) -> Value:
    if x.shape is None:
        at.settle()
    if not rank(x):
        return x
    return at.op(op, x, axes=axes_of(dim, rank(x)), keepdims=int(keepdim))


def _summed(op: str) -> tuple[Row, Row]:
    """The rows of a reduction in the result's type: of all elements, and along some axes."""

    def of_all(at: At, x: Value, dtype: Any = None) -> Value:
        return _reduced(at, op, at.cast(x, at.dtype), None, False)

    def along(at: At, x: Value, dim: Axes, keepdim: bool = False, dtype: Any = None) -> Value:
        return _reduced(at, op, at.cast(x, at.dtype), dim, keepdim)

    return of_all, along


for _op, _all, _along in (
    ("ReduceSum", "sum.default", "sum.dim_IntList"),
    ("ReduceMean", "mean.default", "mean.dim"),
    ("ReduceProd", "prod.default", "prod.dim_int"),
):
    for _name, _row in zip((_all, _along), _summed(_op), strict=True):
        aten(_name)(_row)


@aten("logsumexp.default")
def logsumexp(at: At, x: Value, dim: Axes, keepdim: bool = False) -> Value:
    return _reduced(at, "ReduceLogSumExp", at.cast(x, at.dtype), dim, keepdim)


@aten("linalg_vector_norm.default")
def vector_norm(at: At, x: Value, ord: Number = 2, dim: Axes = None, keepdim: bool = False, dtype: Any = None) -> Value:
    x = at.cast(x, at.dtype)
    if ord in (math.inf, -math.inf):
        return _reduced(at, "ReduceMax" if ord == math.inf else "ReduceMin", at.op("Abs", x), dim, keepdim)
    if ord not in (1, 2):
        raise UnsupportedOperator(f"a vector norm of order {ord}")
    return _reduced(at, f"ReduceL{int(ord)}", x, dim, keepdim)


@aten("var.correction")
def var(at: At, x: Value, dim: Axes = None, correction: Number | None = None, keepdim: bool = False) -> Value:
    """The mean of squares about the mean, or their sum by a corrected count."""
    assert x.shape is not None
    axes = axes_of(dim, rank(x))
    about = at.op("Sub", x, at.op("ReduceMean", x, axes=axes, keepdims=1))
    squares = at.op("Mul", about, about)
    lost = 1 if correction is None else correction
    if lost == 0:
        return _reduced(at, "ReduceMean", squares, dim, keepdim)
    total = at.op("ReduceSum", squares, axes=axes, keepdims=int(keepdim))
    count = at.scalar(dims.product([x.shape[axis] for axis in axes]), at.dtype)
    kept = at.op("Max", at.op("Sub", count, at.scalar(lost, at.dtype)), at.scalar(0, at.dtype))
    return at.op("Div", total, kept)


@aten("amax.default")
def amax(at: At, x: Value, dim: Axes = (), keepdim: bool = False) -> Value:
    return _reduced(at, "ReduceMax", x, dim, keepdim)


@aten("amin.default")
def amin(at: At, x: Value, dim: Axes = (), keepdim: bool = False) -> Value:
    return _reduced(at, "ReduceMin", x, dim, keepdim)


@aten("max.default")
def max_all(at: At, x: Value) -> Value:
    return _reduced(at, "ReduceMax", x, None, False)


@aten("min.default")
def min_all(at: At, x: Value) -> Value:
    return _reduced(at, "ReduceMin", x, None, False)


def _extreme(reduce: str, pick: str) -> Row:
    def row(at: At, x: Value, dim: int, keepdim: bool = False) -> Sequence[Value]:
        index = at.op(pick, x, axis=back(dim, rank(x)), keepdims=int(keepdim))
        return [_reduced(at, reduce, x, dim, keepdim), index]

    return row


aten("max.dim")(_extreme("ReduceMax", "ArgMax"))
aten("min.dim")(_extreme("ReduceMin", "ArgMin"))


def _index(op: str) -> Row:
    def row(at: At, x: Value, dim: int | None = None, keepdim: bool = False) -> Value:
        if dim is not None:
            return at.op(op, x, axis=back(dim, rank(x)), keepdims=int(keepdim))
        found = at.op(op, at.op("Reshape", x, shape=(-1,)), axis=-1, keepdims=0)
        return at.op("Reshape", found, shape=at.shape) if keepdim else found

    return row


aten("argmax.default")(_index("ArgMax"))
aten("argmin.default")(_index("ArgMin"))


def _truth(op: str) -> Row:
    def row(at: At, x: Value, dim: Axes = None, keepdim: bool = False) -> Value:
        return _reduced(at, op, at.cast(x, DType.BOOL), dim, keepdim)

    return row


for _name, _op in {"any": "ReduceMax", "all": "ReduceMin"}.items():
    aten(f"{_name}.default", f"{_name}.dim", f"{_name}.dims")(_truth(_op))


@aten("cumsum.default")
def cumsum(at: At, x: Value, dim: int, dtype: Any = None) -> Value:
    return at.op("CumSum", at.cast(x, at.dtype), at.constant(back(dim, rank(x)), DType.INT64))


@aten("softmax.int", "_softmax.default")
def softmax(at: At, x: Value, dim: int, dtype: Any = None) -> Value:
    return at.op("Softmax", at.cast(x, at.dtype), axis=back(dim, rank(x)))


@aten("log_softmax.int", "_log_softmax.default")
def log_softmax(at: At, x: Value, dim: int, dtype: Any = None) -> Value:
    return at.op("LogSoftmax", at.cast(x, at.dtype), axis=back(dim, rank(x)))


@aten("topk.default")
def topk(at: At, x: Value, k: Dim, dim: int = -1, largest: bool = True, sorted: bool = True) -> Sequence[Value]:
    options: dict[str, Any] = {"axis": back(dim, rank(x)), "largest": int(largest), "sorted": int(sorted)}
    return at.ops("TopK", 2, x, at.vector([k]), **options)


def _sorted(at: At, x: Value, dim: int, descending: bool) -> list[Value]:
    assert x.shape is not None
    options: dict[str, Any] = {"axis": back(dim, rank(x)), "largest": int(descending), "sorted": 1}
    return at.ops("TopK", 2, x, at.vector([x.shape[dim]]), **options)


@aten("sort.default")
def sort(at: At, x: Value, dim: int = -1, descending: bool = False) -> Sequence[Value]:
    return _sorted(at, x, dim, descending)


@aten("sort.stable")
def stable_sort(
    at: At, x: Value, stable: bool | None = None, dim: int = -1, descending: bool = False
) -> Sequence[Value]:
    return _sorted(at, x, dim, descending)


@aten("argsort.default")
def argsort(at: At, x: Value, dim: int = -1, descending: bool = False) -> Value:
    return _sorted(at, x, dim, descending)[1]
