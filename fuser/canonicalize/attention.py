"""Attention and rotary operators in one form: by head, the cache appended and the causal mask written beside them."""

from typing import Any

from fuser import dims
from fuser.canonicalize.rules import become, emit, rule, sole
from fuser.constants import Array
from fuser.dims import Dim
from fuser.dtypes import DType
from fuser.graph import FUSER, MICROSOFT, Graph, Node, Value

BY_HEAD = (0, 2, 1, 3)


def _by_head(graph: Graph, node: Node, x: Value, heads: int) -> Value | None:
    """[B, S, heads * Dh] as [B, heads, S, Dh]."""
    shape = x.shape
    if shape is None or len(shape) == 4:
        return x
    if len(shape) != 3 or not isinstance(shape[2], int) or not heads or shape[2] % heads:
        return None
    split = emit(graph, node, "Reshape", [x], {"shape": (*shape[:2], heads, shape[2] // heads)})
    return emit(graph, node, "Transpose", [split], {"perm": BY_HEAD})


def _by_token(graph: Graph, node: Node, x: Value) -> Value:
    """[B, heads, S, Dh] as [B, S, heads * Dh]."""
    rows = emit(graph, node, "Transpose", [x], {"perm": BY_HEAD})
    assert rows.shape is not None
    return emit(graph, node, "Reshape", [rows], {"shape": (*rows.shape[:2], dims.mul(*rows.shape[2:]))})


@rule("Attention")
def _attention(graph: Graph, node: Node) -> bool:
    """Tokens are arranged by head before it, new keys and values appended to the past, what is_causal says is a mask."""
    q, k, v, mask, past_k, past_v = (node.input(i) for i in range(6))
    options = node.attributes
    plain = (q is not None and q.rank == 4) and past_k is None and not options.get("is_causal")
    if (
        plain
        or q is None
        or k is None
        or v is None
        or node.input(6) is not None
        or (past_k is None) != (past_v is None)
    ):
        return False
    if any(value.captured for value in node.outputs) or any(v.uses or v.is_output for v in node.outputs[3:]):
        return False
    if any(options.get(name, -1) != -1 for name in ("left_window_size", "right_window_size")):
        return False
    if any(x is not None and x.shape is None for x in (q, k, v, past_k, past_v)):
        return False
    heads, groups = options.get("q_num_heads", 0), options.get("kv_num_heads", 0)
    arranged = [_by_head(graph, node, x, n) for x, n in ((q, heads), (k, groups), (v, groups))]
    if any(x is None for x in arranged):
        return False
    query, key, value = (x for x in arranged if x is not None)
    past: Dim = 0
    if past_k is not None and past_v is not None:
        assert past_k.shape is not None
        past = past_k.shape[2]
        key = emit(graph, node, "Concat", [past_k, key], {"axis": -2})
        value = emit(graph, node, "Concat", [past_v, value], {"axis": -2})
    if options.get("is_causal"):
        mask = _causal(graph, node, query, key, past, mask)
    kept: dict[str, Any] = {
        name: options[name] for name in ("scale", "softcap", "softmax_precision") if name in options
    }
    y = emit(
        graph, node, "Attention", [query, key, value, *([mask] if mask is not None else [])], {"is_causal": 0, **kept}
    )
    result = _by_token(graph, node, y) if q.rank == 3 else y
    for old, new in zip(node.outputs, (result, key, value), strict=False):
        new.dtype = new.dtype or old.dtype
        graph.replace(old, new)
    graph.remove(node)
    return True


def _causal(graph: Graph, node: Node, query: Value, key: Value, past: Dim, mask: Value | None) -> Value:
    """What a mask allows, and the future does not forbid: query i stands at position past + i."""
    assert query.shape is not None and key.shape is not None

    def span(start: Dim, end: Dim) -> Value:
        ends = [emit(graph, node, "Dims", [], {"dims": bound}, domain=FUSER) for bound in (start, end)]
        return emit(graph, node, "Range", [*ends, graph.constant(Array.of(1, DType.INT64))])

    rows = emit(graph, node, "Unsqueeze", [span(past, dims.add(past, query.shape[2]))], {"axes": (-1,)})
    allowed = emit(graph, node, "LessOrEqual", [span(0, key.shape[2]), rows])
    if mask is None:
        return allowed
    if mask.dtype is DType.BOOL:
        return emit(graph, node, "And", [allowed, mask])
    assert mask.dtype is not None
    nothing = graph.constant(Array.of(-float("inf"), mask.dtype))
    return emit(graph, node, "Where", [allowed, mask, nothing])


@rule("Where")
def _above_merging(graph: Graph, node: Node) -> bool:
    """What is chosen row by row is chosen before heads are merged."""
    allowed, merged, other = node.inputs
    merge = merged.producer if merged is not None else None
    turn = merge.inputs[0].producer if merge is not None and merge.inputs and merge.inputs[0] is not None else None
    if allowed is None or merge is None or turn is None or other is None or other.scalar is None or other.shape != ():
        return False
    if not merge.is_a("Reshape") or not turn.is_a("Transpose") or turn.attributes.get("perm") != BY_HEAD:
        return False
    if (
        allowed.rank != 3
        or allowed.shape is None
        or allowed.shape[2] != 1
        or not sole(merged, node)
        or node.output.captured
    ):
        return False
    if (
        merged is None
        or merged.rank != 3
        or not sole(merge.inputs[0], merge)
        or len(merge.inputs) > 1
        or turn.inputs[0] is None
    ):
        return False
    rows = emit(graph, node, "Unsqueeze", [allowed], {"axes": (1,)})
    chosen = emit(graph, node, "Where", [rows, turn.inputs[0], other])
    return become(graph, node, _by_token(graph, node, chosen))


@rule("RotaryEmbedding")
def _rotary(graph: Graph, node: Node) -> bool:
    """Of tokens by head; a row of the tables for each token."""
    x, cos, sin, positions = (node.input(i) for i in range(4))
    if x is None or cos is None or sin is None or x.shape is None or node.output.captured:
        return False
    return (positions is not None or x.rank == 3) and _turned(graph, node, x, cos, sin, positions)


@rule("RotaryEmbedding", domain=MICROSOFT)
def _contributed_rotary(graph: Graph, node: Node) -> bool:
    """ONNX Runtime's own takes positions and tables in another order."""
    x, positions, cos, sin = (node.input(i) for i in range(4))
    if x is None or positions is None or cos is None or sin is None or x.shape is None or node.output.captured:
        return False
    if positions.rank != 2 or node.attributes.get("is_packed_batching") or node.attributes.get("scale", 1.0) != 1.0:
        return False
    return _turned(graph, node, x, cos, sin, positions)


def _turned(graph: Graph, node: Node, x: Value, cos: Value, sin: Value, positions: Value | None) -> bool:
    heads = node.attributes.get("num_heads", 0)
    part = node.attributes.get("rotary_embedding_dim", 0)
    if x.rank == 3 and not heads and not part and cos.shape and isinstance(cos.shape[-1], int) and x.shape:
        heads = x.shape[2] // (2 * cos.shape[-1]) if isinstance(x.shape[2], int) else 0
    arranged = _by_head(graph, node, x, heads)
    if arranged is None:
        return False
    if positions is not None:
        cos, sin = (emit(graph, node, "Gather", [table, positions], {"axis": 0}) for table in (cos, sin))
    options = {"interleaved": node.attributes.get("interleaved", 0), "rotary_embedding_dim": part}
    y = emit(graph, node, "RotaryEmbedding", [arranged, cos, sin], options)
    result = _by_token(graph, node, y) if x.rank == 3 else y
    result.dtype = result.dtype or node.output.dtype
    graph.replace(node.output, result)
    graph.remove(node)
    return True
