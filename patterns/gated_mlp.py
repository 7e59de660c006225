"""The gate of a gated MLP: y = activation(gate) * up (SwiGLU, GeGLU). arXiv:2002.05202."""

from typing import Any

from torch import Tensor

from fuser.fused import FusedOp, fused_op
from fuser.pattern import Match, applies
from fuser.patterns.gelu import gelu
from fuser.patterns.gelu_tanh import gelu_tanh
from fuser.patterns.silu import silu

ACTIVATIONS: dict[str, FusedOp] = {activation.name: activation for activation in (silu, gelu, gelu_tanh)}


@fused_op("gate[*B, F], up[*B, F] -> y[*B, F]")
def gated_mlp(gate: Tensor, up: Tensor, *, activation: str) -> Tensor:
    """activation(gate) * up for gate, up [*B, F]; `activation` is silu, gelu or gelu_tanh."""
    activated: Tensor = ACTIVATIONS[activation].reference(gate)
    return activated * up


def _declare(activation: FusedOp) -> None:
    @gated_mlp.source
    def source(gate: Any, up: Any) -> Any:
        return activation(gate) * up

    @source.attributes
    def _(m: Match) -> dict[str, Any]:
        applies(m.up.constant is None)  # scaling an activation is no gate
        return {"activation": activation.name}


for _activation in ACTIVATIONS.values():
    _declare(_activation)


@gated_mlp.lower("ort")
def _(op: Any, gate: Any, up: Any, *, activation: str) -> Any:
    return op.Mul(ACTIVATIONS[activation].lowerings["ort"](op, gate), up)


@gated_mlp.lower("onnx", opset=20)
def _(op: Any, gate: Any, up: Any, *, activation: str) -> Any:
    return op.Mul(ACTIVATIONS[activation].lowering("onnx")(op, gate), up)


@gated_mlp.lower("functions")
def _(op: Any, gate: Any, up: Any, *, activation: str) -> Any:
    return op.Mul(ACTIVATIONS[activation].lowerings["functions"](op, gate), up)


gated_mlp.examples(*({"B": (2, 3), "F": 20, "activation": name} for name in ACTIVATIONS))
