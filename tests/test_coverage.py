"""Every architecture of the zoo from every exporter: what is fused, and is the result the model it was?

docs/coverage.md is the table of what these tests measure; `pytest tests/test_coverage.py --update-golden` writes it.
"""

import importlib.metadata
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

import fuser
from fuser.api import FusedModel
from fuser.evaluation import evaluate
from fuser.importer import load
from fuser.tensors import to_tensor
from tests import zoo

DOCUMENT = Path(__file__).parents[1] / "docs" / "coverage.md"
TARGETS = ("ort", "onnx", "functions")
TOLERANCE = 2e-5  # relative, norm-wise, float32
# Of the error that the unfused model makes: in ONNX Runtime, which on the CPU computes what it has no float16 kernel for in
# float32 and does not round between two such nodes, and where every node rounds to float16.
FLOAT16_RATIO = 1.5
LAYERS = 2

ATTENTION = {"attention": LAYERS, "attention_mask": 1, "qkv_linear": LAYERS}
LLAMA = ATTENTION | {
    "rms_norm": 1,
    "skip_rms_norm": 2 * LAYERS,
    "gate_up_linear": LAYERS,
    "gated_mlp": LAYERS,
    "rotary_cache_write": LAYERS,
    "rotary_table": 1,
}
EXPECTED: dict[str, dict[str, int]] = {
    "llama": LLAMA,
    "qwen2": LLAMA,
    "mistral": LLAMA,
    "phi3": LLAMA,
    "qwen3": LLAMA | {"rms_norm": 1 + 2 * LAYERS},  # those of queries and keys
    # those after attention and MLP; a mask with a window and one without
    "gemma2": LLAMA | {"rms_norm": 1 + 2 * LAYERS, "attention_mask": 2},
    "gpt2": ATTENTION | {"skip_layer_norm": 1 + 2 * LAYERS, "cache_write": LAYERS, "gelu_tanh": LAYERS},
    "bert": ATTENTION | {"position_ids": 1, "layer_norm": 1, "skip_layer_norm": 2 * LAYERS, "gelu": LAYERS},
}
MORE: dict[str, set[str]] = {  # of the architectures that are not demanded yet, what some construct is fused as
    "gptj": {"rotary_cache_write", "attention", "attention_mask"},
    "cohere": {"rotary_cache_write", "rotary_table", "attention", "attention_mask"},
    "glm": {"rotary_cache_write", "rotary_table", "attention", "attention_mask"},
    "gpt_neox": {"rotary_cache_write", "rotary_table", "attention", "attention_mask"},
    "phi": {"rotary_cache_write", "rotary_table", "attention", "attention_mask"},
    "stablelm": {"rotary_cache_write", "rotary_table", "attention", "attention_mask"},
    "llama_linear": set(LLAMA),
    "llama_dynamic": set(LLAMA),
    "llama_llama3": set(LLAMA),
    "llama_yarn": set(LLAMA),
    "llama_longrope": set(LLAMA) - {"rotary_table"},  # of two sets of frequencies, chosen by the longest position
    "llama_counting": {*LLAMA, "position_ids"},
}
MISSES = {"llama_longrope": ["rotary_table"]}


def expected(architecture: str, exporter: str) -> dict[str, int]:
    """What is to be found in one export; a prompt without a past has no cache to write to."""
    found = EXPECTED[architecture]
    if (architecture, exporter) == ("gemma2", "optimum"):
        return found | {"position_ids": 1}  # it counts them by itself
    if exporter != "transformers-prefill":
        return found
    rest = {kind: count for kind, count in found.items() if kind != "rotary_cache_write"}
    return rest | {"rotary": 2 * LAYERS}


DEMANDED = ("llama", "qwen2", "gpt2")
# A dynamo export takes some ten seconds when it is not cached: those of the other architectures are marked slow.
EXPORTS = [
    pytest.param(a, e, marks=() if a in DEMANDED or not e.startswith("dynamo") else pytest.mark.slow)
    for a, e in zoo.EXPORTS
]


@cache
def _fused(path: Path, target: str) -> FusedModel:
    return fuser.fuse(path, target=target)


def _saved(path: Path, target: str, folder: Path) -> Path:
    saved = folder / f"{path.stem}-{target}.onnx"
    _fused(path, target).save(saved)
    return saved


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(("architecture", "exporter"), EXPORTS)
def test_fuses(architecture: str, exporter: str, target: str, tmp_path: Path) -> None:
    path = zoo.exported(architecture, exporter)
    report = _fused(path, target).report
    assert report.fused == expected(architecture, exporter)
    assert report.misses == []
    saved = _saved(path, target, tmp_path)
    worst = 0.0
    for name, feeds in zoo.cases(path).items():
        error = zoo.relative_error(zoo.run(saved, feeds), zoo.run(path, feeds, optimize=False))
        assert error <= TOLERANCE, f"{name}: {error:.1e}"
        worst = max(worst, error)
    counts = ", ".join(f"{kind} {count}" for kind, count in sorted(report.fused.items()))
    print(f"\n{architecture} {exporter} {target}: {report.nodes_before} -> {report.nodes_after}, {worst:.1e}: {counts}")


@pytest.mark.parametrize(("architecture", "exporter"), [pair for pair in zoo.MORE_EXPORTS if pair[0] in MORE])
def test_fuses_more(architecture: str, exporter: str, tmp_path: Path) -> None:
    """Rotary embedding in all its forms: neighbours or halves, of all channels or some, with frequencies scaled."""
    path = zoo.exported(architecture, exporter)
    report = _fused(path, "ort").report
    assert set(report.fused) >= MORE[architecture]
    assert [miss.fusion for miss in report.misses] == MISSES.get(architecture, [])
    assert all("positions of one sequence 0, 1, 2, 7" in miss.found for miss in report.misses)
    saved = _saved(path, "ort", tmp_path)
    for name, feeds in zoo.cases(path).items():
        error = zoo.relative_error(zoo.run(saved, feeds), zoo.run(path, feeds, optimize=False))
        assert error <= TOLERANCE, f"{name}: {error:.1e}"


ONE_TOKEN = [pair for pair in zoo.EXPORTS if pair[1] == "torchscript" and pair[0] != "bert"]


@pytest.mark.parametrize(("architecture", "exporter"), ONE_TOKEN)
def test_one_new_token(architecture: str, exporter: str, tmp_path: Path) -> None:
    """Where only one new token is possible, GroupQueryAttention is: on any batch, padded on the left or on the right."""
    path, saved = zoo.exported(architecture, exporter), tmp_path / "fused.onnx"
    made = fuser.fuse(path, dims={"sequence": 1})
    assert made.report.fused == expected(architecture, exporter)
    assert made.report.misses == []
    made.save(saved)
    operators = [node.op_type for node in onnx.load(saved).graph.node]
    assert operators.count("GroupQueryAttention") == LAYERS
    for padding in (0, 2, -2):
        feeds = zoo.feeds(path, 3, 1, 6, padding=max(0, padding))
        feeds["attention_mask"][-1, 4:6] = padding >= 0
        error = zoo.relative_error(zoo.run(saved, feeds), zoo.run(path, feeds, optimize=False))
        assert error <= TOLERANCE, f"padding {padding}: {error:.1e}"


def test_nodes_of_a_layer() -> None:
    """A layer of Llama: two norms with their residual adds, qkv, rotary and cache write, attention, o, gate and up, gate, down."""
    sizes = [
        fuser.fuse(zoo.exported("llama", "torchscript", layers=n), target="functions").report.nodes_after
        for n in (2, 4)
    ]
    assert sizes[1] - sizes[0] == 2 * 9


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(("architecture", "exporter"), EXPORTS)
def test_rows_that_attend_to_nothing(architecture: str, exporter: str, target: str, tmp_path: Path) -> None:
    path = zoo.exported(architecture, exporter)
    feeds = zoo.padded_prefill(path)
    actual, expected = zoo.run(_saved(path, target, tmp_path), feeds), zoo.run(path, feeds, optimize=False)
    finite = {name: np.isfinite(array) for name, array in expected.items()}
    assert all(numbers.any() for numbers in finite.values())
    kept = [{name: arrays[name][finite[name]] for name in expected} for arrays in (actual, expected)]
    assert zoo.relative_error(*kept) <= TOLERANCE


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(("architecture", "exporter"), EXPORTS)
def test_fusing_again_finds_the_same(architecture: str, exporter: str, target: str, tmp_path: Path) -> None:
    path = zoo.exported(architecture, exporter)
    once = _saved(path, target, tmp_path)
    again = fuser.fuse(once, target=target)
    found = expected(architecture, exporter)
    if any(node.op_type == "GroupQueryAttention" for node in onnx.load(once).graph.node):  # which is left as it is
        found = {kind: n for kind, n in found.items() if kind not in ("attention", "rotary_cache_write")} | {
            "rotary": 2 * LAYERS
        }
    assert again.report.fused == found
    assert again.report.misses == []
    twice = tmp_path / "twice.onnx"
    again.save(twice)
    feeds = zoo.cases(path)["padded"]
    assert zoo.relative_error(zoo.run(twice, feeds), zoo.run(path, feeds, optimize=False)) <= TOLERANCE


@torch.no_grad()
def _evaluated(path: Path, feeds: Mapping[str, Any], dtype: torch.dtype | None) -> dict[str, Any]:
    """The outputs of a file evaluated node by node, in the file's own types or with `dtype` for all floating ones."""

    def wide(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor

    graph = load(path)
    values: dict[int, torch.Tensor | None] = {id(v): wide(to_tensor(feeds[v.name])) for v in graph.inputs}
    for value in graph.constants():
        assert value.constant is not None
        values[id(value)] = wide(to_tensor(value.constant.numpy()))
    for node in graph.nodes:
        inputs = [None if v is None else values[id(v)] for v in node.inputs]
        results = evaluate(node, inputs, {}, opset=graph.opset, float_dtype=dtype)
        values.update((id(v), result) for v, result in zip(node.outputs, results, strict=True))
    found = {name: values[id(v)] for name, v in zip(graph.output_names, graph.outputs, strict=True)}
    return {name: tensor.numpy() for name, tensor in found.items() if tensor is not None}


@pytest.mark.parametrize("exporter", ["dynamo", "torchscript"])
@pytest.mark.parametrize("architecture", DEMANDED)
def test_float16_is_as_precise_as_before(architecture: str, exporter: str, tmp_path: Path) -> None:
    path = zoo.exported(architecture, exporter, dtype="float16")
    assert _fused(path, "ort").report.fused == EXPECTED[architecture]
    for name, feeds in zoo.cases(path).items():
        exact = _evaluated(path, feeds, torch.float64)
        before = zoo.relative_error(_evaluated(path, feeds, None), exact)
        on_cpu = zoo.relative_error(zoo.run(path, feeds, optimize=False), exact)
        assert max(before, on_cpu) < 5e-3, "the float64 evaluation is of another model"
        for target in TARGETS:
            after = zoo.relative_error(zoo.run(_saved(path, target, tmp_path), feeds), exact)
            ratios = f"{after / before:.2f} of {before:.1e}, on the CPU {after / on_cpu:.2f} of {on_cpu:.1e}"
            print(f"\n{architecture} {exporter} float16 {target} {name}: {ratios}")
            assert after <= FLOAT16_RATIO * before, f"{name}, {target}: {ratios}"
            assert after <= FLOAT16_RATIO * on_cpu, f"{name}, {target}: {ratios}"


def _versions() -> str:
    return ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("torch", "transformers", "onnxscript"))


def _row(architecture: str, exporter: str) -> str:
    path = zoo.exported(architecture, exporter)
    ort, standard, functions = (_fused(path, target).report for target in TARGETS)
    fused = ", ".join(f"{count} {kind}" for kind, count in sorted(ort.fused.items()))
    counts = f"{ort.nodes_before} | {ort.nodes_after} | {standard.nodes_after} | {functions.nodes_after}"
    return f"| {architecture} | {exporter} | {counts} | {fused} | < {TOLERANCE:.0e} |".replace("e-0", "e-")


HEADER = f"""\
# Coverage

Tiny models ({LAYERS} layers, random weights) of each architecture, exported, fused and run in ONNX Runtime: the number of
nodes before and after, what was fused, and the largest relative error (norm-wise) of any output in decode, prefill, chunked
prefill, a left-padded batch and a left-padded prefill. Every row has no near misses. `pytest tests/test_coverage.py
--update-golden` writes this.

Node counts: {{versions}}.

| architecture | exporter | nodes | `ort` | `onnx` | `functions` | fused | error |
|---|---|---:|---:|---:|---:|---|---:|
"""


def _documented() -> dict[tuple[str, str], str]:
    rows = {}
    for line in DOCUMENT.read_text().splitlines() if DOCUMENT.exists() else []:
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) == 8 and cells[0] in EXPECTED:
            rows[cells[0], cells[1]] = line
    return rows


@pytest.mark.parametrize(("architecture", "exporter"), EXPORTS)
def test_document(architecture: str, exporter: str, update_golden: bool) -> None:
    measured, rows = _row(architecture, exporter), _documented()
    if update_golden:
        rows[architecture, exporter] = measured
        text = "\n".join(rows[key] for key in zoo.EXPORTS if key in rows)
        DOCUMENT.parent.mkdir(exist_ok=True)
        DOCUMENT.write_text(HEADER.format(versions=_versions()) + text + "\n")
        return
    documented = rows[architecture, exporter]
    if f"Node counts: {_versions()}." not in DOCUMENT.read_text():  # other versions write other numbers of nodes
        measured, documented = (re.sub(r"\| \d+ \| \d+ \| \d+ \| \d+ \|", "| |", row) for row in (measured, documented))
    assert measured == documented


def test_document_has_every_row_and_no_other() -> None:
    assert list(_documented()) == zoo.EXPORTS


def test_exact_evaluation_equals_torch() -> None:
    path = zoo.exported("llama", "torchscript")
    feeds = zoo.cases(path)["chunk"]
    exact = {name: np.asarray(value) for name, value in _evaluated(path, feeds, torch.float64).items()}
    assert zoo.relative_error(zoo.reference("llama", feeds), exact) < 2e-6
