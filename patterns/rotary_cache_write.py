"""Rotary embedding of queries and keys together with the cache write: what happens between projection and attention."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from fuser.dims import Shape
from fuser.fused import fused_op
from fuser.graph import Value
from fuser.pattern import Match, capture, either, joined, keep, op, optional, require
from fuser.patterns.attention import attention
from fuser.patterns.cache_write import STATE, appended, cache_write
from fuser.patterns.heads import arranged, by_head, require_heads, shape_by_head, split_heads
from fuser.patterns.rotary import rotary


@fused_op(
    "q[*Q], k[*K], v[*V], cos[*C], sin[*C], past_k[B, G, P, Dh], past_v[B, G, P, Dv]"
    " -> turned[B, H, S, Dh], present_k[B, G, T, Dh], present_v[B, G, T, Dv]",
    state=STATE,
)
def rotary_cache_write(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, past_k: Tensor, past_v: Tensor, *,
    rotary_dim: int, interleaved: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Queries turned, by head; keys turned and appended to past_k; values appended to past_v.

    q [B, H, S, Dh] or [B, S, H Dh]; k, v likewise with G heads; cos, sin as for `rotary`; past_k, past_v [B, G, P, D].
    """
    q, k = (by_head(x, x.shape[-1] // past_k.shape[-1]) for x in (q, k))
    q, k = (rotary.reference(x, cos, sin, rotary_dim=rotary_dim, interleaved=interleaved) for x in (q, k))
    return q, *cache_write.reference(k, v, past_k, past_v)


@rotary_cache_write.shapes
def _(bound: dict[str, Any], inputs: Sequence[Value | None], **attributes: Any) -> list[Shape]:
    q, k, v, _, _, past_k, past_v = ((value.shape or ()) if value is not None else () for value in inputs)
    heads = q[1] if len(q) == 4 else q[2] // past_k[3]
    return [shape_by_head(q, heads), appended(past_k, k), appended(past_v, v)]


@rotary_cache_write.source
def source(
    q: Any, k: Any, v: Any, cos: Any, sin: Any, key_cos: Any, key_sin: Any, past_k: Any, past_v: Any, mask: Any
) -> Any:
    captured = {name: capture(name) for name in ("rotary_dim", "interleaved")}
    by_token = [keep(op.Unsqueeze(table, axes=(2,))) for table in (cos, sin)]

    def turned(x: Any, cos: Any, sin: Any) -> Any:
        """After they are arranged by head, or before."""
        before = op.Transpose(rotary(op.Reshape(x), *by_token, **captured), perm=(0, 2, 1, 3))
        return either(rotary(split_heads(x), cos, sin, **captured), before)

    queries = turned(q, cos, sin)
    present_k, present_v = cache_write(turned(k, key_cos, key_sin), v, past_k, past_v)
    return joined(queries, present_k, present_v, by=attention(queries, present_k, present_v, optional(mask)))


@source.attributes
def _(m: Match) -> dict[str, Any]:
    for name in ("cos", "sin"):
        own = m.values.get(f"key_{name}")
        require(
            own in (None, m.values[name]), "rotary_cache_write: keys must be turned by the tables of the queries", own
        )
    groups, width = m.past_k.shape[1], m.past_k.shape[3]
    require_heads("rotary_cache_write", "k", m.k, groups)
    require_heads("rotary_cache_write", "q", m.q, m.q.shape[1] if m.q.rank == 4 else m.q.shape[2] // width)
    return m.attributes


@rotary_cache_write.lower("functions")
def _(
    op: Any, q: Any, k: Any, v: Any, cos: Any, sin: Any, past_k: Any, past_v: Any, *, rotary_dim: int, interleaved: bool
) -> Any:
    q, k = (arranged(op, x, x.shape[-1] // past_k.shape[3]) for x in (q, k))
    turn = rotary.lowerings["functions"]
    q, k = (turn(op, x, cos, sin, rotary_dim=rotary_dim, interleaved=interleaved) for x in (q, k))
    return q, *cache_write.lowerings["functions"](op, k, v, past_k, past_v)


_SIZES = {"B": 2, "G": 2, "S": 3, "P": 5, "Dh": 16, "Dv": 12}
_HEADS = {**_SIZES, "Q": ("B", 4, "S", 16), "K": ("B", 2, "S", 16), "V": ("B", 2, "S", 12)}
_TOKENS = {**_SIZES, "Q": ("B", "S", 64), "K": ("B", "S", 32), "V": ("B", "S", 24)}
rotary_cache_write.examples(
    {**_HEADS, "C": ("B", 1, "S", 8), "rotary_dim": 16, "interleaved": False},
    {**_TOKENS, "C": ("B", "S", 8), "rotary_dim": 16, "interleaved": False},
    {**_TOKENS, "C": ("B", "S", 6), "rotary_dim": 12, "interleaved": True},
)
