"""AWQ: scales against a plain search, graphs and modules that compute what they did, and what is not scaled."""

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fuser
from fuser import importer, scaling
from fuser.calibrating import LayerWalk, Moments, matrix
from fuser.calibration import clipped
from fuser.canonicalize import canonicalize
from fuser.errors import UsageError
from fuser.formats import format_of
from fuser.graph import FUSER, Graph, Node
from fuser.padded import prompt
from fuser.quantized import Codes, decode, encode
from fuser.quantizing import _weight
from fuser.runtime.executor import Executor
from fuser.scaling import best_scales, scale_graph, scale_layer
from fuser.sources import source_of
from tests import zoo

DEMO = Path(__file__).parents[1] / "models/demo"
WINDOWS = tuple(torch.randint(1024, (S,), generator=torch.Generator().manual_seed(S)) for S in (24, 9))


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def inputs(tokens: int, K: int) -> Tensor:
    """Inputs of which few channels are large."""
    return drawn(tokens, K, seed=3) * (1 + 20 * (torch.arange(K) % 16 == 5))


def moments_of(x: Tensor) -> Moments:
    found = Moments(x.shape[1], x.device)
    for part in x.split(100):
        found.add(part)
    return found


# Scales


@pytest.mark.parametrize("name", ["int4:32", "nf4:32", "int4:32:asymmetric", "int8:channel"])
def test_the_scales_are_those_of_the_nearest_products(name: str) -> None:
    format, x = format_of(name), inputs(300, 72)
    weights = [drawn(9, 72) * 0.1, drawn(5, 72, seed=1)]
    scales = best_scales([(weight, format) for weight in weights], moments_of(x))
    tried = {}
    for step in range(20):
        made = x.abs().mean(0) ** (step / 20)
        made = made / (made.max() * made.min()).sqrt()
        errors = [(x / made) @ Codes.of(weight * made, format).weight.T - x @ weight.T for weight in weights]
        tried[step] = sum(float(error.square().sum()) for error in errors), made
    least, wanted = min(tried.values(), key=lambda pair: pair[0])
    assert torch.allclose(scales, wanted, rtol=1e-4)
    assert name == "int8:channel" or least < 0.7 * tried[0][0]


def test_channels_without_inputs_and_ranges_for_what_products_give() -> None:
    x = inputs(200, 70)
    x[:, 3] = 0
    format, weight = format_of("int4:32"), drawn(6, 70) ** 3
    assert best_scales([(weight, format)], moments_of(x)).isfinite().all()
    blocks = moments_of(x).within(format)
    moment = torch.nn.functional.pad(x.T @ x, (0, 26, 0, 26))
    assert torch.allclose(
        blocks, torch.stack([moment[i : i + 32, i : i + 32] for i in (0, 32, 64)]), rtol=1e-4, atol=1e-3
    )
    errors = []
    for importance in (None, moments_of(x).importance, blocks):
        scales, zeros = clipped(weight, format, importance)
        error = decode(encode(weight, scales, zeros, format), scales, zeros, format) - weight
        parts = [x[:, i : i + 32] @ error[:, i : i + 32].T for i in (0, 32, 64)]
        errors.append(sum(float(part.square().sum()) for part in parts))
    assert errors[2] < min(errors[:2])


# Graphs


def canonical() -> Graph:
    graph = importer.load(DEMO / "model.onnx", None)
    canonicalize(graph)
    return graph


@cache
def fused() -> Graph:
    found: Graph = source_of(DEMO / "model.onnx", verify=False, note=lambda stage: None).graph
    return found


def scaled(graph: Graph) -> tuple[Graph, list[str]]:
    """With weights scaled, none rounded; the modules that were."""
    made, told = graph.clone(), []
    products = {node: (weight, format_of("int4:32")) for node in made.nodes if (weight := _weight(node)) is not None}
    scale_graph(made, products, WINDOWS, None, told.append)
    made.prune()
    return made, told


@pytest.mark.parametrize("is_fused", [False, True])
def test_a_graph_that_is_scaled_computes_what_it_did(is_fused: bool) -> None:
    before = fused() if is_fused else canonical()
    after, told = scaled(before)
    after.validate()
    assert len(told) == 16 and not any(name.endswith("o_proj") for name in told)  # of five layers three, and the head
    changed = [(node, _weight(node)) for node in after.nodes if _weight(node) is not None]
    given = [*prompt(before, WINDOWS[0]).values()]
    wanted, found = Executor(before)(*given), Executor(after)(*given)
    for x, y in zip(wanted, found, strict=True):
        assert float((x - y).norm()) <= 1e-5 * float(x.norm())
    old = {node.origin.module: _weight(node) for node in before.nodes if _weight(node) is not None}
    for node, weight in changed:
        held = old[node.origin.module]
        assert weight is not None and held is not None
        same = bool((weight.numpy() == held.numpy()).all())
        assert same == node.origin.module.endswith("o_proj")


def test_what_something_else_reads_is_not_scaled() -> None:
    def told(change: Any) -> list[str]:
        graph = fused().clone()
        change(graph)
        return scaled(graph)[1]

    def first(graph: Graph, op: str, domain: str = FUSER) -> Node:
        return next(node for node in graph.nodes if node.is_a(op, domain))

    def norm_is_an_output(graph: Graph) -> None:
        first(graph, "rms_norm").output.is_output = True

    def norm_is_read(graph: Graph) -> None:
        graph.add("Neg", [first(graph, "rms_norm").output])

    def gate_is_read(graph: Graph) -> None:
        graph.add("Neg", [first(graph, "gated_mlp").inputs[1]])

    def is_packed(graph: Graph) -> None:
        node = first(graph, "gated_mlp")
        graph.set_input(node, 1, node.inputs[0])

    everything = told(lambda graph: None)
    assert set(everything) - set(told(norm_is_read)) == {"model.layers.0.self_attn"}
    assert set(everything) - set(told(norm_is_an_output)) == {"model.layers.0.self_attn"}
    assert set(everything) - set(told(gate_is_read)) == {"model.layers.0.mlp.down_proj"}
    assert set(everything) - set(told(is_packed)) == {"model.layers.0.mlp.down_proj"}


# Modules


@pytest.mark.parametrize(
    ("name", "groups"), [("llama", 3), ("gpt2", 2), ("gemma2", 1), ("phi", 1), ("bloom", 2), ("opt", 4)]
)
def test_a_module_that_is_scaled_computes_what_it_did(name: str, groups: int, monkeypatch: pytest.MonkeyPatch) -> None:
    module = zoo.model(name).float().eval()
    windows = [window % 50 for window in WINDOWS]
    ids = windows[0][None]
    with torch.no_grad():
        wanted = module(ids).logits
    made: list[nn.Module] = []
    original = scaling.best_scales
    monkeypatch.setattr(
        scaling, "best_scales", lambda weights, moments: made.append(module) or original(weights, moments)
    )
    walk = LayerWalk(module, windows)
    format = format_of("int4:32")
    held = {part: weight.clone() for part in walk.layer.modules() if (weight := matrix(part)) is not None}
    scale_layer(walk, dict.fromkeys(held, format))
    assert len(made) == groups
    assert sum(not torch.equal(weight, matrix(part)) for part, weight in held.items()) >= groups
    with torch.no_grad():
        found = module(ids).logits
    assert float((found - wanted).norm()) <= 1e-5 * float(wanted.norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_module_keeps_its_weights(dtype: torch.dtype) -> None:
    module = zoo.model("llama").to(dtype).eval()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    made = fuser.quantize(module, "int4:32", keep=["*.q_proj"], calibration=[w % 50 for w in WINDOWS], method="awq")
    assert all(torch.equal(value, module.state_dict()[name]) for name, value in before.items())
    after = made.state_dict()
    kept = [name for name in before if name.endswith("q_proj.weight")]
    assert kept and all(after[name].dtype == dtype and not torch.equal(after[name], before[name]) for name in kept)
    assert all(type(part).__name__ == "QuantizedLinear" for name, part in made.named_modules() if "down_proj" in name)


def test_a_method_that_there_is_not() -> None:
    with pytest.raises(UsageError, match="the method of calibration is gptq or awq, not 'magic'"):
        fuser.quantize(fused(), "int4", calibration=WINDOWS, method="magic")
