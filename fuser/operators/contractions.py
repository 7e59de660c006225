"""Matrix products and convolutions; float16 and bfloat16 accumulate in float32 and are rounded once."""

import torch
import torch.nn.functional as functional
from torch import Tensor

from fuser.errors import UnsupportedOperator
from fuser.operators.table import operator, same_dtype, wide


@operator("MatMul")
def matmul(a: Tensor, b: Tensor) -> Tensor:
    same_dtype(a, b)
    return torch.matmul(wide(a), wide(b)).to(a.dtype)


@operator("Gemm")
def gemm(
    a: Tensor,
    b: Tensor,
    c: Tensor | None = None,
    *,
    alpha: float = 1.0,
    beta: float = 1.0,
    transA: int = 0,
    transB: int = 0,
) -> Tensor:
    """alpha a b + beta c, with a, b optionally transposed and c broadcast to [M, N]."""
    same_dtype(a, b, c)
    x, y = wide(a), wide(b)
    product = (x.T if transA else x) @ (y.T if transB else y)
    out = product if alpha == 1.0 else alpha * product
    if c is not None:
        out = out + (wide(c) if beta == 1.0 else beta * wide(c))
    return out.to(a.dtype)


@operator("MatMulInteger")
def matmul_integer(
    a: Tensor, b: Tensor, a_zero_point: Tensor | None = None, b_zero_point: Tensor | None = None
) -> Tensor:
    """int32 product of 8-bit matrices, each less its zero point: one, per row of a, per column of b."""
    x, y = a.to(torch.int32), b.to(torch.int32)
    if a_zero_point is not None:
        zero = a_zero_point.to(torch.int32)
        x = x - (zero.unsqueeze(-1) if zero.dim() == 1 and zero.numel() > 1 else zero)
    if b_zero_point is not None:
        y = y - b_zero_point.to(torch.int32)
    return torch.matmul(x, y)


@operator("Einsum")
def einsum(*factors: Tensor, equation: str) -> Tensor:
    same_dtype(*factors)
    return torch.einsum(equation, *map(wide, factors)).to(factors[0].dtype)


@operator("Conv")
def convolution(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None = None,
    *,
    auto_pad: str = "NOTSET",
    dilations: list[int] | None = None,
    group: int = 1,
    kernel_shape: list[int] | None = None,
    pads: list[int] | None = None,
    strides: list[int] | None = None,
) -> Tensor:
    """x [B, C, spatial...], w [M, C/group, kernel...]; one to three spatial dims."""
    same_dtype(x, w, bias)
    spatial = x.dim() - 2
    if not 1 <= spatial <= 3:
        raise UnsupportedOperator(f"Conv over {spatial} spatial dims")
    stride, dilation = strides or [1] * spatial, dilations or [1] * spatial
    sides = _padding(x, w, auto_pad, pads or [0] * 2 * spatial, stride, dilation)
    x_padded = functional.pad(wide(x), [side for pair in reversed(sides) for side in pair])
    convolve = (functional.conv1d, functional.conv2d, functional.conv3d)[spatial - 1]
    out = convolve(x_padded, wide(w), None if bias is None else wide(bias), stride, 0, dilation, group)
    return out.to(x.dtype)


def _padding(
    x: Tensor, w: Tensor, auto_pad: str, pads: list[int], strides: list[int], dilations: list[int]
) -> list[tuple[int, int]]:
    """(before, after) for each spatial dim."""
    spatial = len(strides)
    if auto_pad in ("NOTSET", ""):
        return list(zip(pads[:spatial], pads[spatial:], strict=True))
    if auto_pad == "VALID":
        return [(0, 0)] * spatial
    sides = []
    for dim, kernel, stride, dilation in zip(x.shape[2:], w.shape[2:], strides, dilations, strict=True):
        reach = (-(-dim // stride) - 1) * stride + (kernel - 1) * dilation + 1  # what ceil(dim / stride) outputs read
        total = max(0, reach - dim)
        before = total // 2 if auto_pad == "SAME_UPPER" else total - total // 2
        sides.append((before, total - before))
    return sides
