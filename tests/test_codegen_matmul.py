"""Products of many tokens against float64, in Triton's interpreter or on the GPU that is there."""

import pytest

from fuser.codegen.matmul import Matmul, Tiles, matmul
from fuser.errors import UsageError
from fuser.patterns.gated_mlp import gated_mlp
from tests.test_codegen_kernels import DTYPES, _cache_folder, close, drawn, launch, unwritten  # noqa: F401


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("M", [0, 1, 37, 70])
@pytest.mark.parametrize("by_input", [False, True])
@pytest.mark.parametrize(
    "parts",
    [
        {},
        {"bias": True, "residual": True},
        {"activation": "gelu", "bias": True},
        {"activation": "silu", "gated": True, "bias": True, "residual": True},
    ],
    ids=lambda parts: "+".join(parts) or "plain",
)
def test_matmul(dtype: str, M: int, by_input: bool, parts: dict[str, object]) -> None:
    what = Matmul(70, 90, dtype, by_input, **parts)  # type: ignore[arg-type]
    W = drawn(what.N, what.K, dtype=dtype, scale=what.K**-0.5)
    tensors = {
        "x": drawn(M, what.K + 7, dtype=dtype, scale=2.0)[:, : what.K],
        "weight": W.T.contiguous() if by_input else W,
        "bias": drawn(what.N, dtype=dtype),
        "residual": drawn(M, what.width, dtype=dtype),
        "y": unwritten(M, what.width, dtype=dtype),
    }
    launch(matmul(what, Tiles(16, 16, 32, GROUP=2, num_warps=4)), *(tensors[name] for name in what.tensors))
    if not M:
        return
    expected = tensors["x"].double() @ W.double().T
    if what.bias:
        expected = expected + tensors["bias"].double()
    if what.activation:
        ones = expected.new_ones(expected.shape)
        gate, up = expected.chunk(2, -1) if what.gated else (expected, ones)
        expected = gated_mlp.reference(gate, up, activation=what.activation)
    if what.residual:
        expected = expected + tensors["residual"].double()
    close(tensors["y"], expected, dtype)


def test_a_gate_has_an_activation_and_two_halves() -> None:
    with pytest.raises(UsageError, match="even width and an activation"):
        matmul(Matmul(7, 8, gated=True, activation="silu"))
    with pytest.raises(UsageError, match="even width and an activation"):
        matmul(Matmul(8, 8, gated=True))
