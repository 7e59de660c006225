"""The planner: how many launches a layer is, what each of them holds, and what it reads."""

from functools import cache

import pytest
from typer.testing import CliRunner

from fuser import api, dims, importer, patterns
from fuser.canonicalize import canonicalize
from fuser.cli import app
from fuser.codegen import plan as planning
from fuser.codegen.plan import Launch, Regime, plan
from fuser.errors import UsageError
from fuser.graph import Graph
from fuser.rewriting import rewrite
from tests import zoo
from tests.architectures import DH, D, F, G, H, V

STEP = {"batch": 1, "sequence": 1, "past": 512}


@cache
def _fused(architecture: str, exporter: str = "dynamo") -> Graph:
    graph = importer.load(zoo.exported(architecture, exporter))
    canonicalize(graph)
    rewrite(graph, patterns.ALL)
    return graph


def _steps(launch: Launch) -> list[str]:
    return [node.op for node in launch.nodes if node.op not in planning.VIEWS]


LLAMA = [
    ["rms_norm", "packed_linear", "rotary_cache_write"],
    ["attention"],
    ["MatMul", "Add"],
    ["rms_norm", "packed_linear", "gated_mlp"],
    ["MatMul", "Add"],
]


@pytest.mark.parametrize("exporter", ["dynamo", "dynamo23", "torchscript"])
@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_a_layer_is_five_launches(architecture: str, exporter: str) -> None:
    launches = plan(_fused(architecture, exporter))
    layers = [(count, run) for count, run in planning.folded(launches) if len(run) > 1]
    assert [count for count, _ in layers] == [2]
    assert [_steps(launch) for launch in layers[0][1]] == LLAMA
    assert [launch.family for launch in layers[0][1]] == ["linear", "attention", "linear", "linear", "linear"]
    rest = [_steps(run[0]) for count, run in planning.folded(launches) if len(run) == 1]
    assert rest == [["rotary_table"], ["Gather"], ["rms_norm", "MatMul"]]


def test_many_tokens_have_norms_of_their_own() -> None:
    (layer,) = (run for count, run in planning.folded(plan(_fused("llama"), "prefill")) if count == 2)
    norm = [["rms_norm"]]
    wanted = [*norm, *[[s for s in steps if s != "rms_norm"] for steps in LLAMA[:3]], *norm]
    assert [_steps(launch) for launch in layer] == [*wanted, ["packed_linear", "gated_mlp"], ["MatMul", "Add"]]


@pytest.mark.parametrize(("architecture", "launches"), [("qwen3", 5), ("gpt2", 5), ("phi3", 5), ("gemma2", 7)])
def test_launches_of_a_layer(architecture: str, launches: int) -> None:
    """Norms of queries and keys join the projection; those after attention and MLP are two launches more."""
    (layer,) = (run for count, run in planning.folded(plan(_fused(architecture))) if count == 2)
    assert len(layer) == launches


@pytest.mark.parametrize("regime", planning.REGIMES)
@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gpt2", "bert"])
def test_every_node_is_computed_once(architecture: str, regime: Regime) -> None:
    """Norms that several products compute again apart; nothing reads what is made later."""
    graph = _fused(architecture)
    made: set[str] = {value.name for value in graph.inputs}
    computed: list[int] = []
    for launch in plan(graph, regime):
        for value in launch.inputs:
            is_made = value.constant is not None or value.producer is None or value.name in made
            assert is_made or planning._is_host(value.producer) or planning._masks_alone(value.producer), value
        computed += [id(node) for role, node in launch.parts if role != "prologue"]
        made |= {value.name for node in launch.nodes for value in node.outputs}
    assert len(computed) == len(set(computed))
    given_out = [value for launch in plan(graph, regime) for value in launch.outputs if value.is_output]
    assert len(given_out) == len(graph.outputs)


def test_bytes_and_operations() -> None:
    """Of one token on a past of 512, float32, as one counts them by hand."""
    table, gather, *layers, head = plan(_fused("llama"))
    qkv, attention, out, gate_up, down = layers[:5]
    width = (H + 2 * G) * DH
    cos_sin, norm = 2 * DH // 2, D
    written = H * DH + 2 * G * DH
    assert planning.at(qkv.bytes, STEP) == 4 * (D + norm + D * width + cos_sin + written)
    assert planning.at(attention.bytes, STEP) == 4 * (H * DH + 2 * 513 * G * DH + H * DH)
    assert planning.at(out.bytes, STEP) == 4 * (H * DH + H * DH * D + D + D)
    assert planning.at(gate_up.bytes, STEP) == 4 * (D + norm + 2 * D * F + F)
    assert planning.at(down.bytes, STEP) == 4 * (F + D * F + D + D)
    assert planning.at(head.bytes, STEP) == 4 * (D + norm + D * V + V)
    assert planning.at(gather.bytes, STEP) == 8 + 4 * D
    assert planning.at(down.flops, STEP) == 2 * D * F + D
    assert planning.at(attention.flops, STEP) == 4 * H * DH * 513
    assert planning.at(qkv.bytes, {}) is None
    assert not any(str(s) == "past" for launch in (qkv, out, gate_up, down) for s in dims.symbols([launch.bytes]))
    assert table.family == "positions"


def test_the_command() -> None:
    path = str(zoo.exported("llama", "torchscript"))
    sizes = [part for name, size in STEP.items() for part in ("--size", f"{name}={size}")]
    result = CliRunner().invoke(app, ["plan-kernels", path, *sizes])
    assert result.exit_code == 0
    printed = result.stdout.splitlines()
    assert printed[2] == "2 times:" and len(printed) == 9
    assert "rms_norm + packed_linear + gated_mlp" in printed[6] and printed[6].endswith("model.model.layers.0")
    assert "58.3 kB" in printed[6]
    assert "batch*" in CliRunner().invoke(app, ["plan-kernels", path]).stdout  # what is not told stays a formula
    refused = CliRunner().invoke(app, ["plan-kernels", path, "--regime", "training"])
    assert refused.exit_code == 2 and "regimes are decode, prefill" in refused.stderr
    with pytest.raises(UsageError, match="regimes are decode, prefill"):
        api.plan_kernels(path, regime="training")
