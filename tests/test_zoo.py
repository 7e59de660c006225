"""Is each model of the zoo, as every exporter wrote it, the model that torch runs?"""

from pathlib import Path
from typing import Literal

import numpy as np
import onnx
import onnxruntime
import pytest

from tests import zoo

CASES = ("decode", "prefill", "chunk", "padded")
DEMANDED = ("llama", "qwen2", "gpt2")
# A dynamo export takes some ten seconds: the fast ones are of these models, and there is a fast one of every model.
FAST = {(a, e) for a in DEMANDED for e in ("dynamo", "dynamo23")} | {(a, "torchscript") for a in zoo.ARCHITECTURES}
EXPORTS = [
    pytest.param(a, e, marks=() if (a, e) in FAST or e == "optimum" else pytest.mark.slow) for a, e in zoo.EXPORTS
]


@pytest.mark.parametrize(("architecture", "exporter"), EXPORTS)
def test_export_equals_torch(architecture: str, exporter: str) -> None:
    path = zoo.exported(architecture, exporter)
    cases = zoo.cases(path)
    assert tuple(cases) == (("decode", "padded") if "decode" in exporter else CASES)
    for name, feeds in cases.items():
        if name == "padded" and "prefill" in exporter:
            continue  # implementations differ in what queries get that may attend to nothing
        expected = zoo.reference(architecture, feeds)
        for optimize in (False, True):
            error = zoo.relative_error(zoo.standard(zoo.run(path, feeds, optimize=optimize)), expected)
            assert error <= 2e-5, f"{name}, optimize={optimize}: {error:.1e}"


@pytest.mark.parametrize(("architecture", "exporter"), EXPORTS)
def test_mask_matters(architecture: str, exporter: str) -> None:
    path = zoo.exported(architecture, exporter)
    padded = zoo.cases(path)["padded"]
    assert not padded["attention_mask"].all()
    unpadded = padded | {"attention_mask": np.ones_like(padded["attention_mask"])}
    first = "logits" if zoo.ARCHITECTURES[architecture].causal else "last_hidden_state"
    with_mask, without = zoo.run(path, padded)[first], zoo.run(path, unpadded)[first]
    assert zoo.relative_error({first: without[0]}, {first: with_mask[0]}) > 1e-2
    np.testing.assert_array_equal(without[1], with_mask[1])  # this sequence has no padding


@pytest.mark.parametrize(
    ("architecture", "exporter", "attn"),
    [(a, e, None) for a in DEMANDED for e in ("dynamo", "dynamo23", "torchscript")]
    + [("llama", "torchscript", "sdpa"), ("qwen2", "torchscript", "sdpa")],
)
def test_float16(architecture: str, exporter: str, attn: Literal["sdpa", "eager"] | None) -> None:
    path = zoo.exported(architecture, exporter, dtype="float16", attn=attn)
    for feeds in zoo.cases(path).values():
        outputs = zoo.run(path, feeds)
        assert {a.dtype for a in outputs.values()} == {np.dtype(np.float16)}
        assert zoo.relative_error(outputs, zoo.reference(architecture, feeds)) <= 5e-3


def test_weights_hide_nothing() -> None:
    for architecture in zoo.ARCHITECTURES:
        for name, parameter in zoo.model(architecture).named_parameters():
            assert parameter.std() > 0.05, f"{architecture}: {name} is nearly constant"


@pytest.mark.slow
def test_many_layers() -> None:
    path = zoo.exported("llama", "torchscript", layers=32)
    feeds = zoo.cases(path)["chunk"]
    assert "past_key_values.31.value" in feeds
    assert zoo.relative_error(zoo.run(path, feeds), zoo.reference("llama", feeds, layers=32)) <= 2e-5


def test_attention_implementations_differ() -> None:
    def operators(attn: Literal["sdpa", "eager"]) -> list[str]:
        return [node.op_type for node in onnx.load(zoo.exported("llama", "torchscript", attn=attn)).graph.node]

    assert operators("sdpa") != operators("eager")


def test_export_is_quiet_and_made_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], recwarn: pytest.WarningsRecorder
) -> None:
    monkeypatch.setenv("FUSER_ZOO_CACHE", str(tmp_path))
    for exporter in ("torchscript", "dynamo"):
        path = zoo.exported("llama", exporter, layers=1)
        made = path.stat().st_mtime_ns
        assert zoo.exported("llama", exporter, layers=1).stat().st_mtime_ns == made
        assert path.is_relative_to(tmp_path)
        assert [p for p in path.parent.iterdir() if p.suffix != ".onnx"] == []
    captured = capfd.readouterr()
    assert captured.out + captured.err == ""
    assert [str(w.message) for w in recwarn] == []


def test_optimum_needs_no_network_and_no_options() -> None:
    with pytest.raises(ValueError, match=r"none of llama in float16"):
        zoo.exported("llama", "optimum", dtype="float16")
    with pytest.raises(ValueError, match="none of bert"):
        zoo.exported("bert", "optimum")


def test_relative_error() -> None:
    ones = {"y": np.ones(4, np.float32)}
    assert zoo.relative_error(ones, ones) == 0
    assert zoo.relative_error({"y": np.full(4, 1.5, np.float16)}, ones) == 0.5
    assert zoo.relative_error({"y": np.array([1, 1, 1, np.nan])}, ones) == np.inf
    assert zoo.relative_error({"y": np.full(4, np.nan)}, {"y": np.full(4, np.nan)}) == np.inf
    assert zoo.relative_error({"y": np.ones(4)}, {"y": np.zeros(4)}) == np.inf
    assert zoo.relative_error({"y": np.zeros(0)}, {"y": np.zeros(0)}) == 0
    with pytest.raises(ValueError, match="outputs differ"):
        zoo.relative_error({"z": np.ones(4)}, ones)
    with pytest.raises(ValueError, match=r"y: \(5,\), reference \(4,\)"):
        zoo.relative_error({"y": np.ones(5)}, ones)


def test_cases_of_an_unknown_input() -> None:
    text = '<ir_version: 10, opset_import: ["": 20]> g (float[N] beam) => (float[N] y) { y = Relu(beam) }'
    session = onnxruntime.InferenceSession(onnx.parser.parse_model(text).SerializeToString())
    with pytest.raises(ValueError, match="no feeds for input beam"):
        zoo.cases(session)
