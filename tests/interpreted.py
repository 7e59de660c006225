"""Kernels in Triton's interpreter, against the reference functions: a program of its own, for Triton reads the mode when imported.

TRITON_INTERPRET=1 python -m tests.interpreted linear     # prints {case: relative error} as JSON
"""

import json
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fuser.checking import relative_error
from fuser.codegen import linear
from fuser.codegen.linear import ACTIVATIONS, Linear
from fuser.codegen.source import load
from fuser.fused import REGISTRY
from fuser.patterns import ALL  # noqa: F401  enters the reference functions

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
KERNELS = [
    Linear(),
    Linear(bias=True),
    Linear(norm=True),
    Linear(residual=True),
    Linear(norm=True, activation="silu", gated=True),
    Linear(norm=True, bias=True, activation="gelu_tanh", gated=True, residual=True),
    *(Linear(bias=True, activation=activation) for activation in ACTIVATIONS),
]
SHAPES = [(1, 37, 100), (1, 64, 256), (2, 37, 100), (7, 33, 65), (17, 40, 129), (64, 16, 48)]  # M, N, K


def shapes(dtype: str) -> list[tuple[int, int, int]]:
    """Those that the interpreter computes in a type: its product of bfloat16 tiles multiplies their bits."""
    return [shape for shape in SHAPES if shape[0] == 1 or dtype != "bfloat16"]


def expected(kernel: Linear, given: dict[str, Tensor], eps: float) -> Tensor:
    """What a launch computes, in float64, by the reference functions of the fused operators."""
    exact = {name: tensor.double() for name, tensor in given.items()}
    x = exact["x"]
    if kernel.norm:
        (x,) = REGISTRY["rms_norm"].evaluate([x, exact["gain"]], {"eps": eps})
    y = x @ exact["weight"].T + (exact["bias"] if kernel.bias else 0)
    if kernel.gated:
        gate, up = y.chunk(2, -1)
        (y,) = REGISTRY["gated_mlp"].evaluate([gate, up], {"activation": kernel.activation})
    elif kernel.activation:
        (y,) = REGISTRY[kernel.activation].evaluate([y], {})
    return y + exact["residual"] if kernel.residual else y


def arguments(kernel: Linear, M: int, N: int, K: int, dtype: torch.dtype, device: str = "cpu") -> dict[str, Tensor]:
    """Random tensors for one call."""
    random = torch.Generator().manual_seed(M + N + K)
    columns = 2 * N if kernel.gated else N
    shapes = {"x": (M, K), "weight": (columns, K), "gain": (K,), "bias": (columns,), "residual": (M, N)}
    wanted = {"x", "weight", *(n for n, on in (("gain", kernel.norm), ("bias", kernel.bias)) if on)}
    wanted |= {"residual"} if kernel.residual else set()
    drawn = {name: torch.randn(shape, generator=random) for name, shape in shapes.items()}
    drawn["weight"] /= K**0.5
    return {name: tensor.to(device, dtype) for name, tensor in drawn.items() if name in wanted}


def call(kernel: Linear, given: dict[str, Tensor], eps: float, out: Tensor | None = None, **config: Any) -> Tensor:
    """One launch of an emitted kernel."""
    rest = {name: tensor for name, tensor in given.items() if name not in ("x", "weight")}
    rest |= {"eps": eps} if kernel.norm else {}  # type: ignore[dict-item]
    found: Tensor = load(linear.emit(kernel)).run(given["x"], given["weight"], **rest, out=out, **config)
    return found


def linears() -> Iterator[tuple[str, float]]:
    for kernel in KERNELS:
        for name, dtype in DTYPES.items():
            for M, N, K in shapes(name):
                given = arguments(kernel, M, N, K, dtype)
                out = torch.full((M, N), float("nan"), dtype=dtype)
                # Blocks that divide neither N nor K.
                found = call(kernel, given, 1e-6, out, block_n=16, block_k=32)
                assert found is out
                yield f"{kernel} | {M}x{N}x{K} {name}", relative_error(found, expected(kernel, given, 1e-6))


if __name__ == "__main__":
    print(json.dumps(dict({"linear": linears}[sys.argv[1]]())))
