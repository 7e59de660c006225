"""Kernels that read codes, against the plain kernels of the same products in float32 on the weights that the codes stand for."""

from tests.interpreter import DEVICE  # isort: skip

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fuser.codegen import cache, linear, quantized, rotary
from fuser.codegen.code_values import columns
from fuser.codegen.linear import Linear, Tiling
from fuser.codegen.matmul import Matmul, Tiles, matmul
from fuser.codegen.rounding import Rounding, rounding
from fuser.errors import UsageError
from fuser.formats import format_of
from fuser.patterns.layer_norm import layer_norm
from fuser.patterns.rms_norm import rms_norm
from fuser.quantized import Codes, quantize_activations
from fuser.runtime.packing import packed
from tests.test_codegen_kernels import DTYPES, close, drawn, launch, unwritten
from tests.test_codegen_kernels import _cache_folder as _cache_folder

FORMATS = ("int4", "int4:64", "int4:32:asymmetric", "int4:channel", "int8", "int8:32", "int8:channel:asymmetric", "nf4")
PARTS: list[dict[str, Any]] = [
    {},
    {"bias": True, "residual": True},
    {"activation": "silu"},
    {"bias": True, "activation": "gelu", "gated": False},
]


def tensors_of(what: Linear, M: int) -> dict[str, Any]:
    """What a product takes, its weight once as codes and once, `whole`, as numbers; all else of its dtype."""
    assert what.format is not None
    W = drawn(what.N, what.K, dtype="fp32", scale=what.K**-0.5)
    W[: what.N // 3, : what.K // 2] = 0  # groups of zeros
    codes = Codes.of(W, what.format)
    words, scales, zeros = packed(codes, torch.tensor(quantized.sides_of(what), device=DEVICE), DTYPES[what.dtype])
    return {
        "x": drawn(M, what.K, dtype=what.dtype, scale=3.0) + 1.0,
        "weight": words,
        "scales": scales,
        "zeros": zeros,
        "bias": drawn(what.N, dtype=what.dtype),
        "residual": drawn(M, what.width, dtype=what.dtype),
        "whole": codes.weight.contiguous(),
    }


def plainly(what: Linear, tensors: dict[str, Any], *outputs: str) -> list[Tensor]:
    """The same by the kernel without codes, in float32."""
    turning = None if what.rotary is None else replace(what.rotary, dtype="fp32")
    plain = replace(what, dtype="fp32", format=None, rotary=turning)
    given = {
        name: x.float() if isinstance(x, Tensor) and x.is_floating_point() else x for name, x in tensors.items()
    } | {"weight": tensors["whole"]}
    launch(linear.linear(plain), *(given[name] for name in plain.tensors))
    return [given[name].double() for name in outputs]


def tilings(what: Linear) -> list[Tiling | None]:
    """The default one, one that loops and one that has parts of which the last is shorter."""
    assert what.format is not None
    C = columns(what.format)
    return [None, Tiling(64, C, 1, 4, 3), Tiling(32, C, 2, 2, 1)]


# Any two of format, parts, tokens and type meet.
PRODUCTS = [
    (name, parts, (1, 5)[(i + k // 2) % 2], ("bf16", "fp16")[(i + k) % 2])
    for i, name in enumerate(FORMATS)
    for k, parts in enumerate(PARTS)
]


@pytest.mark.parametrize(("name", "parts", "M", "dtype"), PRODUCTS, ids=str)
def test_products(name: str, parts: dict[str, Any], M: int, dtype: str) -> None:
    format = format_of(name)
    what = Linear(100, 290, M, dtype, format=format, **parts)
    tensors = tensors_of(what, M)
    y = unwritten(M, what.width, dtype=dtype)
    (expected,) = plainly(what, tensors | {"y": y.clone()}, "y")
    for tiling in tilings(what):
        y.fill_(float("nan"))
        launch(quantized.quantized_linear(what, tiling), *((tensors | {"y": y})[name] for name in what.tensors))
        close(y, expected, dtype)


HEADS: list[tuple[int, int, int, int, dict[str, Any]]] = [
    (4, 2, 32, 32, {}),
    (3, 1, 20, 12, {"bias": True}),
    (2, 1, 64, 64, {"head_norm_eps": 1e-4}),
    (2, 1, 20, 0, {}),
]
PROJECTIONS = [  # likewise
    (("int4:64", "int8:32:asymmetric")[(i + j) % 2], *heads, interleaved, ("bf16", "fp16")[(i // 2 + j) % 2])
    for i, heads in enumerate(HEADS)
    for j, interleaved in enumerate((False, True))
]


@pytest.mark.parametrize(("name", "H", "G", "D", "rotary_dim", "parts", "interleaved", "dtype"), PROJECTIONS, ids=str)
def test_projections(
    name: str, H: int, G: int, D: int, rotary_dim: int, parts: dict[str, Any], interleaved: bool, dtype: str
) -> None:
    tokens, page = 3, 4
    turning = rotary.Rotary(H, G, D, rotary_dim, page, interleaved, dtype=dtype)
    what = Linear(
        (H + 2 * G) * D, 200, tokens, dtype, rotary=turning, format=format_of(name), **parts
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
    tiling = Tiling(32, columns(format_of(name)), 1, 4, 3) if what.head_norm_eps else None
    launch(quantized.quantized_linear(what, tiling), *((tensors | made)[name] for name in what.tensors))
    for found, wanted in zip(made.values(), expected, strict=True):
        assert (found.isnan() == wanted.isnan()).all()
        close(found.nan_to_num(), wanted.nan_to_num(), dtype)


@pytest.mark.parametrize(
    ("kind", "name", "dtype"),
    [
        (("plain", "gated", "rotary")[(i + j) % 3], name, dtype)
        for i, name in enumerate(FORMATS)
        for j, dtype in enumerate(("bf16", "fp16"))
    ],
)
def test_what_codes_stand_for(kind: str, name: str, dtype: str) -> None:
    turning = rotary.Rotary(2, 1, 20, 12, dtype=dtype) if kind == "rotary" else None
    what = Linear(
        80, 290, 1, dtype, format=format_of(name), activation="silu" if kind == "gated" else None, rotary=turning
    )
    tensors = tensors_of(what, 1)
    y = unwritten(80, 290, dtype=dtype)
    held = [tensors[name] for name in ("weight", "scales", "zeros") if tensors[name] is not None]
    launch(quantized.dequantize(quantized.Dequantize(what)), *held, y)
    close(y, tensors["whole"].double(), dtype)
    assert (y[:20, :140] == 0).all()


def test_what_there_is_no_kernel_for() -> None:
    what = Linear(64, 256, format=format_of("int4"))
    for wrong, tiling in (
        (replace(what, dtype="fp32"), None),
        (replace(what, by_input=True), None),
        (what, Tiling(64, 64)),
        (what, Tiling(24, 128)),
        (replace(what, K=2560), Tiling(64, 128, 1, 4, 1)),
        (replace(what, norm="rms"), None),
    ):
        with pytest.raises(UsageError):
            quantized.quantized_linear(wrong, tiling)
    with pytest.raises(UsageError):
        linear.linear(what)
    assert cache.load(quantized.quantized_linear(what)).launch


@pytest.mark.parametrize("kind", ("int8", "fp8"))
@pytest.mark.parametrize(
    "parts", [{}, {"norm": "rms", "weight": True}, {"norm": "layer", "weight": True, "bias": True}], ids=str
)
@pytest.mark.parametrize(("M", "D"), [(1, 64), (5, 300)])
def test_rounded_rows(kind: str, parts: dict[str, Any], M: int, D: int) -> None:
    what = Rounding(D, kind, norm_eps=1e-5, **parts)
    x = drawn(M, 2 * D, scale=3.0)[:, :D]
    x[0] = 0 if "norm" not in parts else x[0]
    weight, bias = drawn(D) + 1.0, drawn(D)
    values = torch.full((M, D), 99, dtype=torch.int8, device=DEVICE)
    y, scales = values if kind == "int8" else values.view(torch.float8_e4m3fn), unwritten(M, dtype="fp32")
    tensors = {"x": x, "weight": weight, "bias": bias, "y": y, "scales": scales}
    launch(rounding(what), *(tensors[name] for name in what.tensors))
    rows = x.double()
    if what.norm is not None:
        norm = rms_norm if what.norm == "rms" else layer_norm
        rows = norm.reference(rows, weight.double(), *[bias.double()] * what.bias, eps=1e-5)
    most = rows.abs().amax(-1)
    expected_scales = torch.where(most > 0, most / (127 if kind == "int8" else 448), 1.0)
    torch.testing.assert_close(scales.double(), expected_scales, rtol=1e-2 if what.norm else 1e-6, atol=0)
    off = (y.double() * scales.double()[:, None] - rows).abs() / expected_scales[:, None]
    finest, largest = (0.5, 127) if kind == "int8" else (16.0, 448)
    before = largest * 2.0**-7 if what.norm else 0.0  # a norm is rounded to bfloat16
    assert off.max() <= (finest + before) * 1.01


@pytest.mark.parametrize("kind", ("int8", "fp8"))
@pytest.mark.parametrize("wrong", (float("inf"), float("nan")))
def test_a_row_that_is_not_finite_has_no_scale(kind: str, wrong: float) -> None:
    x = drawn(2, 40)
    x[1, 7] = wrong
    y = torch.zeros((2, 40), dtype=torch.int8, device=DEVICE)
    scales = unwritten(2, dtype="fp32")
    launch(rounding(Rounding(40, kind)), x, y if kind == "int8" else y.view(torch.float8_e4m3fn), scales)
    assert scales.isnan().tolist() == [False, True]


def eights(kind: str, rows: int, K: int) -> tuple[Tensor, Tensor, Tensor]:
    """A matrix of eight bits, its rows' scales, and what it stands for in float64."""
    values, scales = quantize_activations(drawn(rows, K, dtype="fp32"), kind)
    return values, scales[:, 0].contiguous(), values.double() * scales.double()


@pytest.mark.parametrize("kind", ("w8a8", "fp8"))
@pytest.mark.parametrize(("M", "splits"), [(1, 1), (5, 2)])
@pytest.mark.parametrize("parts", [{}, {"bias": True, "residual": True}, {"activation": "silu"}], ids=str)
def test_products_of_eight_bits(kind: str, M: int, splits: int, parts: dict[str, Any]) -> None:
    format = format_of(kind)
    what = Linear(96, 160, M, format=format, **parts)
    x, x_scales, wide_x = eights(format.kind, M, 160)
    W, scales, wide = eights(format.kind, 96, 160)
    tensors = {"x": x, "x_scales": x_scales, "weight": W, "scales": scales, "bias": drawn(96)}
    tensors |= {"residual": drawn(M, what.width), "y": unwritten(M, what.width)}
    launch(linear.linear(what, Tiling(32, 64, splits)), *(tensors[name] for name in what.tensors))
    expected = wide_x @ wide.T
    if what.bias:
        expected = expected + tensors["bias"].double() + tensors["residual"].double()
    if what.activation:
        gate, up = expected.chunk(2, -1)
        expected = torch.nn.functional.silu(gate) * up
    close(tensors["y"], expected, "bf16")
    large = Matmul(
        96, 160, bias=what.bias, activation=what.activation, gated=what.pairs, residual=what.residual, kind=format.kind
    )  # fmt: skip
    tensors["y"] = unwritten(M, large.width)
    launch(matmul(large, Tiles(16, 32, 32, num_warps=4)), *(tensors[name] for name in large.tensors))
    close(tensors["y"], expected, "bf16")
