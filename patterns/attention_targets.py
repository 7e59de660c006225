"""How attention is written for ONNX runtimes: with the strongest operator whose contract holds for the graph's dims.

The standard Attention operator appends to the cache itself and takes tokens as they come from the projection, so the cache
write before it, and the arrangement by head, are part of it.
"""

import math
from collections.abc import Sequence
from typing import Any

from fuser.dtypes import DType
from fuser.graph import FUSER, Node, Value
from fuser.patterns.attention import LEAST, attention
from fuser.patterns.cache_write import cache_write
from fuser.patterns.heads import arranged, as_tokens
from fuser.patterns.rotary import embedded
from fuser.patterns.rotary_cache_write import rotary_cache_write


@attention.lower("ort", opset=23)
def _(
    op: Any, q: Any, k: Any, v: Any, mask: Any, *, heads: Sequence[int], scale: float, softcap: float, guarded: bool, merged: bool
) -> Any:  # fmt: skip
    # Not all versions of ONNX Runtime mask after the soft-cap. In float16 its operator rounds more than the nodes it replaces
    # do (on the CPU the error was up to 1.6 times the unfused model's).
    if op.opset < 23 or q.dtype is DType.FLOAT16 or (softcap and mask is not None):
        return attention.lowerings["functions"](
            op, q, k, v, mask, heads=heads, scale=scale, softcap=softcap, guarded=guarded, merged=merged
        )
    H, G = heads
    write = cached(op.node, q, k, v)
    given = {"scale": scale, "softcap": softcap}
    T, S = k.shape[-2] if k.rank == 4 else k.shape[1], q.shape[-2] if q.rank == 4 else q.shape[1]
    bounded = None if mask is None else op.once(("bounded", S, T), lambda op: _bounded(op, mask, S, T), mask)
    if write is not None:
        tokens = _new_tokens(op, write, H, G)
        y, present_k, present_v = op.Attention(
            *tokens, bounded, *write.inputs[-2:], **given, q_num_heads=H, kv_num_heads=G, outputs=3
        )
        op.take_over(write, {len(write.outputs) - 2: present_k, len(write.outputs) - 1: present_v})
        is_merged = True
    else:
        is_merged = merged and {q.rank, k.rank, v.rank} == {3}
        if is_merged:
            given |= {"q_num_heads": H, "kv_num_heads": G}
        else:
            q, k, v = arranged(op, q, H), arranged(op, k, G), arranged(op, v, G)
        y = op.Attention(q, k, v, bounded, **given)
    if guarded and mask is not None and _excludes(mask):
        attends = op.once("attends", lambda op: _attends(op, mask), mask)
        if is_merged:
            attends = op.once("attends by token", lambda op: op.Squeeze(attends, axes=(1,)), attends)
        y = op.Where(attends, y, op.constant(0.0, q.dtype))
    if is_merged == merged:
        return y
    return as_tokens(op, y) if merged else arranged(op, y, H)


def cached(node: Node, q: Value, k: Value, v: Value) -> Node | None:
    """The fused cache write before an attention, if nothing else reads what it makes."""
    write = k.producer
    if write is None or write.domain != FUSER or write.op not in (cache_write.name, rotary_cache_write.name):
        return None
    if (k, v) != tuple(write.outputs[-2:]) or any(value.captured or value.measured for value in write.outputs):
        return None
    if write.op == rotary_cache_write.name and (q is not write.outputs[0] or q.is_output):
        return None
    return write if all(value.consumers == [node] for value in write.outputs) else None


def _new_tokens(op: Any, write: Node, H: int, G: int) -> tuple[Any, Any, Any]:
    """Queries, keys and values [B, S, heads * width], turned where the write turns them."""
    if write.op == cache_write.name:
        assert op.node is not None
        q, k, v = op.node.inputs[0], *write.inputs[:2]
        return as_tokens(op, q), as_tokens(op, k), as_tokens(op, v)
    q, k, v, cos, sin = write.inputs[:5]
    q, k = (embedded(op, x, cos, sin, heads, **write.attributes) for x, heads in ((q, H), (k, G)))
    return q, k, as_tokens(op, v)


def _bounded(op: Any, mask: Value, S: Any, T: Any) -> Any:
    """A mask as the operator takes it: of scores [.., S, T], and no number that some versions take for minus infinity."""
    if mask.dtype is not DType.BOOL and mask.dtype is not None:
        mask = op.Max(mask, op.constant(LEAST[mask.dtype], mask.dtype))
    assert mask.shape is not None
    if mask.shape[-2:] != (S, T):  # of the last two dims it broadcasts neither
        mask = op.Expand(mask, shape=(*mask.shape[:-2], S, T))
    return mask


def _attends(op: Any, mask: Value) -> Any:
    """Which rows may attend to something; of others versions of ONNX Runtime make zeros, the mean or no number."""
    if mask.dtype is DType.BOOL:
        return op.Cast(op.ReduceMax(op.Cast(mask, to=op.FLOAT), axes=(-1,), keepdims=1), to=DType.BOOL.onnx)
    return op.Not(op.IsInf(op.ReduceMax(mask, axes=(-1,), keepdims=1)))


def _excludes(mask: Value) -> bool:
    """Whether a mask may be minus infinity: not where it chooses between two finite numbers."""
    if mask.dtype is DType.BOOL or mask.producer is None or not mask.producer.is_a("Where"):
        return True
    numbers = [None if value is None else value.scalar for value in mask.producer.inputs[1:]]
    return not all(number is not None and math.isfinite(number) for number in numbers)
