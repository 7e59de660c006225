"""Clipped scales and GPTQ against plain searches and definitions, and calibrated modules and graphs."""

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import fuser
from fuser import calibrating, calibration
from fuser.calibrating import LayerWalk, Moments, Walk, windows_of
from fuser.calibration import FACTORS, clipped, gptq, inverse_factor
from fuser.errors import InputError, UsageError
from fuser.formats import format_of
from fuser.graph import Graph
from fuser.padded import prompt
from fuser.quantized import Codes, decode, encode, scales_of
from fuser.runtime.executor import Executor
from fuser.sources import source_of
from fuser.tensors import tensor_of
from tests import zoo

DEMO = Path(__file__).parents[1] / "models/demo"
FORMATS = ("int4:32", "int4:32:asymmetric", "int4:channel", "nf4:32", "int8:64", "w8a8", "fp8")


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def heavy(N: int, K: int) -> Tensor:
    """A weight with few large elements."""
    return drawn(N, K) * 0.02 * (1 + 3 * (drawn(N, K, seed=1) > 1.5))


# Clipping


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("shape", [(3, 100), (5, 32), (1, 7)])
def test_the_best_factor_of_each_group(name: str, shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Found group by group, as one row each."""
    format, weight = format_of(name), heavy(*shape)
    monkeypatch.setattr(calibration, "BLOCK_ELEMENTS", 2 * shape[1])
    scales, zeros = clipped(weight, format)
    found = decode(encode(weight, scales, zeros, format), scales, zeros, format)
    group = format.grouped(shape[1])
    for n in range(shape[0]):
        for start in range(0, shape[1], group):
            part = weight[n : n + 1, start : start + group]
            tried = []
            for factor in FACTORS:
                scale, zero = scales_of(part * factor, format)
                rounded = decode(encode(part, scale, zero, format), scale, zero, format)
                tried.append(float((rounded - part).square().sum()))
            error = float((found[n : n + 1, start : start + group] - part).square().sum())
            assert error == pytest.approx(min(tried), rel=1e-4, abs=1e-12)


def test_importance_weighs_what_is_clipped() -> None:
    weight = torch.zeros(1, 32)
    weight[0, :31] = torch.linspace(-0.3, 0.3, 31)
    weight[0, 31] = 1.0
    format = format_of("int4:32")
    alike, _ = clipped(weight, format)
    large, _ = clipped(weight, format, torch.tensor([1.0] * 31 + [1000.0]))
    small, _ = clipped(weight, format, torch.tensor([1.0] * 31 + [1e-6]))
    assert float(large) == pytest.approx(1 / 7, rel=1e-3)
    assert float(small) < float(alike) <= float(large)


def test_a_weight_of_zeros_and_one_that_is_not_finite() -> None:
    scales, _ = clipped(torch.zeros(2, 40), format_of("int4:32"))
    assert not scales.any()
    with pytest.raises(InputError, match="not finite"):
        clipped(torch.tensor([[1.0, torch.nan]]), format_of("int4"))


# GPTQ


def inputs(tokens: int, K: int) -> Tensor:
    """Inputs that go together, as those of a model do."""
    return drawn(tokens, K, seed=3) + drawn(tokens, 4, seed=4) @ drawn(4, K, seed=5)


def moments_of(x: Tensor) -> Moments:
    found = Moments(x.shape[1], x.device)
    found.add(x)
    return found


def test_the_factor_of_the_inverse() -> None:
    moment = (inputs(200, 24).T @ inputs(200, 24)).double()
    upper = inverse_factor(moment)
    damped = moment + 0.01 * moment.diagonal().mean() * torch.eye(24)
    assert torch.equal(upper, upper.triu())
    assert torch.allclose(upper.T @ upper @ damped, torch.eye(24).double(), atol=1e-9)


def test_inputs_that_are_always_zero_and_too_little_damping() -> None:
    moment = torch.zeros(6, 6)
    moment[0, 0] = 4
    assert inverse_factor(moment).isfinite().all()
    moment = torch.ones(6, 6) * 1e6  # of rank one
    moment[0, 0] -= 3e6  # rounding can make one indefinite, this one is by far
    upper = inverse_factor(moment)
    assert upper.isfinite().all()


def plain(weight: Tensor, moment: Tensor, name: str) -> Tensor:
    """GPTQ by its definition (optimal brain quantization in order of columns): the inverse of what is left at each step."""
    format = format_of(name)
    left, K = weight.double().clone(), weight.shape[1]
    group = format.grouped(K)
    damped = moment.double() + 0.01 * moment.double().diagonal().mean() * torch.eye(K)
    found = torch.empty_like(left)
    for k in range(K):
        if k % group == 0:
            span = slice(k, k + group)
            scale, zero = clipped(left[:, span].float(), format, moment.diagonal()[span].float())
        inverse = damped[k:, k:].inverse()
        column = left[:, k : k + 1].float()
        found[:, k : k + 1] = decode(encode(column, scale, zero, format), scale, zero, format).double()
        error = (left[:, k] - found[:, k]) / inverse[0, 0]
        left[:, k:] -= error[:, None] * inverse[0]
    return found


@pytest.mark.parametrize("name", FORMATS)
def test_gptq_is_what_its_definition_says(name: str) -> None:
    weight, moments = heavy(5, 77), moments_of(inputs(300, 77))
    found = gptq(weight, moments.factor, format_of(name), moments.importance)
    wanted = plain(weight, moments.sum, name)
    differing = ((found.weight - wanted).abs() > 1e-6).double().mean()
    assert differing < 0.02  # a tie that float32 decides otherwise, and what follows of it
    assert found.codes.shape == (5, 77)


@pytest.mark.parametrize("name", FORMATS)
def test_products_are_nearer(name: str) -> None:
    format, weight, x = format_of(name), heavy(40, 100), inputs(500, 100)
    moments = moments_of(x)
    codes = gptq(weight, moments.factor, format, moments.importance)
    errors = [float((x @ (made.weight - weight).T).norm()) for made in (Codes.of(weight, format), codes)]
    assert errors[1] < 0.8 * errors[0]


def test_inputs_that_are_independent_leave_the_nearest() -> None:
    format, weight = format_of("int4:32"), heavy(4, 64)
    scales, zeros = clipped(weight, format)
    codes = gptq(weight, inverse_factor(torch.eye(64)), format)
    assert torch.equal(codes.codes, encode(weight, scales, zeros, format))


# Modules and graphs


@cache
def demo() -> Any:
    return AutoModelForCausalLM.from_pretrained(DEMO, dtype=torch.float32).eval()


@cache
def graph() -> Graph:
    found: Graph = source_of(DEMO / "model.onnx", verify=False, note=lambda stage: None).graph
    return found


WINDOWS = tuple(torch.randint(1024, (S,), generator=torch.Generator().manual_seed(S)) for S in (24, 9, 24))


def seen(module: nn.Module, path: str) -> Tensor:
    """The second moment of a linear's inputs, by running all of the module."""
    total = torch.zeros(())

    def before(_: nn.Module, args: tuple[Any, ...]) -> None:
        nonlocal total
        total = total + args[0].flatten(0, -2).double().T @ args[0].flatten(0, -2).double()

    hook = module.get_submodule(path).register_forward_pre_hook(before)
    with torch.no_grad():
        for window in WINDOWS:
            module(window[None])
    hook.remove()
    return total


PATHS = [
    f"model.layers.{i}.{name}" for i in (0, 3) for name in ("self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj")
]


def test_moments_of_a_module_are_those_of_running_all_of_it() -> None:
    module = demo()
    walk = LayerWalk(module, WINDOWS)
    for path in [*PATHS, "lm_head"]:
        assert torch.allclose(walk.moments(path).sum, seen(module, path), rtol=1e-4, atol=1e-4)
    with_q = LayerWalk(module, WINDOWS)
    first = with_q.moments("model.layers.0.self_attn.q_proj")
    assert with_q.moments("model.layers.0.self_attn.v_proj") is first
    assert with_q.moments("model.layers.0.self_attn.o_proj") is not first


@pytest.mark.parametrize("name", ["gpt2", "gemma2", "phi", "bloom"])
def test_layers_of_other_architectures(name: str) -> None:
    module = zoo.model(name).eval()
    linears = [path for path, part in module.named_modules() if type(part).__name__ in ("Linear", "Conv1D")]
    walk = LayerWalk(module, [window % 50 for window in WINDOWS])
    for path in linears:
        assert walk.moments(path).sum.isfinite().all()


def test_moments_of_a_graph_are_those_of_the_module() -> None:
    walk = Walk(graph(), WINDOWS)
    wanted = {f"model.layers.{i}.{name}": None for i in range(5) for name in ("self_attn.o_proj", "mlp.down_proj")}
    found = {}
    for node in graph().nodes:
        if node.is_a("MatMul") and node.origin.module in wanted:
            found[node.origin.module] = walk.moments(node).sum
    assert found.keys() == wanted.keys()
    for path, total in found.items():
        assert torch.allclose(total, seen(demo(), path), rtol=1e-3, atol=1e-3)
    assert all(len(held) < 12 for held in walk._held)  # what is left: a residual, masks, tables, what nothing reads


def test_each_product_sees_what_came_before_it() -> None:
    """The moments of the last product are those of a model whose other weights are quantized already."""
    asked: list[Moments] = []
    original = calibrating.Walk.moments
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Walk, "moments", lambda self, node: asked.append(original(self, node)) or asked[-1])
        made = fuser.quantize(graph(), "int4", calibration=WINDOWS)
    assert len(asked) == 20
    again = Walk(made, WINDOWS)
    last = [
        node for node in made.nodes if node.origin.module == "model.layers.4.mlp.down_proj" and node.is_a("MatMul")
    ][-1]
    assert torch.allclose(again.moments(last).sum, asked[-1].sum, rtol=1e-3, atol=1e-3)
    plain_one = Walk(graph(), WINDOWS)
    before = next(n for n in graph().nodes if n.origin.module == "model.layers.4.mlp.down_proj" and n.is_a("MatMul"))
    assert not torch.allclose(plain_one.moments(before).sum, asked[-1].sum, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("format", ["int4:32", "w8a8", "nf4:64"])
def test_a_module_and_its_graph_are_calibrated_alike(format: str) -> None:
    made = fuser.quantize(demo(), format, calibration=WINDOWS)
    from_graph = fuser.quantize(graph(), format, calibration=WINDOWS)
    node = next(
        n for n in from_graph.nodes if n.origin.module == "model.layers.0.self_attn.o_proj" and n.is_a("MatMul")
    )
    weight = node.inputs[1]
    assert weight is not None and weight.constant is not None
    ours, theirs = made.get_submodule("model.layers.0.self_attn.o_proj").weight, tensor_of(weight.constant).T
    assert ((ours - theirs).abs() > 1e-6).double().mean() < 0.02
    window = WINDOWS[0][None]
    with torch.no_grad():
        original, found = (module(window).logits for module in (demo(), made))
        again = Executor(from_graph)(*prompt(from_graph, WINDOWS[0]).values())[0]
    # A code that rounding flips changes those after it, layer by layer: what is alike in the end is how far off both are.
    if format != "w8a8":  # whose inputs are rounded, which is no matter of the weights
        assert float((found - original).norm() / (again - original).norm()) == pytest.approx(1, abs=0.15)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"clip": "best"}, "clip is mse or None"),
        ({"calibration": WINDOWS, "method": "magic"}, "the method of calibration is gptq"),
        ({"calibration": "a text"}, "needs a tokenizer"),
        ({"calibration": []}, "calibration takes"),
        ({"calibration": [[]]}, "calibration takes"),
        ({"calibration": [0.5, 1.5]}, "calibration takes"),
        ({"calibration": [object()]}, "calibration takes"),
    ],
)
def test_what_cannot_be_is_told(arguments: dict[str, Any], told: str) -> None:
    with pytest.raises(UsageError, match=told):
        fuser.quantize(graph(), "int4", **arguments)


@pytest.mark.parametrize("is_graph", [False, True])
def test_tokens_that_the_model_has_not(is_graph: bool) -> None:
    model: Any = graph() if is_graph else demo()
    with pytest.raises(fuser.FuserError, match="no such token|out of range|index"):
        fuser.quantize(model, "int4", calibration=[[1, 2, 5000]])


def test_inputs_that_are_not_finite() -> None:
    with pytest.raises(InputError, match="not finite"):
        inverse_factor(torch.full((2, 2), torch.nan))


def test_windows() -> None:
    assert [len(window) for window in windows_of(list(range(1100)))] == [512, 512, 76]
    assert [len(window) for window in windows_of([[1, 2], [3]])] == [2, 1]
    assert [len(window) for window in windows_of(torch.zeros(3, 7, dtype=torch.int32))] == [7, 7, 7]


def test_modules_without_layers_one_after_another() -> None:
    class Odd(nn.Module):
        def __init__(self, is_crooked: bool) -> None:
            super().__init__()
            self.table = nn.Embedding(10, 4)
            self.parts = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
            self.is_crooked = is_crooked

        def forward(self, ids: Tensor) -> Tensor:
            x = self.table(ids)
            for part in self.parts:
                x = part(x) + 1 if self.is_crooked else part(x)
            return x

    ids = [torch.arange(5)]
    made = fuser.quantize(Odd(False), "int8", calibration=ids)
    assert isinstance(made, nn.Module)
    with pytest.raises(UsageError, match="'parts' are not computed one after another"):
        fuser.quantize(Odd(True), "int8", calibration=ids)
    with pytest.raises(UsageError, match="no list of layers"):
        fuser.quantize(nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 4)), "int8", calibration=ids)
