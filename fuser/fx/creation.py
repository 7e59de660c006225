"""Tensors made of sizes and numbers alone."""

from collections.abc import Sequence
from typing import Any

from fuser.dims import Dim
from fuser.dtypes import DType
from fuser.fx.table import At, Number, aten
from fuser.graph import Value


def _full(at: At, number: Number) -> Value:
    return at.full(number, at.dtype, at.shape)


@aten("full.default")
def full(at: At, size: Sequence[Dim], fill_value: Number, dtype: Any = None) -> Value:
    return _full(at, fill_value)


@aten("full_like.default")
def full_like(at: At, x: Value, fill_value: Number, dtype: Any = None) -> Value:
    return _full(at, fill_value)


@aten("fill.Scalar")
def fill(at: At, x: Value, value: Number) -> Value:
    return _full(at, value)


@aten("fill.Tensor")
def fill_with(at: At, x: Value, value: Value) -> Value:
    number = at.cast(value, at.dtype)
    return at.op("Expand", number, shape=at.shape) if at.shape else number


@aten("new_full.default")
def new_full(at: At, x: Value, size: Sequence[Dim], fill_value: Number, dtype: Any = None) -> Value:
    return _full(at, fill_value)


@aten("zeros.default", "zero.default", "zeros_like.default", "new_zeros.default", "empty.memory_format", "empty_like.default",
      "new_empty.default")  # fmt: skip
def zeros(at: At, *how: Any, dtype: Any = None) -> Value:
    """What is not initialised is read by nobody; zeros do."""
    return _full(at, 0)


@aten("ones.default", "ones_like.default", "new_ones.default")
def ones(at: At, *how: Any, dtype: Any = None) -> Value:
    return _full(at, 1)


@aten("scalar_tensor.default")
def scalar_tensor(at: At, number: Number, dtype: Any = None) -> Value:
    return at.scalar(number, at.dtype)


@aten("arange.default")
def arange(at: At, end: Number, dtype: Any = None) -> Value:
    return _range(at, 0, end, 1)


@aten("arange.start")
def arange_from(at: At, start: Number, end: Number, dtype: Any = None) -> Value:
    return _range(at, start, end, 1)


@aten("arange.start_step")
def arange_by(at: At, start: Number, end: Number, step: Number = 1, dtype: Any = None) -> Value:
    return _range(at, start, end, step)


def _range(at: At, start: Number, end: Number, step: Number) -> Value:
    """Whole numbers are counted as such, whatever they are turned into."""
    whole = not any(isinstance(bound, float) for bound in (start, end, step))
    counted = DType.INT64 if whole else at.dtype
    bounds = [at.scalar(bound, counted) for bound in (start, end, step)]
    return at.cast(at.op("Range", *bounds), at.dtype)
