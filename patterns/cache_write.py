"""Cache write: new keys and values appended to those of the tokens before, present = [past; new] along the tokens.

The state is declared, so that a runtime may keep it elsewhere, in pages for instance (arXiv:2309.06180).
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fuser import dims
from fuser.dims import Shape
from fuser.fused import fused_op
from fuser.graph import Value
from fuser.pattern import Match, joined, op, optional
from fuser.patterns.attention import attention
from fuser.patterns.heads import arranged, by_head, require_heads, split_heads

STATE = {"past_k": "present_k", "past_v": "present_v"}


@fused_op(
    "k[*K], v[*V], past_k[B, G, P, Dh], past_v[B, G, P, Dv] -> present_k[B, G, T, Dh], present_v[B, G, T, Dv]",
    state=STATE,
)
def cache_write(k: Tensor, v: Tensor, past_k: Tensor, past_v: Tensor) -> tuple[Tensor, Tensor]:
    """k [B, G, S, Dh] or [B, S, G Dh] after past_k [B, G, P, Dh], v likewise after past_v: [B, G, P + S, Dh] each."""
    k, v = (by_head(new, past.shape[1]) for new, past in ((k, past_k), (v, past_v)))
    return torch.cat([past_k, k], 2), torch.cat([past_v, v], 2)


def appended(past: Shape, new: Shape) -> Shape:
    """The shape of `new` after `past`."""
    return (*past[:2], dims.add(past[2], new[1] if len(new) == 3 else new[2]), past[3])


@cache_write.shapes
def _(bound: dict[str, Any], inputs: Sequence[Value | None], **attributes: Any) -> list[Shape]:
    k, v, past_k, past_v = ((value.shape or ()) if value is not None else () for value in inputs)
    return [appended(past_k, k), appended(past_v, v)]


@cache_write.source
def source(q: Any, k: Any, v: Any, past_k: Any, past_v: Any, mask: Any) -> Any:
    present_k = op.Concat(past_k, split_heads(k), axis=-2)
    present_v = op.Concat(past_v, split_heads(v), axis=-2)
    return joined(present_k, present_v, by=attention(q, present_k, present_v, optional(mask)))


@source.attributes
def _(m: Match) -> dict[str, Any]:
    for name in ("k", "v"):
        past = m.values[f"past_{name}"]
        require_heads("cache_write", f"past_{name}", past)
        require_heads("cache_write", name, m.values[name], past.shape[1] if past and past.shape else 0)
    return {}


@cache_write.lower("functions")
def _(op: Any, k: Any, v: Any, past_k: Any, past_v: Any) -> Any:
    return tuple(op.Concat(past, arranged(op, new, past.shape[1]), axis=-2) for new, past in ((k, past_k), (v, past_v)))


_SIZES = {"B": 2, "G": 2, "S": 3, "P": 5, "Dh": 16, "Dv": 12}
cache_write.examples(
    {**_SIZES, "K": ("B", 2, "S", 16), "V": ("B", 2, "S", 12)},
    {**_SIZES, "K": ("B", "S", 32), "V": ("B", "S", 24)},
)
