"""Attention stays whole: the standard operator, queries, keys and values arranged by head."""

from collections.abc import Sequence
from typing import Any

from fuser.errors import UnsupportedOperator
from fuser.fx.table import At, aten, rank
from fuser.graph import Value


@aten("scaled_dot_product_attention.default")
def attention(
    at: At, q: Value, k: Value, v: Value, attn_mask: Value | None = None, dropout_p: float = 0.0,
    is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
) -> Value:  # fmt: skip
    """A row that may attend to nothing gives zeros in both; both align what is causal at the first key."""
    if dropout_p:
        raise UnsupportedOperator("attention with dropout; call module.eval() first")
    if {rank(q), rank(k), rank(v)} not in ({3}, {4}):
        raise UnsupportedOperator(f"attention over queries of {rank(q)} dims")
    options: dict[str, Any] = {"is_causal": int(is_causal)} | ({} if scale is None else {"scale": float(scale)})
    attn_mask = None if attn_mask is None else _of_every_key(at, attn_mask, k)
    if rank(q) == 4:
        return at.op("Attention", q, k, v, attn_mask, **options)
    one_head = [at.op("Unsqueeze", x, axes=(1,)) for x in (q, k, v)]
    if attn_mask is not None and rank(attn_mask) == 3:
        attn_mask = at.op("Unsqueeze", attn_mask, axes=(1,))
    return at.op("Squeeze", at.op("Attention", *one_head, attn_mask, **options), axes=(1,))


def _of_every_key(at: At, mask: Value, k: Value) -> Value:
    """A mask that broadcasts over keys, repeated: what a shorter one does not reach, ONNX forbids."""
    assert mask.shape is not None and k.shape is not None
    if not mask.shape or mask.shape[-1] != 1 or k.shape[-2] == 1:
        return mask
    repeated = at.op("Expand", mask, shape=(*mask.shape[:-1], k.shape[-2]))
    at.settle()
    return repeated


@aten("_scaled_dot_product_flash_attention_for_cpu.default")
def flash_attention(
    at: At, q: Value, k: Value, v: Value, dropout_p: float = 0.0, is_causal: bool = False,
    attn_mask: Value | None = None, scale: float | None = None,
) -> Sequence[Value]:  # fmt: skip
    """The kernel that a program decomposed for the CPU names. Its second result serves training alone."""
    y = attention(at, q, k, v, attn_mask, dropout_p, is_causal, scale)
    return [y, y]
