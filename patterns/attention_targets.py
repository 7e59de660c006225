"""How attention is written for ONNX runtimes: with the strongest operator whose contract holds for the graph's dims.

The standard Attention operator appends to the cache itself and takes tokens as they come from the projection, so the cache
write before it, and the arrangement by head, are part of it.
"""

import math
from collections.abc import Sequence
from typing import Any

from fuser import dims
from fuser.dims import Dim
from fuser.dtypes import DType
from fuser.graph import FUSER, Node, Value
from fuser.patterns.attention import LEAST, attention, least
from fuser.patterns.attention_mask import attention_mask
from fuser.patterns.cache_write import cache_write
from fuser.patterns.heads import arranged, as_tokens
from fuser.patterns.rotary import embedded
from fuser.patterns.rotary_cache_write import rotary_cache_write


@attention.lower("ort", opset=23)
def _(op: Any, q: Any, k: Any, v: Any, mask: Any, **given: Any) -> Any:
    # In float16 both operators round more than the nodes they replace do (on the CPU the error was up to 1.6 times the unfused
    # model's).
    if q.dtype is DType.FLOAT16:
        return attention.lowerings["functions"](op, q, k, v, mask, **given)
    grouped = _group_query_attention(op, q, k, v, mask, **given)
    return attention.lowerings["onnx"](op, q, k, v, mask, **given) if grouped is None else grouped


@attention.lower("onnx", opset=23)
def _(
    op: Any,
    q: Any,
    k: Any,
    v: Any,
    mask: Any,
    *,
    heads: Sequence[int],
    scale: float,
    softcap: float,
    guarded: bool,
    merged: bool,
) -> Any:
    H, G = heads
    given: dict[str, Any] = {"scale": scale, "softcap": softcap}
    # Not all versions of ONNX Runtime mask after the soft-cap.
    if op.opset < 23 or q.dtype is DType.FLOAT16 or (softcap and mask is not None):
        return attention.lowerings["functions"](op, q, k, v, mask, **given, heads=heads, guarded=guarded, merged=merged)
    S, T = (x.shape[2 if x.rank == 4 else 1] for x in (q, k))
    bounded = None if mask is None else op.once(("bounded", S, T), lambda op: _bounded(op, mask, S, T), mask)
    write = cached(op.node, q, k, v)
    by_token = write is not None or (merged and {q.rank, k.rank, v.rank} == {3})
    if by_token:
        given |= {"q_num_heads": H, "kv_num_heads": G}
    if write is not None:
        tokens = _new_tokens(op, write, H, G)
        y, *present = op.Attention(*tokens, bounded, *write.inputs[-2:], **given, outputs=3)
        _take_over(op, write, present)
    elif by_token:
        y = op.Attention(q, k, v, bounded, **given)
    else:
        y = op.Attention(arranged(op, q, H), arranged(op, k, G), arranged(op, v, G), bounded, **given)
    return _finished(op, y, mask, H, guarded, merged)


def _group_query_attention(
    op: Any,
    q: Any,
    k: Any,
    v: Any,
    mask: Any,
    *,
    heads: Sequence[int],
    scale: float,
    softcap: float,
    guarded: bool,
    merged: bool,
) -> Any:
    """ONNX Runtime's GroupQueryAttention, where its contract holds whatever the inputs; None elsewhere.

    It takes several new tokens on a past at batch 1 only, and masks the future itself, which for rows that may attend to
    nothing is not the same: so one new token. Positions are not its business (of a prompt it reads the first alone).
    """
    write = cached(op.node, q, k, v)
    new = q.shape[2 if q.rank == 4 else 1]
    width = k.shape[3] if k.rank == 4 else 0
    if write is None or new != 1 or width % 8 or v.shape[3] != width or q.dtype is not DType.FLOAT32:
        return None
    H, G = heads
    B, T = k.shape[0], k.shape[2]
    window, bias = -1, None
    known = None if mask is None else _closed_form(mask)
    if known is not None and known.input(1) is None and known.attributes["right_window"] <= 0:
        window = known.attributes["left_window"] + 1 or -1
    elif mask is not None:
        bias = op.once(("bias", B), lambda op: _bias(op, mask, B, T), mask)
        if bias is None:
            return None
    total = op.once(("total", T), lambda op: op.Cast(op.dims(T), to=DType.INT32.onnx))
    last = op.once(
        ("last", B, T), lambda op: op.Expand(op.Cast(op.dims(dims.sub(T, 1)), to=DType.INT32.onnx), op.dims((B,)))
    )
    q, k, v = _new_tokens(op, write, H, G)
    options = {"num_heads": H, "kv_num_heads": G, "scale": scale, "softcap": softcap, "local_window_size": window}
    y, *present = op.microsoft.GroupQueryAttention(
        q, k, v, *write.inputs[-2:], last, total, None, None, None, bias, **options, outputs=3
    )
    _take_over(op, write, present)
    return _finished(op, y, None if bias is None else mask, H, guarded, merged)


def _closed_form(mask: Value) -> Node | None:
    """The attention_mask that a mask is, or that chooses between 0 and another number."""
    node = mask.producer
    if node is not None and node.is_a("Where") and node.inputs[0] is not None and node.inputs[1] is not None:
        node = node.inputs[0].producer if node.inputs[1].scalar == 0 else None
    return node if node is not None and node.is_a(attention_mask.name, FUSER) else None


def _bias(op: Any, mask: Value, B: Dim, T: Dim) -> Any:
    """A mask as a number to add, [B or 1, 1, 1, T]; None where it is not one row for all heads."""
    shape = (1,) * (4 - (mask.rank or 0)) + (mask.shape or ())
    if mask.rank not in (2, 4) or shape[1:3] != (1, 1) or shape[0] not in (1, B) or mask.dtype is None:
        return None
    bias: Any = mask
    if mask.dtype is DType.BOOL:
        bias = op.Where(mask, op.constant(0.0, DType.FLOAT32), op.constant(LEAST[DType.FLOAT32], DType.FLOAT32))
    else:
        bias = op.Max(mask, op.constant(LEAST[mask.dtype], mask.dtype))
    return bias if mask.shape == (shape[0], 1, 1, T) else op.Expand(bias, shape=(shape[0], 1, 1, T))


def _take_over(op: Any, write: Node, present: Sequence[Value]) -> None:
    """The attention makes what the cache write made."""
    first = len(write.outputs) - 2
    op.take_over(write, {first: present[0], first + 1: present[1]})


def _finished(op: Any, y: Any, mask: Any, heads: int, guarded: bool, merged: bool) -> Any:
    """The operator's result with zeros where a row may attend to nothing, arranged as it is wanted."""
    if guarded and mask is not None and _excludes(mask):
        attends = op.once("attends", lambda op: _attends(op, mask), mask)
        if y.rank == 3:
            attends = op.once("attends by token", lambda op: op.Squeeze(attends, axes=(1,)), attends)
        y = op.Where(attends, y, op.constant(0.0, y.dtype))
    return as_tokens(op, y) if merged else arranged(op, y, heads)


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
    return mask.dtype is DType.BOOL or math.isinf(least(mask))
