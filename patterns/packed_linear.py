"""Several linear maps of one input as one: y_1, y_2, ... = split(x @ [W_1 | W_2 | ...] + [b_1 | b_2 | ...]).

What is packed is decided by what the results are for: q, k and v meet in one attention, gate and up in one gate.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fuser.constants import Array, Constant, Joined
from fuser.dims import Shape
from fuser.fused import Source, fused_op
from fuser.graph import FUSER, MICROSOFT, Node, Value, is_static
from fuser.pattern import Match, applies, maybe, op, require
from fuser.patterns.gated_mlp import gated_mlp


@fused_op("x[*B, D], weight[D, N], bias[N]? -> *y[*B, N]")
def packed_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, sizes: Sequence[int], role: str = "qkv"
) -> list[Tensor]:
    """x [*B, D] @ weight [D, N] + bias [N], split along the last axis into `sizes`, which add up to N."""
    y = x @ weight
    return list(torch.split(y if bias is None else y + bias, list(sizes), dim=-1))


@packed_linear.shapes
def _(bound: dict[str, Any], inputs: Sequence[Value | None], *, sizes: Sequence[int], role: str) -> list[Shape]:
    require(sum(sizes) == bound["N"], f"packed_linear: sizes must add up to N={bound['N']}, got {tuple(sizes)}")
    lead = tuple(bound[f"*B.{i}"] for i in range(bound["*B"]))
    return [(*lead, size) for size in sizes]


@packed_linear.kind
def _(node: Node) -> str:
    return f"{node.attributes['role']}_linear"


CONTRACTIONS = {
    (FUSER, "attention"),
    ("", "Attention"),
    ("", "Einsum"),
    (MICROSOFT, "MultiHeadAttention"),
    (MICROSOFT, "GroupQueryAttention"),
}


def attentions(start: Value) -> set[Node]:
    """The contractions of two activations that `start` flows into before it meets another weight.

    In softmax(q k^T) v, all of q, k and v flow into the second product; a gate or an up projection flows into none.
    """
    found: set[Node] = set()
    seen: set[tuple[Node, int]] = set()
    pending = [(node, 0) for node in start.consumers]
    while pending:
        node, depth = pending.pop()
        if (node, depth) in seen or node.is_a("packed_linear", FUSER):
            continue
        seen.add((node, depth))
        if node.is_a("MatMul"):
            if is_static(node.input(0)) or is_static(node.input(1)):
                continue
            found.add(node)
            depth += 1
        elif (node.domain, node.op) in CONTRACTIONS:
            found.add(node)
            depth += 2
        if depth < 2:
            pending.extend((user, depth) for value in node.outputs for user in value.consumers)
    return found


def _role(outputs: Sequence[Value]) -> str | None:
    """`qkv` where all results meet in one attention, `gate_up` where two meet in one gate."""
    if set.intersection(*(attentions(value) for value in outputs)):
        return "qkv"
    gates = [user for user in outputs[0].consumers if user.is_a(gated_mlp.name, FUSER)]
    return "gate_up" if len(outputs) == 2 and any(outputs[1] in gate.inputs for gate in gates) else None


def _linear(x: Any, weight: Any, bias: Any) -> Any:
    return maybe((x @ weight) + bias)


@packed_linear.source
def three(x: Any, w0: Any, b0: Any, w1: Any, b1: Any, w2: Any, b2: Any) -> Any:
    return _linear(x, w0, b0), _linear(x, w1, b1), _linear(x, w2, b2)


@packed_linear.source
def two(x: Any, w0: Any, b0: Any, w1: Any, b1: Any) -> Any:
    return _linear(x, w0, b0), _linear(x, w1, b1)


def _declare_separate(source: Source, count: int) -> None:
    def parts(m: Match, letter: str) -> list[Value | None]:
        return [m.values.get(f"{letter}{i}") for i in range(count)]

    @source.attributes
    def _(m: Match) -> dict[str, Any]:
        weights = parts(m, "w")
        applies(all(w is not None and w.rank == 2 for w in weights))
        places = [value.producer.place or 0.0 for value in m.outputs if value.producer is not None]
        applies(places == sorted(places))  # one order of the same set is enough
        role = _role(m.outputs)
        applies(role is not None)
        for value in (*weights, *parts(m, "b")):
            require(
                value is None or value.constant is not None,
                "packed_linear: weights and biases must be constants",
                value,
            )
        return {
            "sizes": tuple(w.constant.shape[1] for w in weights if w is not None and w.constant is not None),
            "role": role,
        }

    @source.inputs
    def _(m: Match) -> dict[str, Value | Constant | None]:
        weights = [w.constant for w in parts(m, "w") if w is not None and w.constant is not None]
        biases = [None if b is None else b.constant for b in parts(m, "b")]
        for weight, bias in zip(weights, biases, strict=True):
            width = weight.shape[1]
            require(weight.dtype is weights[0].dtype, "packed_linear: weights must have one dtype")
            require(bias is None or bias.shape == (width,), f"packed_linear: a bias must be [{width}]")
        joined = Joined(tuple(weights))
        if not any(biases):
            return {"weight": joined, "bias": None}
        zeros = [Array.of(np.zeros(w.shape[1]), w.dtype) for w in weights]
        return {"weight": joined, "bias": Joined(tuple(b or z for b, z in zip(biases, zeros, strict=True)))}


_declare_separate(three, 3)
_declare_separate(two, 2)


def _declare_packed(count: int) -> None:
    @packed_linear.source
    def packed(x: Any, weight: Any, bias: Any) -> Any:
        return op.Split(_linear(x, weight, bias), axis=-1, outputs=count)

    @packed.attributes
    def _(m: Match) -> dict[str, Any]:
        applies(m.weight.rank == 2 and m.weight.constant is not None)
        role = _role(m.outputs)
        applies(role is not None)
        return {"sizes": tuple(value.shape[-1] for value in m.outputs if value.shape), "role": role}


_declare_packed(3)
_declare_packed(2)


@packed_linear.lower("ort")
def _(op: Any, x: Any, weight: Any, bias: Any, *, sizes: Sequence[int], role: str) -> Any:
    y = op.MatMul(x, weight)
    return op.Split(y if bias is None else op.Add(y, bias), axis=-1, split=tuple(sizes), outputs=len(sizes))


@packed_linear.lower("functions")
def _(op: Any, x: Any, weight: Any, bias: Any, *, sizes: Sequence[int], role: str) -> Any:
    return packed_linear.lowerings["ort"](op, x, weight, bias, sizes=sizes, role=role)


packed_linear.examples(
    {"B": (2, 3), "D": 20, "N": 36, "sizes": (20, 8, 8), "role": "qkv"},
    {"B": (1, 4), "D": 20, "N": 36, "sizes": (20, 8, 8), "role": "qkv", "without": ("bias",)},
    {"B": (7,), "D": 12, "N": 66, "sizes": (33, 33), "role": "gate_up"},
    {"B": (7,), "D": 12, "N": 66, "sizes": (33, 33), "role": "gate_up", "without": ("bias",)},
)
