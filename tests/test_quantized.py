"""Quantized formats against plain definitions, and quantized modules and graphs end to end."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fuser
from fuser.codegen.compose import compose
from fuser.codegen.compose_linear import quantized_parts
from fuser.codegen.program import Weight
from fuser.codegen.quantized import sides_of
from fuser.errors import InputError, UsageError
from fuser.evaluating import stored_bytes
from fuser.formats import NF4, Format, format_of
from fuser.quantized import Codes, DoubledScales, Quantized, quantize_activations, unpack
from fuser.quantizing import choices, constant_of
from fuser.runtime.packing import in_units
from fuser.sources import source_of
from fuser.stepping import Weights
from fuser.tensors import to_constant

FORMATS = (
    "int8", "int8:channel", "int8:32:asymmetric", "int4", "int4:32", "int4:64:asymmetric", "int4:channel", "nf4", "nf4:32",
    "nf4:64:double", "w8a8", "fp8",
)  # fmt: skip
DEMO = Path(__file__).parents[1] / "models/demo"


def drawn(N: int, K: int) -> Tensor:
    return torch.randn(N, K, generator=torch.Generator().manual_seed(N * 1000 + K)) * 0.02


def plainly(weight: Tensor, format: Format) -> Tensor:
    """The rounded weight, number by number, as the format's page says it."""
    found = torch.zeros_like(weight)
    group = format.group or weight.shape[1]
    parts = [(n, k, row[k : k + group]) for n, row in enumerate(weight.tolist()) for k in range(0, len(row), group)]
    scales = [kept(max(map(abs, part))) for *_, part in parts] if format.kind == "nf4" else [0.0] * len(parts)
    for (n, start, part), scale in zip(parts, eights(scales) if format.double else scales, strict=True):
        for k, value in zip(range(start, start + group), _rounded(part, format, scale), strict=False):
            found[n, k] = value
    return found


def kept(scale: float) -> float:
    return float(torch.tensor(scale).half())


def eights(scales: list[float]) -> list[float]:
    """Scales by their mean and, of each 256, eight bits."""
    mean = sum(scales) / len(scales)
    found = []
    for start in range(0, len(scales), 256):
        block = [scale - mean for scale in scales[start : start + 256]]
        step = max(map(abs, block)) / 127
        found += [kept(max(mean + (round(off / step) if step else 0) * step, 0.0)) for off in block]
    return found


def _rounded(part: list[float], format: Format, scale: float) -> list[float]:
    top = max(map(abs, part))
    if format.kind == "nf4":
        return (
            [min(NF4, key=lambda level: abs(level - w / scale)) * scale for w in part] if scale else [0.0] * len(part)
        )
    if format.kind == "fp8":
        scale = kept(top / 448) or 1.0
        return [float((torch.tensor(w) / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float()) * scale for w in part]
    most = 127 if format.kind == "int8" else 7
    if format.symmetric:
        scale = kept(top / most)
        return [max(-most, min(most, round(w / scale))) * scale if scale else 0.0 for w in part]
    low, high = min(*part, 0.0), max(*part, 0.0)
    scale = kept((high - low) / (2 * most + 1)) or 1.0
    zero = round(-low / scale)
    return [(max(0, min(2 * most + 1, round(w / scale) + zero)) - zero) * scale for w in part]


@pytest.mark.parametrize("K", (1, 33, 64, 130))
@pytest.mark.parametrize("name", FORMATS)
def test_codes_are_what_the_format_says(name: str, K: int) -> None:
    format, weight = format_of(name), drawn(5, K)
    weight[2] = 0
    codes = Codes.of(weight, format)
    assert codes.packed.shape == (5, format.packed(K)) and codes.packed.dtype is torch.uint8
    assert codes.scales.shape == (5, format.groups(K)) and codes.scales.dtype is torch.float16
    torch.testing.assert_close(codes.weight, plainly(weight, format), rtol=1e-6, atol=1e-9)
    assert (codes.weight[2] == 0).all()
    assert (unpack(codes.packed, format, K) == codes.codes).all()


@pytest.mark.parametrize("name", FORMATS)
def test_codes_are_the_nearest(name: str) -> None:
    format, weight = format_of(name), drawn(7, 96)
    codes = Codes.of(weight, format)
    steps = codes.scales.float().repeat_interleave(format.grouped(96), 1)[:, :96]
    off = (codes.weight - weight).abs() / steps
    widest = {"nf4": 0.16, "fp8": 16.0}.get(format.kind, 0.5)  # half the widest gap between neighbours
    assert off.max() <= widest * 1.05


@pytest.mark.parametrize("name", ("int4", "int4:32:asymmetric", "nf4", "fp8"))
@pytest.mark.parametrize("wrong", (float("nan"), float("inf")))
def test_what_is_not_finite_is_refused(name: str, wrong: float) -> None:
    weight = drawn(4, 64)
    weight[1, 3] = wrong
    with pytest.raises(InputError, match="not finite"):
        Codes.of(weight, format_of(name))


def test_scales_of_eight_bits() -> None:
    """Blocks of 256 go on from row to row; rows are read alone; what is stored is counted."""
    format, weight = format_of("nf4:32:double"), drawn(70, 320) * torch.linspace(0.1, 3, 70)[:, None]
    codes = Codes.of(weight, format)
    assert codes.doubled is not None and codes.doubled.codes.dtype is torch.uint8
    assert codes.doubled.seconds.shape == (1 + 3,)  # 700 scales
    torch.testing.assert_close(codes.weight, plainly(weight, format), rtol=1e-5, atol=1e-8)
    exact = Codes.of(weight, format_of("nf4:32"))
    assert (codes.scales.float() - exact.scales.float()).abs().max() <= 0.51 * codes.doubled.seconds[1:].max() + 1e-4
    constant = constant_of(codes, to_constant(weight))
    assert (torch.from_numpy(constant.numpy()) == codes.weight).all()
    assert (torch.from_numpy(constant.rows(40, 63)) == codes.weight[40:63]).all()
    assert constant.stored_bytes == 70 * 160 + 700 + 4 * (1 + 3)
    assert constant.scales.dtype.value == "float16"
    with pytest.raises(InputError, match=r"seconds must be \[4\], got \[3\]"):
        DoubledScales(to_constant(codes.doubled.codes), to_constant(codes.doubled.seconds[:3]))


@pytest.mark.parametrize("factor", (1e-6, 1e7))
def test_scales_of_eight_bits_beyond_float16(factor: float) -> None:
    weight = drawn(20, 64) * factor
    codes = Codes.of(weight, format_of("nf4:64:double"))
    assert codes.scales.dtype is torch.bfloat16
    assert (codes.weight - weight).norm() < 0.15 * weight.norm()


def test_scales_too_small_for_float16_are_bfloat16() -> None:
    weight = drawn(4, 64) * 1e-6
    codes = Codes.of(weight, format_of("int8:64"))
    assert codes.scales.dtype is torch.bfloat16
    assert (codes.weight - weight).norm() < 0.01 * weight.norm()


@pytest.mark.parametrize("text", ("int3", "int4:48", "int4:wide", "w8a8:64", "nf4:64:asymmetric", "int4:double"))
def test_formats_that_are_none(text: str) -> None:
    with pytest.raises(UsageError):
        format_of(text)


@pytest.mark.parametrize("name", FORMATS)
def test_names_say_the_format(name: str) -> None:
    assert format_of(str(format_of(name))) == format_of(name)


def test_a_constant_is_the_weight() -> None:
    codes = Codes.of(drawn(6, 40), format_of("int4:32"))
    constant = Quantized(to_constant(codes.packed), to_constant(codes.scales), None, codes.format, 40)
    assert constant.shape == (6, 40)
    assert (torch.from_numpy(constant.numpy()) == codes.weight).all()
    assert (torch.from_numpy(constant.rows(2, 5)) == codes.weight[2:5]).all()
    assert constant.stored_bytes == 6 * 20 + 6 * 2 * 2
    with pytest.raises(InputError, match=r"scales must be \[6, 2\], got \[6, 1\]"):
        Quantized(to_constant(codes.packed), to_constant(codes.scales[:, :1]), None, codes.format, 40)


@pytest.mark.parametrize("kind", ("int8", "fp8"))
def test_activations_by_row(kind: str) -> None:
    x = torch.randn(3, 5, 50)
    x[1, 2], x[0, 0, 7] = 0, float("inf")
    values, scales = quantize_activations(x, kind)
    made = values.float() * scales
    assert made[0, 0].isnan().all()
    assert (made[1, 2] == 0).all()
    error = (made[2] - x[2]).abs() / x[2].abs().amax(-1, keepdim=True)
    assert error.max() <= (0.5 / 127 if kind == "int8" else 1 / 28) * 1.01


class Gated(nn.Module):
    """Three linears of odd widths."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(70, 90, bias=False), nn.Linear(70, 90), nn.Linear(90, 70)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down(nn.functional.silu(self.gate(x)) * self.up(x))
        return y


@pytest.mark.parametrize("name", FORMATS)
def test_a_module_gives_a_module(name: str) -> None:
    torch.manual_seed(0)
    module, x = Gated().eval(), torch.randn(2, 5, 70)
    weight = module.up.weight
    made = fuser.quantize(module, name)
    assert module.up.weight is weight and isinstance(module.up, nn.Linear)
    assert made.up.bias is not None and (made.up.bias == module.up.bias).all()
    with torch.no_grad():
        off = (made(x) - module(x)).norm() / module(x).norm()
        compiled = fuser.compile(made, (x,))
        same = (compiled(x) - made(x)).norm() / made(x).norm()
    assert 0 < off < 0.2
    assert same < (2e-2 if format_of(name).activations else 1e-6)  # what is rounded may fall to the other side
    kept = [part.clone() for part in made.gate.buffers()]
    half: Any = made.half()
    assert all(torch.equal(x, y) and x.dtype is y.dtype for x, y in zip(kept, half.gate.buffers(), strict=True))
    assert half(x.half()).dtype is torch.float16


def test_kernels_read_scales_of_eight_bits_decoded() -> None:
    """The same kernels as without; what they are given is what the weight's own scales say."""
    plain, double = (
        source_of(DEMO / "model.onnx", verify=False, note=print, choices=choices(name)).graph
        for name in ("nf4:64", "nf4:64:double")
    )
    programs = [compose(graph, dtype="bf16", tokens=1) for graph in (plain, double)]
    assert [kernel.text for kernel in programs[0].kernels] == [kernel.text for kernel in programs[1].kernels]
    held = Weights(torch.device("cpu"), "bf16", 16)
    steps = programs[1].steps
    asked = [a for step in steps for a in step.arguments if isinstance(a, Weight) and a.kind in ("codes", "scales")]
    assert len(asked) == 2 * 20
    for weight in asked:
        assert weight.base is not None and weight.product is not None
        parts = [part.tensors() for part in quantized_parts(weight.base)]
        if weight.kind == "scales":
            sides = torch.tensor(sides_of(weight.product))
            wanted = in_units(torch.cat([codes.scales for codes in parts]), sides).T
            assert torch.equal(held[weight][: len(wanted)], wanted) and wanted.dtype is torch.float16
    scales = [part.scales for weight in asked[::2] if weight.base is not None for part in quantized_parts(weight.base)]
    blocks = sum(1 + -(-one.size // 256) for one in scales)
    assert stored_bytes(plain) - stored_bytes(double) == sum(one.size for one in scales) - 4 * blocks


def test_overrides_say_which() -> None:
    made = fuser.quantize(Gated(), "int4", overrides={"*p*": "int8:channel"}, keep=["down"])
    assert [str(made.gate.format), str(made.up.format)] == ["int4:128", "int8:channel"]
    assert isinstance(made.down, nn.Linear)
    with pytest.raises(UsageError, match="nothing is quantized"):
        fuser.quantize(Gated(), "int4", keep=["*"])
    with pytest.raises(InputError, match="meta device"):
        fuser.quantize(Gated().to("meta"), "int4")


@pytest.mark.parametrize("model", (DEMO, DEMO / "model.onnx"), ids=("folder", "file"))
@pytest.mark.parametrize("name", ("int8", "int4:64:asymmetric", "nf4:64:double", "w8a8"))
def test_text_is_scored_as_the_module_does(name: str, model: Path) -> None:
    transformers = pytest.importorskip("transformers")
    module = transformers.AutoModelForCausalLM.from_pretrained(DEMO, dtype=torch.float32).eval()
    ids = list(range(5, 60))
    llm = fuser.LLM(model, quantization=name, max_length=128)
    assert llm.padded is None
    with torch.no_grad():
        logits = fuser.quantize(module, name)(torch.tensor([ids])).logits[0]
    expected = logits.log_softmax(-1)[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
    found = torch.tensor(llm.score([ids])[0].logprobs)
    tolerance = 0.2 if name == "w8a8" else 1e-4
    assert (found - expected).abs().max() < tolerance
