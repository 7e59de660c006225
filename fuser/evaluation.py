"""Evaluating nodes of a graph in torch, for constant folding and for the check of every rewrite."""

from collections.abc import Mapping, Sequence
from typing import Any

import sympy
import torch

from fuser import dims, operators
from fuser.constants import Constant
from fuser.errors import UnsupportedOperator
from fuser.fused import REGISTRY
from fuser.graph import FUSER, Node
from fuser.tensors import to_tensor

Symbols = Mapping[sympy.Symbol, int]


def evaluate(
    node: Node,
    inputs: Sequence[torch.Tensor | None],
    symbols: Symbols,
    *,
    opset: int,
    float_dtype: torch.dtype | None = None,
) -> list[torch.Tensor | None]:
    """A node's outputs. `symbols` give the sizes of the dims its attributes mention.

    With `float_dtype`, everything that would choose a floating type takes that one.

    Raises:
        FuserError: the operator, or this use of it, is outside the table.
    """
    attributes = {name: _plain(value, symbols) for name, value in node.attributes.items()}
    if node.is_a("Reshape") and "shape" in attributes:
        attributes |= _sized(node, attributes, inputs[0])
    if node.carried:
        raise UnsupportedOperator(f"{node.op} carries attributes fuser does not interpret")
    if node.domain != FUSER:
        return operators.evaluate(
            node.op, node.domain, attributes, inputs, outputs=len(node.outputs), opset=opset, float_dtype=float_dtype
        )
    if node.op == "Rsqrt" and inputs[0] is not None:
        return [torch.rsqrt(inputs[0])]
    if node.op == "Dims":
        return [torch.tensor(attributes["dims"], dtype=torch.int64)]
    return list(REGISTRY[node.op].evaluate(inputs, attributes))


def _sized(node: Node, attributes: Mapping[str, Any], x: torch.Tensor | None) -> dict[str, Any]:
    """A Reshape's target where a dim that is computed turns out to be 0: a size, not the sign to keep the input's."""
    stated, shape = node.attributes["shape"], attributes["shape"]
    if x is None or not any(size == 0 and not isinstance(dim, int) for dim, size in zip(stated, shape, strict=True)):
        return {}
    keeps = not attributes.get("allowzero", 0)
    kept = [
        x.shape[axis] if keeps and isinstance(dim, int) and dim == 0 else size
        for axis, (dim, size) in enumerate(zip(stated, shape, strict=True))
    ]
    return {"shape": kept, "allowzero": 1}


def _plain(value: Any, symbols: Symbols) -> Any:
    if isinstance(value, Constant):
        return to_tensor(value.numpy())
    if isinstance(value, sympy.Expr):
        return dims.concrete((value,), symbols)[0]
    if isinstance(value, tuple) and any(isinstance(item, sympy.Expr) for item in value):
        return dims.concrete(value, symbols)
    return list(value) if isinstance(value, tuple) else value
