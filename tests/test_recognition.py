"""Masks whose closed form shows only where one looks far enough, and what may be written when an opset cannot be raised."""

from pathlib import Path

import numpy as np
import onnx
import pytest

import fuser
from fuser import lowering, patterns
from fuser.graph import FUSER, Graph
from fuser.rewriting import rewrite
from tests import text_graphs, zoo

STORED = """
<ir_version: 10, opset_import: ["" : 20]>
g (float[batch, 4, seq, 16] q, float[batch, 4, seq, 16] k, float[batch, 4, seq, 16] v) => (float[batch, 4, seq, 16] y)
<float quarter = {0.25}, float lowest = {-inf}, int64[1] zero = {0}, int64[1] rows = {2}, int64[1] columns = {3},
 bool[1, 1, 64, 64] stored>
{
  shape = Shape(q)
  s = Gather(shape, rows)
  upper = Slice(stored, zero, s, rows)
  allowed = Slice(upper, zero, s, columns)
  turned = Transpose<perm = [0, 1, 3, 2]>(k)
  scores = MatMul(q, turned)
  scaled = Mul(scores, quarter)
  masked = Where(allowed, scaled, lowest)
  weights = Softmax<axis = -1>(masked)
  y = MatMul(weights, v)
}
"""


def _recognized(stored: np.ndarray) -> tuple[Graph, list[str]]:
    model = text_graphs.parse(STORED)
    (tensor,) = (tensor for tensor in model.graph.initializer if tensor.name == "stored")
    tensor.CopyFrom(onnx.numpy_helper.from_array(stored[None, None], "stored"))
    graph = text_graphs.canonical(model)
    outcome = rewrite(graph, patterns.ALL)
    return graph, [miss.found for miss in outcome.misses if miss.fusion == "attention_mask"]


@pytest.mark.parametrize("window", [64, 40, 5])
def test_a_stored_mask_is_looked_at_to_its_end(window: int) -> None:
    distance = np.arange(64)[:, None] - np.arange(64)
    graph, refused = _recognized((distance >= 0) & (distance < window))
    (mask,) = (node for node in graph.nodes if node.is_a("attention_mask", FUSER))
    assert mask.attributes == {"left_window": -1 if window == 64 else window - 1, "right_window": 0}
    assert refused == []


def test_one_wrong_element_of_a_stored_mask_is_found() -> None:
    stored = np.tril(np.ones((64, 64), np.bool_))
    stored[62, 3] = False
    graph, refused = _recognized(stored)
    assert not any(node.is_a("attention_mask", FUSER) for node in graph.nodes)
    assert len(refused) == 1 and "query 62 of sequence 0 does not attend to key 3" in refused[0]


@pytest.mark.parametrize("sizes", [{}, {"sequence": 1}], ids=["dynamic", "one token"])
def test_an_opset_that_cannot_be_raised(sizes: dict[str, int], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(lowering, "_raise_opset", lambda graph, target: None)
    made = fuser.fuse(zoo.exported("llama", "torchscript"), dims=sizes)
    made.save(tmp_path / "fused.onnx")
    written = onnx.load(tmp_path / "fused.onnx")
    assert next(entry.version for entry in written.opset_import if not entry.domain) == 17
    assert not {"Attention", "RotaryEmbedding"} & {node.op_type for node in written.graph.node if not node.domain}
    assert made.report.verification.passed and made.report.verification.cases
