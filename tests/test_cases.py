"""Golden cases: in tests/cases/<fusion>/<case>.txt a small graph, and under `---` what becomes of it.

A case whose name begins with `not_` must leave the fusion of its folder undone, any other must fuse. What stands under
the line is written by `pytest tests/test_cases.py --update-golden`, and is read before it is committed.
"""

import re
from pathlib import Path

import numpy as np
import onnx
import pytest

from fuser import patterns
from fuser.dtypes import DType
from fuser.exporter import export
from fuser.graph import FUSER, Graph
from fuser.report import miss_lines
from fuser.rewriting import Miss, rewrite
from tests import text_graphs

FOLDER = Path(__file__).parent / "cases"
CASES = sorted(FOLDER.glob("*/*.txt"))
LINE = "---\n"
TOLERANCE = {DType.FLOAT32: 2e-6, DType.FLOAT16: 2e-3}


def _described(graph: Graph, misses: list[Miss]) -> str:
    lines = [
        str(graph) if any(node.domain == FUSER and node.op != "Rsqrt" for node in graph.nodes) else "nothing fused"
    ]
    for miss in misses:
        # A pattern may move within its file.
        lines += ["", *(re.sub(r"\.py:\d+", ".py", line) for line in miss_lines(miss))]
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize("path", CASES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_case(path: Path, update_golden: bool) -> None:
    text, _, expected = path.read_text().partition(LINE)
    model = text_graphs.parse(_without_comments(text))
    graph = text_graphs.canonical(model)
    outcome = rewrite(graph, patterns.ALL)
    graph.validate()

    fused = path.parent.name in outcome.fused
    assert fused is not path.stem.startswith("not_"), f"fused: {outcome.fused}\n{_described(graph, outcome.misses)}"
    if update_golden:
        path.write_text(f"{text}{LINE}{_described(graph, outcome.misses)}")
    else:
        assert _described(graph, outcome.misses) == expected
    _same_results(model, graph)


def _without_comments(text: str) -> str:
    return "\n".join(line for line in text.splitlines() if not line.startswith("#"))


def _same_results(model: onnx.ModelProto, graph: Graph) -> None:
    inputs = text_graphs.feeds(model)
    reference = text_graphs.run(model, inputs, optimize=False)
    coarse = any(value.dtype is DType.FLOAT16 for value in graph.values())
    for target in ("ort", "functions"):
        fused = export(graph, target, {}).model
        if target == "functions":  # ONNX does not know what ONNX Runtime adds to its domain
            onnx.checker.check_model(fused)
        for actual, expected in zip(text_graphs.run(fused, inputs), reference, strict=True):
            assert actual.dtype == expected.dtype
            tolerance = TOLERANCE[DType.FLOAT16 if coarse else DType.FLOAT32]
            if expected.dtype.kind == "f":
                assert text_graphs.relative_error(actual, expected) <= tolerance, target
            else:
                np.testing.assert_array_equal(actual, expected)


# Roundings of inputs are made by quantizing, and read from files as they are (tests/test_quantized_files.py).
MADE = {"fake_quantize"}
KINDS = {op.name for op in patterns.ALL} - {"packed_linear"} - MADE | {"qkv_linear", "gate_up_linear"}


@pytest.mark.parametrize("fusion", sorted(KINDS))
def test_every_fusion_has_both_kinds(fusion: str) -> None:
    cases = [path.stem for path in CASES if path.parent.name == fusion]
    assert any(name.startswith("not_") for name in cases)
    assert any(not name.startswith("not_") for name in cases)
