"""Fused operators as torch computes them fast, on CPU and CUDA; the others are computed by their reference functions.

Each takes and gives what the reference function of its name does, within rounding. Packed products, gates, activations
and cache writes have none: their references are torch's fast functions already.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as functional
from torch import Tensor

KERNELS: dict[str, Callable[..., Any]] = {}


def kernel(function: Callable[..., Any]) -> Callable[..., Any]:
    """Enters the decorated function under its own name."""
    KERNELS[function.__name__] = function
    return function


def _by_head(x: Tensor, heads: int) -> Tensor:
    """[B, S, heads * D] as [B, heads, S, D], a view; four dims stay."""
    return x if x.dim() == 4 else x.reshape(*x.shape[:2], heads, -1).transpose(1, 2)


@kernel
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    *,
    heads: Sequence[int],
    scale: float,
    softcap: float = 0.0,
    guarded: bool = False,
    merged: bool = False,
) -> Tensor:
    """By `scaled_dot_product_attention`; scores that are capped, or whose rows may be undefined, are written out.

    A row that may attend to nothing is zeros in the one and not a number in the other: where a mask is given and the
    operator is not `guarded`, what it leaves undefined is zeros here.
    """
    H, G = heads
    q, k, v = _by_head(q, H), _by_head(k, G), _by_head(v, G)
    if softcap or (mask is not None and mask.dtype not in (torch.bool, q.dtype)):
        y = _capped(q, k, v, mask, H // G, scale, softcap, guarded)
    elif q.is_cuda:
        bias = None if mask is None else _bias(mask, q)
        y = functional.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale, enable_gqa=G != H)
    elif q.shape[2] == 1 and G != H and k.shape[3] == v.shape[3] and (mask is None or mask.shape[-3:-1] == (1, 1)):
        # One token: the query heads that share a key head are rows of one product, and nothing is repeated.
        rows = q.reshape(q.shape[0], G, H // G, q.shape[3])
        y = functional.scaled_dot_product_attention(rows, k, v, attn_mask=mask, scale=scale)
        y = y.flatten(1, 2).unsqueeze(2)
    else:
        y = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=G != H)
    return y.transpose(1, 2).flatten(2) if merged else y


def _bias(mask: Tensor, q: Tensor) -> Tensor:
    """A mask as CUDA's kernels take it in the operator's meaning: a bool becomes 0 and minus infinity, for of a row that is
    all False they would give the mean; and the lowest numbers are halved, which they multiply by more than 1.
    """
    if mask.dtype == torch.bool:
        return torch.zeros(mask.shape, dtype=q.dtype, device=q.device).masked_fill_(~mask, -math.inf)
    if mask.dtype == torch.float16:  # whose lowest number has room in the float32 that scores are in
        return mask
    return torch.where(mask == -math.inf, mask, mask.clamp(min=torch.finfo(mask.dtype).min / 2))


def _capped(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, group: int, scale: float, softcap: float, guarded: bool
) -> Tensor:
    """Softmax in float32 or wider; the query heads of a key head are rows of one product."""
    B, H, S, _ = q.shape
    wide = torch.promote_types(q.dtype, torch.float32)
    rows = q.to(wide).reshape(B, H // group, group * S, -1)
    scores = (rows @ k.to(wide).mT * scale).reshape(B, H, S, -1)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is not None and mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, -math.inf)
    elif mask is not None:
        scores = (scores.to(mask.dtype) + mask).to(wide)
    weights = scores.softmax(-1)
    if guarded:
        weights = weights.nan_to_num(0.0)
    y: Tensor = weights.reshape(B, H // group, group * S, -1) @ v.to(wide)
    return y.reshape(B, H, S, -1).to(q.dtype)


@kernel
def attention_mask(
    shape: Tensor, padding: Tensor | None = None, *, left_window: int = -1, right_window: int = -1
) -> Tensor:
    """On the padding's device."""
    *_, S, T = wanted = shape.tolist()
    device = shape.device if padding is None else padding.device
    allowed = None if padding is None else (padding != 0)[:, None, None, :]
    # A single query sees every key that there is, unless a window ends before.
    if (right_window >= 0 and S > 1) or 0 <= left_window < T - 1:
        distance = torch.arange(T, device=device) - torch.arange(T - S, T, device=device)[:, None]
        seen = distance <= right_window if right_window >= 0 else torch.ones_like(distance, dtype=torch.bool)
        seen = seen & (distance >= -left_window) if left_window >= 0 else seen
        allowed = seen if allowed is None else allowed & seen
    if allowed is None:
        allowed = torch.ones((), dtype=torch.bool, device=device)
    return allowed.expand(wanted)


@kernel
def rms_norm(x: Tensor, weight: Tensor | None = None, *, eps: float) -> Tensor:
    """torch's rms_norm computes float16 and bfloat16 in float32, and rounds once where the weight has x's type."""
    if weight is not None and weight.dtype != x.dtype:
        wide = x if x.dtype == torch.float64 else x.float()
        return functional.rms_norm(wide, wide.shape[-1:], weight.to(wide.dtype), eps).to(x.dtype)
    return functional.rms_norm(x, x.shape[-1:], weight, eps)


@kernel
def skip_rms_norm(x: Tensor, skip: Tensor, weight: Tensor | None = None, *, eps: float) -> tuple[Tensor, Tensor]:
    total = x + skip
    return rms_norm(total, weight, eps=eps), total


@kernel
def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, eps: float) -> Tensor:
    if weight.dtype != x.dtype:
        wide = x if x.dtype == torch.float64 else x.float()
        shift = None if bias is None else bias.to(wide.dtype)
        return functional.layer_norm(wide, wide.shape[-1:], weight.to(wide.dtype), shift, eps).to(x.dtype)
    return functional.layer_norm(x, x.shape[-1:], weight, bias, eps)


@kernel
def skip_layer_norm(
    x: Tensor, skip: Tensor, weight: Tensor, bias: Tensor | None = None, *, eps: float
) -> tuple[Tensor, Tensor]:
    total = x + skip
    return layer_norm(total, weight, bias, eps=eps), total


@kernel
def rotary(x: Tensor, cos: Tensor, sin: Tensor, *, rotary_dim: int, interleaved: bool = False) -> Tensor:
    """Written into one result, without the parts in between."""
    cos, sin = (table.unsqueeze(1) if table.dim() == 3 else table for table in (cos, sin))
    half = rotary_dim // 2
    first, second = slice(0, half), slice(half, rotary_dim)
    if interleaved:
        first, second = slice(0, rotary_dim, 2), slice(1, rotary_dim, 2)
    a, b = x[..., first], x[..., second]
    y = torch.empty(x.shape, dtype=torch.promote_types(x.dtype, cos.dtype), device=x.device)
    torch.mul(a, cos, out=y[..., first]).addcmul_(b, sin, value=-1)
    torch.mul(b, cos, out=y[..., second]).addcmul_(a, sin)
    if rotary_dim < x.shape[-1]:
        y[..., rotary_dim:] = x[..., rotary_dim:]
    return y


@kernel
def rotary_cache_write(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, past_k: Tensor, past_v: Tensor, *,
    rotary_dim: int, interleaved: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    q, k = (_by_head(x, x.shape[-1] // past_k.shape[-1]) for x in (q, k))
    q, k = (rotary(x, cos, sin, rotary_dim=rotary_dim, interleaved=interleaved) for x in (q, k))
    v = _by_head(v, past_v.shape[1])
    return q, torch.cat([past_k, k], 2), torch.cat([past_v, v], 2)
