"""Attention and rotary embedding (ONNX opset 23 to 25)."""

import torch
from torch import Tensor

from fuser.errors import FuserError
from fuser.operators.creation import dtype_of
from fuser.operators.table import operator, same_dtype, wide


def _heads(x: Tensor, count: int | None) -> Tensor:
    """[B, S, count * Dh] to [B, count, S, Dh]; four dims stay."""
    if x.dim() == 4:
        return x
    if not count:
        raise FuserError("the number of heads is required with inputs of three dims")
    return x.reshape(*x.shape[:2], count, x.shape[2] // count).transpose(1, 2)


@operator("Attention")
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None = None,
    past_key: Tensor | None = None,
    past_value: Tensor | None = None,
    nonpad_kv_seqlen: Tensor | None = None,
    *,
    is_causal: int = 0,
    kv_num_heads: int | None = None,
    left_window_size: int = -1,
    q_num_heads: int | None = None,
    qk_matmul_output_mode: int = 0,
    right_window_size: int = -1,
    scale: float | None = None,
    softcap: float = 0.0,
    softmax_precision: int | None = None,
    float_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """softmax(softcap(scale q k^T) + bias) v, a row that may attend nothing giving zeros.

    q [B, H, S, Dh] or [B, S, H Dh]; k, v [B, G, ...] or [B, ..., G Dh]; past_key, past_value [B, G, P, Dh]. Outputs y
    in q's layout, present_key and present_value [B, G, T, Dh], and the scores [B, H, S, T] at the stage the mode names.
    """
    same_dtype(q, k, past_key)
    same_dtype(v, past_value)
    three_dims = q.dim() == 3
    q, k, v = _heads(q, q_num_heads), _heads(k, kv_num_heads), _heads(v, kv_num_heads)
    if past_key is not None and past_value is not None:
        k, v = torch.cat([past_key, k], 2), torch.cat([past_value, v], 2)
    H, S, G, T = q.shape[1], q.shape[2], k.shape[1], k.shape[2]
    if H % G:
        raise FuserError(f"query heads must be a multiple of the key heads, got {H} and {G}")

    # The root of the scale goes to each side, so that float16 scores overflow later; in float32 it makes no difference.
    root = (q.shape[-1] ** -0.5 if scale is None else scale) ** 0.5
    keys, values = (wide(x).repeat_interleave(H // G, 1) for x in (k, v))
    raw = (wide(q) * root) @ (keys * root).transpose(2, 3)
    capped = softcap * torch.tanh(raw / softcap) if softcap else raw

    if nonpad_kv_seqlen is not None and past_key is None:
        offset = nonpad_kv_seqlen.reshape(-1, 1, 1, 1) - S
    else:
        offset = torch.tensor(0 if past_key is None else past_key.shape[2], device=q.device).reshape(1, 1, 1, 1)
    distance = torch.arange(T, device=q.device) - (torch.arange(S, device=q.device)[:, None] + offset)
    allowed = torch.ones_like(distance, dtype=torch.bool)
    if is_causal:
        allowed &= distance <= 0
    if left_window_size >= 0:
        allowed &= distance >= -left_window_size
    if right_window_size >= 0:
        allowed &= distance <= right_window_size
    if nonpad_kv_seqlen is not None:
        allowed = allowed & (torch.arange(T, device=q.device) < nonpad_kv_seqlen.reshape(-1, 1, 1, 1))
    bias = torch.zeros_like(allowed, dtype=raw.dtype).masked_fill(~allowed, -torch.inf)
    if attn_mask is not None:
        bias = bias + _additive(attn_mask, T, raw.dtype)
    biased = capped + bias

    precision = raw.dtype if softmax_precision is None else dtype_of(softmax_precision, float_dtype)
    scores = biased.to(torch.promote_types(raw.dtype, precision))
    weights = torch.softmax(scores, -1).masked_fill((bias == -torch.inf).all(-1, keepdim=True), 0).to(raw.dtype)
    y = (weights @ values).to(q.dtype)
    stages = {0: raw, 1: capped, 2: biased, 3: weights}
    if three_dims:
        y = y.transpose(1, 2).flatten(2)
    return y, k, v, stages[qk_matmul_output_mode].to(q.dtype)


def _additive(mask: Tensor, T: int, dtype: torch.dtype) -> Tensor:
    """A mask as a bias [..., T]: False is -inf, and so is what a shorter mask does not reach."""
    if mask.dtype is torch.bool:
        mask = torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, -torch.inf)
    unreached = mask.new_full((*mask.shape[:-1], max(0, T - mask.shape[-1])), -torch.inf)
    return torch.cat([mask, unreached], -1).to(dtype)


@operator("RotaryEmbedding")
def rotary_embedding(
    x: Tensor,
    cos_cache: Tensor,
    sin_cache: Tensor,
    position_ids: Tensor | None = None,
    *,
    interleaved: int = 0,
    num_heads: int = 0,
    rotary_embedding_dim: int = 0,
) -> Tensor:
    """Rotates pairs of the first `rotary_embedding_dim` features by position (arXiv:2104.09864).

    x [B, H, S, Dh] or [B, S, H Dh]; the caches are [positions, Dr/2] with position_ids [B, S], else [B, S, Dr/2]. A
    pair is (i, i + Dr/2), or (2i, 2i + 1) when interleaved.
    """
    heads = wide(_heads(x, num_heads))
    Dr = rotary_embedding_dim or heads.shape[-1]
    rotated, rest = heads[..., :Dr], heads[..., Dr:]
    cos, sin = (
        wide(cache if position_ids is None else cache[position_ids]).unsqueeze(1) for cache in (cos_cache, sin_cache)
    )
    first, second = (rotated[..., 0::2], rotated[..., 1::2]) if interleaved else rotated.chunk(2, -1)
    pair = (cos * first - sin * second, sin * first + cos * second)
    turned = torch.stack(pair, -1).flatten(-2) if interleaved else torch.cat(pair, -1)
    out = torch.cat([turned, rest], -1).to(x.dtype)
    return out if x.dim() == 4 else out.transpose(1, 2).flatten(2)
