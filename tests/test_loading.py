"""fuser.load: files of exporters, of fuser itself and of ONNX Runtime's optimizers, called by name."""

import contextlib
import io
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

import fuser
from fuser.checking import relative_error
from fuser.errors import FuserError, InputError, UnsupportedOperator, UsageError, VerificationError
from fuser.runtime.torch_kernels import KERNELS
from fuser.tensors import to_array
from tests import architectures, models, zoo
from tests.architectures import V
from tests.test_coverage import EXPECTED, LAYERS, expected

TOLERANCE = 2e-5
EXPORTS = [("llama", "torchscript"), ("llama", "optimum"), ("gpt2", "torchscript"), ("bert", "torchscript")]


def agrees(model: fuser.Model, path: Path, architecture: str) -> None:
    for name, feeds in zoo.cases(path).items():
        outputs = {name: to_array(tensor) for name, tensor in model(feeds).items()}
        error = zoo.relative_error(outputs, zoo.reference(architecture, feeds))
        assert error <= TOLERANCE, f"{name}: {error:.1e}"


@pytest.mark.parametrize(("architecture", "exporter"), EXPORTS)
def test_loads_an_export(architecture: str, exporter: str) -> None:
    path = zoo.exported(architecture, exporter)
    model = fuser.load(path)
    assert model.fused == expected(architecture, exporter)
    agrees(model, path, architecture)
    plain = fuser.load(path, fuse=False)
    assert plain.fused == {}
    agrees(plain, path, architecture)


@pytest.mark.parametrize("target", ["ort", "onnx", "functions"])
@pytest.mark.parametrize(("architecture", "exporter"), EXPORTS)
def test_loads_what_fuser_wrote(architecture: str, exporter: str, target: str, tmp_path: Path) -> None:
    path, written = zoo.exported(architecture, exporter), tmp_path / "fused.onnx"
    fuser.fuse(path, target=target, verify=False).save(written)
    agrees(fuser.load(written), path, architecture)


def test_loads_group_query_attention(tmp_path: Path) -> None:
    path, written = zoo.exported("llama", "torchscript"), tmp_path / "fused.onnx"
    fuser.fuse(path, dims={"sequence": 1}, verify=False).save(written)
    assert "GroupQueryAttention" in {node.op_type for node in onnx.load(written).graph.node}
    model = fuser.load(written)
    for padding in (0, 2):
        feeds = zoo.feeds(path, 3, 1, 6, padding=padding)
        outputs = {name: to_array(tensor) for name, tensor in model(feeds).items()}
        assert zoo.relative_error(outputs, zoo.reference("llama", feeds)) <= TOLERANCE


@pytest.mark.parametrize("level", ["EXTENDED", "ALL"])
@pytest.mark.parametrize(("architecture", "exporter"), EXPORTS)
def test_loads_what_onnx_runtime_optimized(architecture: str, exporter: str, level: str, tmp_path: Path) -> None:
    path, written = zoo.exported(architecture, exporter), tmp_path / "optimized.onnx"
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, f"ORT_ENABLE_{level}")
    options.optimized_model_filepath = str(written)
    onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    assert "com.microsoft" in {node.domain for node in onnx.load(written).graph.node}
    agrees(fuser.load(written), path, architecture)


@pytest.mark.parametrize(("architecture", "heads"), [("gpt2", 4), ("bert", 4)])
def test_loads_what_the_transformers_optimizer_wrote(architecture: str, heads: int, tmp_path: Path) -> None:
    optimizer = pytest.importorskip("onnxruntime.transformers.optimizer")
    path, written = zoo.exported(architecture, "torchscript"), tmp_path / "optimized.onnx"
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        made = optimizer.optimize_model(str(path), model_type=architecture, num_heads=heads, hidden_size=0, opt_level=0)
        made.save_model_to_file(str(written))
    assert "SkipLayerNormalization" in {node.op_type for node in onnx.load(written).graph.node}
    agrees(fuser.load(written), path, architecture)


def test_inputs_by_name() -> None:
    path = zoo.exported("bert", "torchscript")
    model, feeds = fuser.load(path, verify=False), zoo.cases(path)["chunk"]
    once = model(feeds)
    tensors = {name: torch.from_numpy(array) for name, array in feeds.items()}
    assert list(once) == model.outputs and set(model.inputs) == feeds.keys()
    for again in (model(tensors), model(**feeds), model({"input_ids": feeds["input_ids"]}, **{k: v for k, v in feeds.items() if k != "input_ids"})):  # fmt: skip
        assert all(torch.equal(again[name], once[name]) for name in once)


@pytest.mark.parametrize(
    ("inputs", "named", "text"),
    [
        ({}, {}, "'input_ids' is missing"),
        ({"input_ids": np.ones((1, 2), np.int64)}, {"input_ids": 1}, "input 'input_ids' is given twice"),
        ([1, 2], {}, "inputs must be a mapping from names to tensors, got list"),
    ],
)
def test_odd_calls_are_refused(inputs: Any, named: dict[str, Any], text: str) -> None:
    model = fuser.load(zoo.exported("bert", "torchscript"), verify=False)
    with pytest.raises(InputError, match=text):
        model(inputs, **named)


def test_odd_inputs_are_refused() -> None:
    path = zoo.exported("bert", "torchscript")
    model, feeds = fuser.load(path, verify=False), zoo.cases(path)["chunk"]
    with pytest.raises(InputError, match="'extra' is unknown; the inputs are input_ids, "):
        model(feeds, extra=np.ones(1))
    with pytest.raises(InputError, match="input 'input_ids' must be a torch tensor or a numpy array, got list"):
        model(feeds | {"input_ids": [[1]]})
    with pytest.raises(InputError, match="input 'input_ids' must be int64, got int32"):
        model(feeds | {"input_ids": feeds["input_ids"].astype(np.int32)})


def test_odd_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError):
        fuser.load(tmp_path / "none.onnx")
    strange = models.one("(float[N] x) => (float[N] y) { y = strange.Twist(x) }", more=', "strange": 1')
    onnx.save(strange, tmp_path / "strange.onnx")
    with pytest.raises(UnsupportedOperator, match=r"strange\.Twist"):
        fuser.load(tmp_path / "strange.onnx")
    with pytest.raises(UsageError):
        fuser.load(zoo.exported("bert", "torchscript"), dims={"nothing": 1})


def test_a_wrong_kernel_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fused graph, as it will run, is compared with the file's own."""
    attention = KERNELS["attention"]

    def off(*inputs: Any, **attributes: Any) -> torch.Tensor:
        wrong: torch.Tensor = attention(*inputs, **attributes) * 1.01
        return wrong

    monkeypatch.setitem(KERNELS, "attention", off)
    path = zoo.exported("bert", "torchscript")
    with pytest.raises(VerificationError, match="differs from the original by"):
        fuser.load(path)
    assert fuser.load(path, verify=False).fused["attention"] == LAYERS


def test_dims_are_fixed() -> None:
    model = fuser.load(zoo.exported("bert", "torchscript"), dims={"batch": 1}, verify=False)
    feeds = zoo.feeds(zoo.exported("bert", "torchscript"), 2, 3, 0)
    with pytest.raises(FuserError, match="its axis 0 must be 1"):
        model(feeds)


def test_loads_a_folder(tmp_path: Path) -> None:
    """What save_pretrained writes, of the class its config names and in the type it is stored in, or in another."""
    saved = architectures.model("qwen2")
    saved.save_pretrained(tmp_path)
    loaded = fuser.load(tmp_path)
    assert isinstance(loaded, type(saved)) and loaded.dtype is torch.float32 and not loaded.training
    assert loaded.report.fused == EXPECTED["qwen2"] and loaded.report.verification.passed
    ids = torch.randint(1, V, (2, 5))
    with torch.no_grad():
        assert relative_error(loaded(ids).logits, saved(ids).logits) <= TOLERANCE
    assert fuser.load(tmp_path, dtype=torch.float64).dtype is torch.float64


def test_folders_that_cannot_be_loaded(tmp_path: Path) -> None:
    with pytest.raises(fuser.InputError, match="has no config.json"):
        fuser.load(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "nothing of the kind"}', encoding="utf-8")
    with pytest.raises(fuser.InputError, match="cannot be loaded"):
        fuser.load(tmp_path)
    architectures.model("llama").save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(fuser.InputError, match="cannot be loaded"):
        fuser.load(tmp_path)
    with pytest.raises(fuser.UsageError, match="dims and fuse are for files"):
        fuser.load(tmp_path, dims={"batch": 1})
    with pytest.raises(fuser.UsageError, match="dtype is for folders"):
        fuser.load(zoo.exported("llama", "torchscript"), dtype=torch.float16)
