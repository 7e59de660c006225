"""Linear quantization to 8, 16 and 32 bit integers, per tensor, per axis and in blocks."""

import torch
from torch import Tensor

from fuser.errors import UnsupportedOperator
from fuser.operators.creation import dtype_of
from fuser.operators.table import axis_of, operator, wide

_INTEGERS = (torch.int8, torch.uint8, torch.int16, torch.uint16, torch.int32)


def _along(parameter: Tensor, x: Tensor, axis: int, block_size: int) -> Tensor:
    """A scale or zero point, shaped to broadcast over x: one, one an index of `axis`, or one a block along it."""
    if parameter.numel() == 1 and not block_size:
        return parameter.reshape(())
    axis = axis_of(axis, x.dim())
    if block_size:
        return parameter.repeat_interleave(block_size, axis).narrow(axis, 0, x.shape[axis])
    return parameter.reshape([-1 if i == axis else 1 for i in range(x.dim())])


@operator("QuantizeLinear")
def quantize_linear(
    x: Tensor,
    y_scale: Tensor,
    y_zero_point: Tensor | None = None,
    *,
    axis: int = 1,
    block_size: int = 0,
    output_dtype: int = 0,
    precision: int = 0,
    saturate: int = 1,
    float_dtype: torch.dtype | None,
) -> Tensor:
    """round(x / scale) + zero point, half to even, saturated to the output's range."""
    target = y_zero_point.dtype if y_zero_point is not None else dtype_of(output_dtype or 2)
    if target not in _INTEGERS:
        raise UnsupportedOperator(f"quantization to {target}")
    chosen = dtype_of(precision, float_dtype) if precision else torch.promote_types(x.dtype, y_scale.dtype)
    scale = _along(wide(y_scale), x, axis, block_size)
    quotient = wide((wide(x).to(scale.dtype) / scale).to(chosen)) if x.dtype.is_floating_point else x / scale
    rounded = torch.round(quotient).double()
    if y_zero_point is not None:
        rounded = rounded + _along(y_zero_point.double(), x, axis, block_size)
    limits = torch.iinfo(target)
    return rounded.clamp(limits.min, limits.max).to(target)


@operator("DequantizeLinear")
def dequantize_linear(
    x: Tensor,
    x_scale: Tensor,
    x_zero_point: Tensor | None = None,
    *,
    axis: int = 1,
    block_size: int = 0,
    output_dtype: int = 0,
    float_dtype: torch.dtype | None,
) -> Tensor:
    """(x - zero point) scale, in the scale's dtype or output_dtype."""
    if x.dtype not in _INTEGERS:
        raise UnsupportedOperator(f"dequantization of {x.dtype}")
    levels = x.to(torch.int64)
    if x_zero_point is not None:
        levels = levels - _along(x_zero_point.to(torch.int64), x, axis, block_size)
    target = dtype_of(output_dtype, float_dtype) if output_dtype else x_scale.dtype
    scale = _along(wide(x_scale), x, axis, block_size)
    return (levels.to(scale.dtype) * scale).to(target)


@operator("DynamicQuantizeLinear")
def dynamic_quantize_linear(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """uint8, with the scale and zero point that cover x and zero."""
    low, high = x.amin().clamp(max=0), x.amax().clamp(min=0)
    scale = (high - low) / 255
    zero = torch.round(torch.clamp(-low / scale, 0, 255)) if scale else torch.zeros_like(scale)
    y = torch.clamp(torch.round(x / (scale if scale else 1)) + zero, 0, 255)
    return y.to(torch.uint8), scale, zero.to(torch.uint8)
