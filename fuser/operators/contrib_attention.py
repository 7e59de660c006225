"""ONNX Runtime's own attentions and rotary embedding (domain com.microsoft).

Source: docs/ContribOperators.md of ONNX Runtime, and what its CPU kernels compute where that says nothing.
"""

import torch
from torch import Tensor

from fuser.errors import FuserError, UnsupportedOperator
from fuser.operators.attention import rotary_embedding
from fuser.operators.table import operator, same_dtype, wide

_DOMAIN = "com.microsoft"
_FILTER = -10000.0


def _by_head(x: Tensor, heads: int) -> Tensor:
    """[B, S, heads * D] as [B, heads, S, D]; four dims stay."""
    return x if x.dim() == 4 else x.reshape(*x.shape[:2], heads, -1).transpose(1, 2)


def _attend(q: Tensor, k: Tensor, v: Tensor, scale: float | None, bias: Tensor | None, softcap: float = 0.0) -> Tensor:
    """softmax(softcap(scale q k^T) + bias) v of [B, H, S, D], as [B, S, H Dv]; in float32 or wider, rounded once."""
    scores = wide(q) @ wide(k).mT * (scale or q.shape[-1] ** -0.5)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if bias is not None:
        scores = scores + bias.to(scores.dtype)
    return (torch.softmax(scores, -1) @ wide(v)).to(q.dtype).transpose(1, 2).flatten(2)


@operator("RotaryEmbedding", domain=_DOMAIN)
def microsoft_rotary_embedding(
    x: Tensor,
    position_ids: Tensor,
    cos_cache: Tensor,
    sin_cache: Tensor,
    *,
    interleaved: int = 0,
    is_packed_batching: int = 0,
    num_heads: int = 0,
    rotary_embedding_dim: int = 0,
    scale: float = 1.0,
) -> Tensor:
    """x [B, H, S, D] or [B, S, H D]; position_ids [B, S], or [1]: the position of each sequence's first token."""
    if is_packed_batching or scale != 1.0:
        raise UnsupportedOperator("packed batches, and a scale")
    count, length = x.shape[0], x.shape[2] if x.dim() == 4 else x.shape[1]
    if position_ids.dim() == 1:
        position_ids = (position_ids + torch.arange(length, device=x.device)).expand(count, length)
    width = 2 * cos_cache.shape[-1]
    heads = num_heads or (0 if x.dim() == 4 else x.shape[2] // width)
    return rotary_embedding(
        x, cos_cache, sin_cache, position_ids,
        interleaved=interleaved, num_heads=heads, rotary_embedding_dim=rotary_embedding_dim or (width if num_heads else 0),
    )  # fmt: skip


@operator("GroupQueryAttention", domain=_DOMAIN)
def group_query_attention(
    query: Tensor,
    key: Tensor | None = None,
    value: Tensor | None = None,
    past_key: Tensor | None = None,
    past_value: Tensor | None = None,
    seqlens_k: Tensor | None = None,
    total_sequence_length: Tensor | None = None,
    cos_cache: Tensor | None = None,
    sin_cache: Tensor | None = None,
    position_ids: Tensor | None = None,
    attention_bias: Tensor | None = None,
    *,
    num_heads: int,
    kv_num_heads: int,
    do_rotary: int = 0,
    k_quant_type: str = "NONE",
    local_window_size: int = -1,
    qk_output: int = 0,
    rotary_interleaved: int = 0,
    scale: float = 0.0,
    smooth_softmax: int = 0,
    softcap: float = 0.0,
    v_quant_type: str = "NONE",
    kv_cache_bit_width: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Causal attention with grouped heads and a cache, the tokens of sequence b in its first seqlens_k[b] + 1 places.

    query [B, S, H D] with key and value [B, S, G D], or all packed in query; past_key, past_value [B, G, P, D]. Outputs
    y [B, S, H D] and the cache, as long as the past's buffer or as all tokens. A prompt (as many tokens as there are in
    all) starts at 0; otherwise the S new tokens are the last ones. Rows of padding hold nothing defined.
    """
    if smooth_softmax or qk_output or "NONE" not in (k_quant_type, v_quant_type) or k_quant_type != v_quant_type:
        raise UnsupportedOperator("a smooth softmax, scores as an output, or a quantized cache")
    if seqlens_k is None or total_sequence_length is None:
        raise FuserError("seqlens_k and total_sequence_length are required")
    H, G, (B, S) = num_heads, kv_num_heads, query.shape[:2]
    if key is None or value is None:
        D = query.shape[2] // (H + 2 * G)
        query, key, value = torch.split(query, [H * D, G * D, G * D], -1)
    same_dtype(query, key, value, past_key, past_value)
    q, k, v = _by_head(query, H), _by_head(key, G), _by_head(value, G)
    total, lengths = int(total_sequence_length.item()), seqlens_k.reshape(-1).to(torch.int64) + 1
    starts = torch.zeros_like(lengths) if total == S else lengths - S
    where = starts[:, None] + torch.arange(S, device=q.device)  # the place of each new token
    if do_rotary:
        if cos_cache is None or sin_cache is None:
            raise FuserError("do_rotary needs cos_cache and sin_cache")
        at = where if position_ids is None else position_ids
        at = at.clamp(0, cos_cache.shape[0] - 1)  # of padding: not defined
        width = 2 * cos_cache.shape[1]
        q, k = (
            rotary_embedding(x, cos_cache, sin_cache, at, interleaved=rotary_interleaved, rotary_embedding_dim=width)
            for x in (q, k)
        )
    T = max(total, 0 if past_key is None else past_key.shape[2])
    places = where[:, None, :, None]
    present = []
    for new, past in ((k, past_key), (v, past_value)):
        cache = new.new_zeros(B, G, T, new.shape[3])
        if past is not None and total != S:
            cache[:, :, : past.shape[2]] = past
        present.append(cache.scatter(2, places.expand_as(new), new))
    keys, values = (x.repeat_interleave(H // G, 1) for x in present)
    seen = torch.arange(T, device=q.device) <= where[:, :, None]
    if local_window_size > 0:
        seen &= torch.arange(T, device=q.device) > where[:, :, None] - local_window_size
    bias = torch.zeros(seen.shape, dtype=wide(q).dtype, device=q.device).masked_fill(~seen, -torch.inf).unsqueeze(1)
    if attention_bias is not None:
        given = attention_bias.to(bias.dtype)
        missing = T - given.shape[-1]
        bias = bias + (torch.nn.functional.pad(given, (0, missing)) if missing > 0 else given[..., :T])
    return _attend(q, keys, values, scale, bias, softcap), present[0], present[1]


def _padding(mask: Tensor | None, B: int, S: int, T: int, value: float, dtype: torch.dtype) -> Tensor | None:
    """A padding mask as a bias: [B, T] or [B, S, T] of 0 and 1, or [B]: the length of each sequence."""
    if mask is None:
        return None
    if mask.dim() == 1 and mask.shape[0] == B:
        seen = torch.arange(T, device=mask.device) < mask[:, None]
    elif mask.shape in ((B, T), (B, S, T)):
        seen = mask > 0
    else:
        raise UnsupportedOperator(f"a mask of shape {list(mask.shape)} for {B} sequences of {S} on {T}")
    seen = seen[:, None] if seen.dim() == 3 else seen[:, None, None]
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill(~seen, value)


def _masked(
    padding: Tensor | None, bias: Tensor | None, S: int, T: int, unidirectional: int, value: float, q: Tensor
) -> Tensor | None:
    """The sum of what is added to scores; None where that is nothing."""
    total = padding
    if unidirectional:
        later = torch.ones(S, T, dtype=torch.bool, device=q.device).triu(T - S + 1)
        causal = torch.zeros(S, T, dtype=wide(q).dtype, device=q.device).masked_fill(later, torch.finfo(q.dtype).min)
        total = causal if total is None else total + causal
    if bias is not None:
        total = bias.to(wide(q).dtype) if total is None else total + bias
    return total


@operator("MultiHeadAttention", domain=_DOMAIN)
def multi_head_attention(
    query: Tensor,
    key: Tensor | None = None,
    value: Tensor | None = None,
    bias: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    attention_bias: Tensor | None = None,
    past_key: Tensor | None = None,
    past_value: Tensor | None = None,
    *,
    num_heads: int,
    mask_filter_value: float = _FILTER,
    scale: float = 0.0,
    unidirectional: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """query [B, S, H D], key [B, T, H D] or [B, H, T, D], value likewise; bias [H (D + D + Dv)] of the projections; past_key,
    past_value [B, H, P, D]. Packed forms, which ONNX Runtime has on CUDA alone, are declined.

    Outputs y [B, S, H Dv] and the keys and values [B, H, T, D] with their past.
    """
    if key is None or value is None or query.dim() != 3:
        raise UnsupportedOperator("packed queries, keys and values")
    same_dtype(query, key, value, bias, past_key, past_value)
    if bias is not None:
        q_width = query.shape[2]
        parts = torch.split(bias, [q_width, q_width, bias.shape[0] - 2 * q_width])
        query = query + parts[0]
        if key.dim() == 3 and value.dim() == 3:
            key, value = key + parts[1], value + parts[2]
    q, k, v = (_by_head(x, num_heads) for x in (query, key, value))
    if past_key is not None and past_value is not None:
        k, v = torch.cat([past_key, k], 2), torch.cat([past_value, v], 2)
    B, S, T = q.shape[0], q.shape[2], k.shape[2]
    padding = _padding(key_padding_mask, B, S, T, mask_filter_value, wide(q).dtype)
    total = _masked(padding, attention_bias, S, T, unidirectional, mask_filter_value, q)
    return _attend(q, k, v, scale, total), k, v


@operator("Attention", domain=_DOMAIN)
def microsoft_attention(
    x: Tensor,
    weights: Tensor,
    bias: Tensor | None = None,
    mask_index: Tensor | None = None,
    past: Tensor | None = None,
    attention_bias: Tensor | None = None,
    *,
    num_heads: int,
    do_rotary: int = 0,
    mask_filter_value: float = _FILTER,
    past_present_share_buffer: int = 0,
    qkv_hidden_sizes: list[int] | None = None,
    scale: float = 0.0,
    unidirectional: int = 0,
) -> tuple[Tensor, Tensor]:
    """Projections x [B, S, D] @ weights [D, N + N + Nv] + bias, then attention; past [2, B, H, P, Dh].

    Outputs y [B, S, Nv], and the keys and values with their past, [2, B, H, T, Dh].
    """
    if do_rotary or past_present_share_buffer:
        raise UnsupportedOperator("rotary embedding, or a past written in place")
    same_dtype(x, weights, bias, past)
    sizes = list(qkv_hidden_sizes or [weights.shape[1] // 3] * 3)
    product = wide(x) @ wide(weights)
    q, k, v = (
        _by_head(part.to(x.dtype), num_heads)
        for part in torch.split(product if bias is None else product + wide(bias), sizes, -1)
    )
    if past is not None:
        k, v = torch.cat([past[0], k], 2), torch.cat([past[1], v], 2)
    B, S, T = q.shape[0], q.shape[2], k.shape[2]
    padding = _padding(mask_index, B, S, T, mask_filter_value, wide(q).dtype)
    total = _masked(padding, attention_bias, S, T, unidirectional, mask_filter_value, q)
    y = _attend(q, k, v, scale, total)
    return y, torch.stack([k, v]) if k.shape == v.shape else k
