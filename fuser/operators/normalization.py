"""Normalizations: layer, RMS, group and instance; computed in stash_type or wider and rounded once."""

import torch
from torch import Tensor

from fuser.errors import FuserError
from fuser.operators.creation import dtype_of
from fuser.operators.table import axis_of, float32, operator, wide


def _stash(x: Tensor, stash_type: int, float_dtype: torch.dtype | None) -> tuple[torch.dtype, Tensor]:
    """The dtype the statistics are reported in, and x in the dtype they are computed in."""
    stash = dtype_of(stash_type, float_dtype)
    return stash, x.to(torch.promote_types(x.dtype, stash))


def layer_norm(x: Tensor, scale: Tensor, bias: Tensor | None, axes: list[int], epsilon: float) -> tuple[Tensor, ...]:
    """(x - mean) / sqrt(var + epsilon) * scale + bias over `axes`, with the mean and 1 / sqrt(var + epsilon)."""
    mean = x.mean(axes, keepdim=True)
    centred = x - mean
    inverse = torch.rsqrt(centred.square().mean(axes, keepdim=True) + epsilon)
    y = centred * inverse * scale.to(x.dtype)
    return (y if bias is None else y + bias.to(x.dtype)), mean, inverse


def rms_norm(x: Tensor, scale: Tensor, axes: list[int], epsilon: float) -> tuple[Tensor, Tensor]:
    """x / sqrt(mean(x^2) + epsilon) * scale over `axes`, with the inverse (arXiv:1910.07467)."""
    inverse = torch.rsqrt(x.square().mean(axes, keepdim=True) + epsilon)
    return x * inverse * scale.to(x.dtype), inverse


@operator("LayerNormalization")
def layer_normalization(
    x: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    *,
    axis: int = -1,
    epsilon: float = float32(1e-5),
    stash_type: int = 1,
    float_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Over the dims from `axis` on; outputs y, mean and inverse standard deviation."""
    stash, z = _stash(x, stash_type, float_dtype)
    axes = list(range(axis_of(axis, x.dim()), x.dim()))
    y, mean, inverse = layer_norm(z, scale, bias, axes, epsilon)
    return y.to(x.dtype), mean.to(stash), inverse.to(stash)


@operator("RMSNormalization", "SimplifiedLayerNormalization")
@operator("SimplifiedLayerNormalization", domain="com.microsoft")
def rms_normalization(
    x: Tensor,
    scale: Tensor,
    *,
    axis: int = -1,
    epsilon: float = float32(1e-5),
    stash_type: int = 1,
    float_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor]:
    """Over the dims from `axis` on. The output has the scale's dtype, as the two may differ.

    ONNX Runtime's SimplifiedLayerNormalization, which it registers in the standard domain, is the same operator with a
    second output, the inverse root mean square.
    """
    stash, z = _stash(x, stash_type, float_dtype)
    y, inverse = rms_norm(z, scale, list(range(axis_of(axis, x.dim()), x.dim())), epsilon)
    return y.to(scale.dtype), inverse.to(stash)


@operator("GroupNormalization")
def group_normalization(
    x: Tensor,
    scale: Tensor,
    bias: Tensor,
    *,
    num_groups: int,
    epsilon: float = float32(1e-5),
    stash_type: int = 1,
    opset: int,
    float_dtype: torch.dtype | None,
) -> Tensor:
    """x [B, C, spatial...]; scale and bias are per channel, before opset 21 per group."""
    B, C = x.shape[:2]
    if C % num_groups:
        raise FuserError(f"num_groups must divide the channels, got {num_groups} and {C}")
    if opset < 21:
        scale, bias = (p.repeat_interleave(C // num_groups) for p in (scale, bias))
    _, z = _stash(x, stash_type, float_dtype)
    parameter = (1, num_groups, C // num_groups, 1)
    z = z.reshape(B, num_groups, C // num_groups, -1)
    y, _, _ = layer_norm(z, scale.reshape(parameter), bias.reshape(parameter), [2, 3], epsilon)
    return y.reshape(x.shape).to(x.dtype)


@operator("InstanceNormalization")
def instance_normalization(
    x: Tensor, scale: Tensor, bias: Tensor, *, epsilon: float = float32(1e-5), float_dtype: torch.dtype | None
) -> Tensor:
    """Each channel of x [B, C, spatial...] on its own."""
    return group_normalization(
        x, scale, bias, num_groups=x.shape[1], epsilon=epsilon, opset=21, float_dtype=float_dtype
    )


@operator("LpNormalization")
def lp_normalization(x: Tensor, *, axis: int = -1, p: int = 2) -> Tensor:
    """x over its p-norm along `axis`; zero where the norm is zero."""
    y = wide(x)
    norm = y.abs().pow(p).sum(axis, keepdim=True).pow(1 / p)
    return torch.where(norm == 0, torch.zeros_like(y), y / norm).to(x.dtype)
