"""Kernels that read codes, against the plain kernels of the same products in float32 on the weights that the codes stand for."""

from tests.interpreter import DEVICE  # isort: skip

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fuser.codegen import cache, linear, quantized, rotary
from fuser.codegen.linear import Linear, Tiling
from fuser.errors import UsageError
from fuser.formats import format_of
from fuser.quantized import Codes
from fuser.runtime.packing import packed
from tests.test_codegen_kernels import DTYPES, close, drawn, launch, unwritten
from tests.test_codegen_kernels import _cache_folder as _cache_folder

FORMATS = ("int4", "int4:64", "int4:32:asymmetric", "int4:channel", "int8", "int8:32", "int8:channel:asymmetric")
PARTS: list[dict[str, Any]] = [
    {},
    {"bias": True, "residual": True},
    {"norm": "rms", "norm_weight": True, "activation": "silu"},
    {"norm": "rms", "norm_weight": True},
    {"norm": "layer", "norm_weight": True, "bias": True, "activation": "gelu", "gated": False},
]


def tensors_of(what: Linear, M: int) -> dict[str, Any]:
    """What a product takes, its weight once as codes and once, `whole`, as numbers; all else of its dtype."""
    assert what.format is not None
    W = drawn(what.N, what.K, dtype="fp32", scale=what.K**-0.5)
    W[: what.N // 3, : what.K // 2] = 0  # groups of zeros
    codes = Codes.of(W, what.format)
    words, scales, zeros = packed(codes, torch.tensor(quantized.sides_of(what), device=DEVICE), DTYPES[what.dtype])
    scale = drawn(what.K, dtype=what.dtype) + 1.0
    folded = codes.weight * scale.float() if what.norm_weight else codes.weight.contiguous()
    return {
        "x": drawn(M, what.K, dtype=what.dtype, scale=3.0) + 1.0,
        "weight": words,
        "scales": scales,
        "zeros": zeros,
        "norm_weight": scale,
        "column_sums": folded.sum(1),
        "bias": drawn(what.N, dtype=what.dtype),
        "residual": drawn(M, what.width, dtype=what.dtype),
        "whole": folded,
        "plain": codes.weight,
    }


def plainly(what: Linear, tensors: dict[str, Any], *outputs: str) -> list[Tensor]:
    """The same by the kernel without codes, in float32."""
    turning = None if what.rotary is None else replace(what.rotary, dtype="fp32")
    plain = replace(what, dtype="fp32", format=None, norm_weight=False, rotary=turning)
    given = {
        name: x.float() if isinstance(x, Tensor) and x.is_floating_point() else x for name, x in tensors.items()
    } | {"weight": tensors["whole"]}
    launch(linear.linear(plain), *(given[name] for name in plain.tensors))
    return [given[name].double() for name in outputs]


def tilings(what: Linear) -> list[Tiling | None]:
    """The default one, one that loops and one that has parts of which the last is shorter."""
    assert what.format is not None
    C = quantized.columns(what.format)
    return [None, Tiling(64, C, 1, 4, 3), Tiling(32, C, 2, 2, 1)]


@pytest.mark.parametrize("dtype", ("bf16", "fp16"))
@pytest.mark.parametrize("M", (1, 5))
@pytest.mark.parametrize("parts", PARTS, ids=str)
@pytest.mark.parametrize("name", FORMATS)
def test_products(name: str, parts: dict[str, Any], M: int, dtype: str) -> None:
    format = format_of(name)
    what = Linear(100, 290, M, dtype, format=format, norm_eps=1e-5, **parts)
    tensors = tensors_of(what, M)
    y = unwritten(M, what.width, dtype=dtype)
    (expected,) = plainly(what, tensors | {"y": y.clone()}, "y")
    for tiling in tilings(what):
        y.fill_(float("nan"))
        launch(quantized.quantized_linear(what, tiling), *((tensors | {"y": y})[name] for name in what.tensors))
        close(y, expected, dtype)


@pytest.mark.parametrize("dtype", ("bf16", "fp16"))
@pytest.mark.parametrize("interleaved", (False, True))
@pytest.mark.parametrize(
    ("H", "G", "D", "rotary_dim", "parts"),
    [
        (4, 2, 32, 32, {"norm": "rms", "norm_weight": True}),
        (3, 1, 20, 12, {"bias": True}),
        (2, 1, 64, 64, {"norm": "rms", "head_norm_eps": 1e-4}),
        (2, 1, 20, 0, {}),
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ("int4:64", "int8:32:asymmetric"))
def test_projections(
    name: str, H: int, G: int, D: int, rotary_dim: int, parts: dict[str, Any], interleaved: bool, dtype: str
) -> None:
    tokens, page = 3, 4
    turning = rotary.Rotary(H, G, D, rotary_dim, page, interleaved, dtype=dtype)
    what = Linear(
        (H + 2 * G) * D, 200, tokens, dtype, rotary=turning, norm_eps=1e-5, format=format_of(name), **parts
    )  # fmt: skip
    angles = torch.randn(9, max(rotary_dim // 2, 1), device=DEVICE)
    integers: dict[str, Any] = {"dtype": torch.int32, "device": DEVICE}
    tensors = tensors_of(what, tokens) | {
        "q_norm_weight": drawn(D, dtype=dtype),
        "k_norm_weight": drawn(D, dtype=dtype),
        "cos": angles.cos(),
        "sin": angles.sin(),
        "positions": torch.tensor([5, 0, 8], **integers),
        "slot_mapping": torch.tensor([13, -1, 20], **integers),
    }
    made = {
        "y": unwritten(tokens, H * D, dtype=dtype),
        "k_cache": unwritten(7, page, G, D, dtype=dtype),
        "v_cache": unwritten(7, page, G, D, dtype=dtype),
    }
    expected = plainly(what, tensors | {name: x.clone() for name, x in made.items()}, *made)
    tiling = Tiling(32, quantized.columns(format_of(name)), 1, 4, 3) if what.head_norm_eps else None
    launch(quantized.quantized_linear(what, tiling), *((tensors | made)[name] for name in what.tensors))
    for found, wanted in zip(made.values(), expected, strict=True):
        assert (found.isnan() == wanted.isnan()).all()
        close(found.nan_to_num(), wanted.nan_to_num(), dtype)


@pytest.mark.parametrize("dtype", ("bf16", "fp16"))
@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("kind", ("plain", "gated", "rotary"))
def test_what_codes_stand_for(kind: str, name: str, dtype: str) -> None:
    turning = rotary.Rotary(2, 1, 20, 12, dtype=dtype) if kind == "rotary" else None
    what = Linear(
        80, 290, 1, dtype, format=format_of(name), activation="silu" if kind == "gated" else None, rotary=turning
    )
    tensors = tensors_of(what, 1)
    y = unwritten(80, 290, dtype=dtype)
    held = [tensors[name] for name in ("weight", "scales", "zeros") if tensors[name] is not None]
    launch(quantized.dequantize(quantized.Dequantize(what)), *held, y)
    close(y, tensors["plain"].double(), dtype)
    assert (y[:20, :140] == 0).all()


def test_what_there_is_no_kernel_for() -> None:
    what = Linear(64, 256, format=format_of("int4"))
    for wrong, tiling in (
        (replace(what, dtype="fp32"), None),
        (replace(what, by_input=True), None),
        (what, Tiling(64, 64)),
        (what, Tiling(24, 128)),
        (replace(what, K=2560), Tiling(64, 128, 1, 4, 1)),
        (replace(what, norm_weight=True), None),
    ):
        with pytest.raises(UsageError):
            quantized.quantized_linear(wrong, tiling)
    with pytest.raises(UsageError):
        linear.linear(what)
    assert cache.load(quantized.quantized_linear(what)).launch
