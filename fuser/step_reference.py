"""What the kernels of programs compute, by torch: the reference that steps over pages run by where there is no GPU.

Each function takes a family's description and gives what its kernel's `launch` is: a function of the same tensors. Sums are
in float32. A row depends on its own tokens alone, and a sequence's attention on its own pages.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as functional
from torch import Tensor

from fuser.codegen.attention import Attention
from fuser.codegen.elementwise import NORMS, Computed, Elementwise, Row
from fuser.codegen.embedding import Embedding
from fuser.codegen.rotary import Rotary
from fuser.errors import UnsupportedOperator
from fuser.runtime.kv_groups import dequantized, quantized

Launch = Callable[..., None]

OPERATORS: dict[str, Callable[..., Tensor]] = {
    "Add": lambda a, b: a + b, "Sub": lambda a, b: a - b, "Mul": lambda a, b: a * b, "Div": lambda a, b: a / b,
    "Neg": torch.neg, "Abs": torch.abs, "Sqrt": torch.sqrt, "Rsqrt": torch.rsqrt, "Reciprocal": torch.reciprocal,
    "Exp": torch.exp, "Log": torch.log, "Sigmoid": torch.sigmoid, "Tanh": torch.tanh, "Erf": torch.erf,
    "Relu": torch.relu, "Max": lambda a, b: torch.maximum(*_tensors(a, b)), "Min": lambda a, b: torch.minimum(*_tensors(a, b)),
    "Clip": lambda x, low, high: torch.minimum(torch.maximum(*_tensors(x, low)), torch.as_tensor(high)),
    "Cast": lambda x: x, "Identity": lambda x: x, "silu": functional.silu, "gelu": functional.gelu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
}  # fmt: skip


def _tensors(a: Any, b: Any) -> tuple[Tensor, Tensor]:
    return torch.as_tensor(a), torch.as_tensor(b)


def reference(what: Any) -> Launch:
    """The function that computes what a kernel of this description does.

    Raises:
        UnsupportedOperator: there is none.
    """
    functions: dict[type, Callable[[Any], Launch]] = {
        Elementwise: elementwise, Embedding: embedding, Rotary: rotary, Attention: attention
    }  # fmt: skip
    if type(what) in functions:
        return functions[type(what)](what)
    raise UnsupportedOperator(f"no reference kernel computes {type(what).__name__}")


def elementwise(what: Elementwise) -> Launch:
    """Chains of operators and norms over rows."""

    def launch(*tensors: Tensor) -> None:
        given = [
            x.float().reshape(len(x), what.groups, what.D) if isinstance(kind, Row) else x.float()
            for kind, x in zip(what.inputs, tensors, strict=False)
        ]
        made: list[Tensor] = []
        for step in what.steps:
            operands = [
                (given if operand[0] == "input" else made)[operand[1]] if isinstance(operand, tuple) else operand
                for operand in step.operands
            ]
            made.append(_computed(step, operands, what.D))
        for index, y in zip(what.outputs, tensors[len(what.inputs) :], strict=True):
            y.copy_(made[index].flatten(-2))

    return launch


def _computed(step: Computed, operands: list[Any], D: int) -> Tensor:
    if step.op == "gated":
        gated: Tensor = OPERATORS[step.activation](operands[0]) * operands[1]
        return gated
    if step.op not in NORMS:
        found: Tensor = OPERATORS[step.op](*operands)
        return found
    x, weight, bias, *_ = *operands, None, None
    normed: Tensor
    if step.op == "layer_norm":
        normed = functional.layer_norm(x, (D,), weight, bias, step.eps)
    else:
        normed = functional.rms_norm(x, (D,), weight, step.eps)
    return normed


def embedding(what: Embedding) -> Launch:
    """Rows of tables, added."""

    def launch(*tensors: Tensor) -> None:
        *pairs, y = tensors
        total = None
        for ids, table, rows in zip(pairs[::2], pairs[1::2], what.rows, strict=True):
            known = (ids >= 0) & (ids < min(rows, len(table)))
            found = functional.embedding(torch.where(known, ids, 0), table).float()
            found = torch.where(known[:, None], found, torch.nan)
            total = found if total is None else total + found
        assert total is not None
        y.copy_(total * what.scale)

    return launch


def rotary(what: Rotary) -> Launch:
    """Rotary embedding, and the write of keys and values to their slots."""
    D, names = what.head_dim, what.tensors

    def launch(*tensors: Tensor) -> None:
        given = dict(zip(names, tensors, strict=True))
        positions, slots = given["positions"].long(), given["slot_mapping"].long()
        q, k, v = (given[name].reshape(len(positions), -1, D) for name in "qkv")
        if what.kv_group:
            k = k.float()  # rounded once
        if what.rotary_dim:
            cos, sin = (given[name][positions][:, None] for name in ("cos", "sin"))
            q, k = (_turned(x, cos, sin, what) for x in (q, k))
        given["turned"].view(-1, what.heads, D).copy_(q)
        kept = slots >= 0
        for name, rows in (("k", k), ("v", v)):
            cache, made = given[f"{name}_cache"], rows[kept]
            if what.kv_group:
                made, scales = quantized(made, what.kv_group)
                page, offset = slots[kept] // what.page, slots[kept] % what.page
                given[f"{name}_scale"][page, :, :, offset] = scales
            cache.flatten(0, 1)[slots[kept]] = made.to(cache.dtype)

    return launch


def _turned(x: Tensor, cos: Tensor, sin: Tensor, what: Rotary) -> Tensor:
    """Heads [n, H, Dh], their first channels turned by angles [n, 1, R]."""
    turning, rest = x[..., : what.rotary_dim].float(), x[..., what.rotary_dim :]
    a, b = (turning[..., 0::2], turning[..., 1::2]) if what.interleaved else turning.chunk(2, -1)
    pair = a * cos - b * sin, b * cos + a * sin
    turned = torch.stack(pair, -1).flatten(-2) if what.interleaved else torch.cat(pair, -1)
    return torch.cat([turned.to(x.dtype), rest], -1)


def attention(what: Attention) -> Launch:
    """Attention over pages, for any number of queries a sequence; a sequence without any is passed over."""
    if what.alibi or what.sinks:
        raise UnsupportedOperator("no reference kernel computes attention with slopes or sinks")
    G, D = what.kv_heads, what.head_dim

    def launch(q: Tensor, *tensors: Any) -> None:
        caches, scales = tensors[:2], tensors[2:4] if what.kv_group else (None, None)
        block_table, context_lens, query_starts, _, y = tensors[len(what.caches) :]
        starts = query_starts.tolist()
        for row, context in enumerate(context_lens.tolist()):
            first, last = starts[row], starts[row + 1]
            count = last - first
            if not count:
                continue
            oldest = max(context - count + 1 - what.window, 0) // what.page if what.window else 0
            pages = block_table[row, oldest : -(-context // what.page)]
            begin = oldest * what.page
            keys, values = (
                (cache[pages].float() if scale is None else dequantized(cache[pages], scale[pages])).flatten(0, 1)
                for cache, scale in zip(caches, scales, strict=True)
            )
            keys, values = keys[: context - begin], values[: context - begin]
            queries = q[first:last].view(count, G, what.group, D).float()
            scores = torch.einsum("sghd,tgd->ghst", queries, keys) * what.scale
            if what.softcap:
                scores = torch.tanh(scores / what.softcap) * what.softcap
            place = torch.arange(context - count, context, device=q.device)[:, None]
            seen = torch.arange(begin, context, device=q.device)[None]
            hidden = seen > place
            if what.window:
                hidden |= seen <= place - what.window
            weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
            y[first:last] = torch.einsum("ghst,tgd->sghd", weights, values).reshape(count, -1).to(y.dtype)

    return launch
