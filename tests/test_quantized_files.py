"""Quantized weights in ONNX files: what ONNX Runtime computes with them, and that they are read back bit by bit."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import transformers
from typer.testing import CliRunner

import fuser
from fuser import dims, importer, patterns, products
from fuser.canonicalize import canonicalize
from fuser.checking import relative_error
from fuser.cli import app
from fuser.constants import Array, Joined, Transposed
from fuser.dtypes import DType
from fuser.errors import UsageError, VerificationError
from fuser.exporter import export
from fuser.formats import format_of
from fuser.graph import FUSER, Graph, Value
from fuser.lowering import TARGETS
from fuser.quantized import Codes, Quantized, quantize_activations
from fuser.quantizing import constant_of
from fuser.tensors import to_tensor
from fuser.verification import session
from tests import models

DEMO = Path(__file__).parents[1] / "models/demo/model.onnx"
FORMATS = (
    "int8", "int8:channel", "int8:32:asymmetric", "int4", "int4:32", "int4:64:asymmetric", "int4:channel",
    "int4:channel:asymmetric", "nf4", "nf4:32", "nf4:channel", "w8a8", "fp8",
)  # fmt: skip
SHAPES = ((3, 1), (7, 33), (16, 96), (5, 130), (2, 600))  # N, K
TOLERANCE = {DType.FLOAT32: 1e-6, DType.FLOAT16: 2e-3, DType.FLOAT64: 1e-6}
assert "fake_quantize" in {operator.name for operator in patterns.ALL}
BY_CODES = {"int4": "MatMulNBits", "int8": "MatMulNBits", "nf4": "MatMulBnb4", "w8a8": "MatMulInteger"}


def drawn(*shape: int, seed: int = 0, scale: float = 0.05) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape))) * scale


def weights(format: str, sizes: tuple[int, ...], K: int, dtype: DType) -> list[Quantized]:
    """Quantized weights [N, K], a row of zeros among them."""
    found = []
    for number, N in enumerate(sizes):
        weight = drawn(N, K, seed=number) + 0.03
        weight[N // 2] = 0
        found.append(constant_of(Codes.of(weight, format_of(format)), Array.of(np.zeros(1), dtype)))
    return found


def graph_of(parts: list[Quantized], dtype: DType, opset: int) -> Graph:
    """One product x [B, S, K] @ [W1 | W2 | ...], its input rounded where the format says so."""
    graph = Graph("one", opset)
    x = Value("x", dtype, (dims.symbol("B"), dims.symbol("S"), parts[0].width))
    graph.inputs.append(x)
    for axis in (0, 1):
        graph.define(x.shape[axis], x, axis)
    given = x
    if kind := parts[0].format.activations:
        node = graph.add("fake_quantize", [x], {"kind": kind}, domain=FUSER)
        given = node.output
        given.dtype, given.shape = dtype, x.shape
    whole = [Transposed(part) for part in parts]
    weight = graph.constant(Joined(tuple(whole)) if len(whole) > 1 else whole[0], "weight")
    y = graph.add("MatMul", [given, weight], outputs=["y"]).output
    y.dtype, y.shape, y.is_output = dtype, (*x.shape[:2], sum(part.shape[0] for part in parts)), True
    graph.outputs, graph.output_names = [y], ["y"]
    return graph


def reference(x: torch.Tensor, parts: list[Quantized]) -> torch.Tensor:
    """In float64, of rounded inputs and of the weights that the codes stand for."""
    if kind := parts[0].format.activations:
        values, scales = quantize_activations(x, kind)
        x = values.double() * scales.double()
    return torch.cat([x.double() @ part.tensors().weight.double().T for part in parts], -1)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("format", FORMATS)
def test_products(format: str, target: str, dtype: DType) -> None:
    for N, K in SHAPES:
        parts = weights(format, (N,), K, dtype)
        artifact = export(graph_of(parts, dtype, 21), target, {})
        for B, S in ((1, 1), (2, 5), (1, 0)):
            x = drawn(B, S, K, scale=1.0).to(dtype.torch)
            if S > 2:
                x[0, 2] = 0
            found = session(artifact.model.SerializeToString(), optimize=True).run(None, {"x": x.numpy()})[0]
            error = relative_error(to_tensor(found), reference(x, parts))
            assert found.shape == (B, S, N) and error <= TOLERANCE[dtype], (N, K, B, S, error)
        ops = {node.op_type for node in artifact.model.graph.node}
        kind = "w8a8" if format == "w8a8" else format.split(":")[0]
        if target == "ort" and dtype is not DType.FLOAT64 and kind in BY_CODES:
            assert BY_CODES[kind] in ops and not artifact.notes
        elif kind == "nf4":
            assert ["nf4" in note for note in artifact.notes] == [True]
        else:
            assert "DequantizeLinear" in ops and not artifact.notes


@pytest.mark.parametrize("target", ("onnx", "functions"))
def test_an_old_opset_has_numbers_in_place_of_codes(target: str) -> None:
    graph = graph_of(weights("int4:32", (6,), 40, DType.FLOAT32), DType.FLOAT32, 17)
    (product,) = graph.nodes
    product.carried = (onnx.helper.make_attribute("unknown", 1),)  # such a graph stays in the opset it is of
    artifact = export(graph, target, {})
    assert artifact.notes == ["1 weight in int4:32 written as numbers: the target has no such codes"]
    assert artifact.weight_bytes == 6 * 40 * 4


@pytest.mark.parametrize("target", TARGETS)
def test_joined_weights_of_several_formats(target: str) -> None:
    parts = [
        found
        for format in ("int4:32", "int4:32", "nf4:32", "int8")
        for found in weights(format, (5,), 70, DType.FLOAT32)
    ]
    x = drawn(2, 3, 70, scale=1.0)
    artifact = export(graph_of(parts, DType.FLOAT32, 17), target, {})
    found = session(artifact.model.SerializeToString(), optimize=True).run(None, {"x": x.numpy()})[0]
    assert relative_error(to_tensor(found), reference(x, parts)) <= 1e-6
    if target == "ort":  # neighbours of one format are one product
        ops = Counter(node.op_type for node in artifact.model.graph.node)
        assert ops["MatMulNBits"] == 2 and ops["MatMulBnb4"] == 1


def rows_of(graph: Graph) -> Counter[tuple[str, bytes, bytes]]:
    """Every row of every weight in codes: its type, its codes, what they stand for."""
    leaves = {
        id(leaf): leaf
        for value in graph.constants()
        if value.constant is not None
        for leaf in value.constant.leaves()
        if isinstance(leaf, Quantized)
    }
    found: Counter[tuple[str, bytes, bytes]] = Counter()
    for leaf in leaves.values():
        held = leaf.tensors()
        for codes, weight in zip(held.codes.numpy(), held.weight.numpy(), strict=True):
            found[leaf.dtype, codes.tobytes(), weight.tobytes()] += 1
    return found


@pytest.mark.parametrize("dtype", (DType.FLOAT32, DType.FLOAT16), ids=str)
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("format", FORMATS)
def test_codes_come_back(format: str, target: str, dtype: DType, tmp_path: Path) -> None:
    if format.startswith("nf4") and target != "ort":
        pytest.skip("numbers, there")
    for N, K in SHAPES:
        parts = weights(format, (N,), K, dtype)
        export(graph_of(parts, dtype, 21), target, {}).write(tmp_path / "model.onnx")
        back = importer.load(tmp_path / "model.onnx", None)
        written = graph_of(parts, dtype, 21)
        canonicalize(back)
        back.validate()
        (product,) = (node for node in back.nodes if node.op == "MatMul")
        assert {node.op for node in back.nodes} <= {"MatMul", "fake_quantize"}
        constant = product.inputs[1].constant if product.inputs[1] is not None else None
        assert isinstance(constant, Transposed) and isinstance(constant.base, Quantized)
        assert constant.base.format.activations == parts[0].format.activations
        assert rows_of(back) == rows_of(written)
        if K == 600 and not constant.base.format.activations:
            assert str(constant.base.format) == str(parts[0].format)


def plain_model(K: int, N: int, bias: bool = True) -> onnx.ModelProto:
    body = "(float[B, S, K] x) => (float[B, S, N] y) { " + (
        "p = MatMul(x, w) y = Add(p, b) }" if bias else "y = MatMul(x, w) }"
    )
    held = {"w": drawn(K, N).numpy()} | ({"b": drawn(N).numpy()} if bias else {})
    return models.one(body.replace("K]", f"{K}]").replace("N]", f"{N}]"), held, opset=21)


def _read(model: onnx.ModelProto, tmp_path: Path) -> tuple[Graph, Any]:
    onnx.save(model, tmp_path / "theirs.onnx")
    graph = importer.load(tmp_path / "theirs.onnx", None)
    canonicalize(graph)
    return graph, fuser.load(tmp_path / "theirs.onnx")


@pytest.mark.parametrize("K", (96, 130))
@pytest.mark.parametrize("block", (32, 64, 128))
@pytest.mark.parametrize("symmetric", (True, False))
@pytest.mark.parametrize("bits", (4, 8))
@pytest.mark.parametrize("as_qdq", (False, True))
def test_what_onnx_runtime_quantized(
    bits: int, symmetric: bool, block: int, K: int, as_qdq: bool, tmp_path: Path
) -> None:
    quantizers = pytest.importorskip("onnxruntime.quantization.matmul_nbits_quantizer")
    form = onnxruntime.quantization.QuantFormat.QDQ if as_qdq else onnxruntime.quantization.QuantFormat.QOperator
    if as_qdq and bits == 8:
        pytest.skip("it writes none")
    config = quantizers.DefaultWeightOnlyQuantConfig(
        block_size=block, is_symmetric=symmetric, bits=bits, quant_format=form, accuracy_level=0
    )
    quantizer = quantizers.MatMulNBitsQuantizer(plain_model(K, 10), algo_config=config)
    quantizer.process()
    model = quantizer.model.model
    assert "MatMul" not in {node.op_type for node in model.graph.node} or as_qdq
    graph, loaded = _read(model, tmp_path)
    assert sum(rows_of(graph).values()) == 10
    x = drawn(2, 3, K, scale=1.0)
    theirs = session(model.SerializeToString(), optimize=True).run(None, {"x": x.numpy()})[0]
    assert relative_error(loaded(x=x)["y"], to_tensor(theirs)) <= 1e-6
    again = fuser.fuse(tmp_path / "theirs.onnx")
    assert again.report.verification.passed and "MatMulNBits" in {n.op_type for n in again._artifact.model.graph.node}


@pytest.mark.parametrize("block", (16, 32, 64, 128))
def test_nf4_of_onnx_runtime(block: int, tmp_path: Path) -> None:
    quantizers = pytest.importorskip("onnxruntime.quantization.matmul_bnb4_quantizer")
    for K in (128, 70):  # blocks that go on from row to row are no groups
        quantizer = quantizers.MatMulBnb4Quantizer(plain_model(K, 6, bias=False), quant_type=1, block_size=block)
        quantizer.process()
        model = quantizer.model.model
        graph, loaded = _read(model, tmp_path)
        assert sum(rows_of(graph).values()) == (6 if K == 128 and block > 16 else 0)
        x = drawn(2, 3, K, scale=1.0)
        theirs = session(model.SerializeToString(), optimize=True).run(None, {"x": x.numpy()})[0]
        assert relative_error(loaded(x=x)["y"], to_tensor(theirs)) <= 1e-6


@pytest.mark.parametrize("kind", (np.int8, np.uint8))
@pytest.mark.parametrize("per_channel", (True, False))
def test_dequantized_weights_of_others(kind: Any, per_channel: bool, tmp_path: Path) -> None:
    """DequantizeLinear along either axis, [K, N] or [N, K] and transposed; zero points of any value."""
    random = np.random.RandomState(0)
    K, N = 40, 6
    for transposed in (False, True):
        shape = (N, K) if transposed else (K, N)
        codes = random.randint(0, 100, shape).astype(kind)
        scales = random.rand(N).astype(np.float32) if per_channel else np.float32(0.01)
        zeros = random.randint(0, 100, N).astype(kind) if per_channel else kind(3)
        axis = 0 if transposed else 1
        read = "t = Transpose<perm=[1, 0]>(d) y = MatMul(x, t)" if transposed else "y = MatMul(x, d)"
        body = f"(float[B, {K}] x) => (float[B, {N}] y) {{ d = DequantizeLinear<axis={axis}>(c, s, z) {read} }}"
        model = models.one(body, {"c": codes, "s": scales, "z": zeros}, opset=21)
        graph, loaded = _read(model, tmp_path)
        assert sum(rows_of(graph).values()) == N
        x = drawn(3, K, scale=1.0)
        theirs = models.run(model, {"x": x.numpy()})[0]
        assert relative_error(loaded(x=x)["y"], to_tensor(theirs)) <= 1e-6


def test_what_is_no_weight_of_ours_stays(tmp_path: Path) -> None:
    """A scale for each input, a table of embeddings, a reordered weight."""
    codes = np.arange(240, dtype=np.uint8).reshape(40, 6)
    scales = drawn(40).abs().numpy()
    body = "(float[B, 40] x) => (float[B, 6] y) { d = DequantizeLinear<axis=0>(c, s) y = MatMul(x, d) }"
    graph, loaded = _read(models.one(body, {"c": codes, "s": scales}, opset=21), tmp_path)
    assert not rows_of(graph)
    table = "(int64[B] x) => (float[B, 6] y) { d = DequantizeLinear<axis=0>(c, s) y = Gather(d, x) }"
    graph, loaded = _read(models.one(table, {"c": codes, "s": scales}, opset=21), tmp_path)
    assert not rows_of(graph)
    ids = np.array([3, 39])
    expected = codes[ids].astype(np.float32) * scales[ids, None]
    np.testing.assert_allclose(loaded(x=ids)["y"].numpy(), expected, rtol=1e-6)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("format", ("int4", "int8:channel", "int4:32:asymmetric", "nf4", "w8a8", "fp8"))
def test_the_demo_model(format: str, target: str, tmp_path: Path) -> None:
    fused = fuser.fuse(DEMO, quantize=format, target=target)
    report = fused.report
    assert report.verification.passed and len(report.verification.cases) == 4
    assert report.quantized == {str(format_of(format)): 35}
    large = format == "nf4" and target != "ort"
    assert (report.weights_bytes_after > report.weights_bytes_before / 2) == large == bool(report.notes)
    fused.save(tmp_path / "q.onnx")
    again = fuser.fuse(tmp_path / "q.onnx", target=target)
    assert again.report.verification.passed
    if not large:
        assert rows_of(again.graph) == rows_of(fused.graph)
        ids = [list(range(5, 40))]
        ours = fuser.LLM(DEMO, quantization=format, max_length=64).score(ids)[0].logprobs
        theirs = fuser.LLM(tmp_path / "q.onnx", max_length=64).score(ids)[0].logprobs
        assert np.allclose(ours, theirs, rtol=0, atol=1e-5)


def test_scales_of_eight_bits_are_written_as_numbers(tmp_path: Path) -> None:
    fused = fuser.fuse(DEMO, quantize="nf4:double")
    assert fused.report.verification.passed and fused.report.quantized == {"nf4:64:double": 35}
    note = "scales of 35 weights in nf4:64:double written as numbers: the target has none of 8 bits"
    assert fused.report.notes == [note]
    fused.save(tmp_path / "q.onnx")
    again = fuser.fuse(tmp_path / "q.onnx", verify=False)
    assert again.report.quantized == {"nf4:64": 20}  # what is packed is one
    assert rows_of(again.graph) == rows_of(fused.graph)


def test_the_command_says_what_it_quantized(tmp_path: Path) -> None:
    out = tmp_path / "q.onnx"
    arguments = [
        DEMO,
        "-o",
        out,
        "--quantize",
        "int4:64",
        "--keep",
        "*.layers.0",
        "--override",
        "*.down_proj=int8:channel",
    ]
    found = CliRunner().invoke(app, [*map(str, arguments), "--quantize-head", "--json"])
    assert found.exit_code == 0, found.stderr
    report = json.loads(found.stdout)
    assert report["quantized"] == {"int4:64": 25, "int8:channel": 5}
    assert report["weights_bytes"]["after"] < report["weights_bytes"]["before"]
    off = report["weight_errors"]
    assert f"25 in int4:64 (off by {off['int4:64']:.2%}), 5 in int8:channel (off by " in found.stderr
    for wrong in (["--quantize", "int3"], ["--keep", "x"], ["--quantize", "int4", "--override", "x"]):
        refused = CliRunner().invoke(app, [str(DEMO), *wrong])
        assert refused.exit_code == 2 and len(refused.stderr.splitlines()) == 1
    with pytest.raises(UsageError, match="nothing is quantized"):
        fuser.fuse(DEMO, quantize="int4", keep=["*"], verify=False)


# Prints by how many bytes the most memory of a process's own exceeded what it had before. Files that are mapped do not count.
STREAMED = """
import re, sys, threading, time
from pathlib import Path
import fuser
from fuser.loading import pretrained

def own():
    with open("/proc/self/status") as file:
        return 1024 * int(re.search(r"RssAnon:\\s+(\\d+) kB", file.read())[1])

def watch():
    global most
    while True:
        most = max(most, own())
        time.sleep(0.001)

kind, model, warm = sys.argv[1:]
fuser.fuse(warm, quantize="int4", verify=False)  # what is loaded once
given = pretrained(Path(model), None, None) if kind == "folder" else model
most = before = own()
threading.Thread(target=watch, daemon=True).start()
if kind == "folder":
    made = fuser.quantize(given, "int4", head=True)
else:
    made = fuser.fuse(model, quantize="int4", head=True, verify=False)
print(most - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is measured as Linux counts it")
@pytest.mark.parametrize("kind", ("file", "folder"))
def test_weights_are_quantized_one_after_another(kind: str, tmp_path: Path) -> None:
    """Of 96 MB of weights or more no more is held than codes, an eighth, and a few times the largest, 8 MB: less than a layer."""
    if kind == "file":
        nodes, x = models.Nodes(21), "x"
        for number in range(12):
            weight = drawn(*((1024, 2048) if number % 2 == 0 else (2048, 1024)))
            x = nodes("MatMul", x, nodes.const(weight, np.float32))
        made = nodes.model([models.tensor("x", ["B", 1024])], [models.tensor(x, ["B", 1024])])
        onnx.save(made, tmp_path / "large.onnx", save_as_external_data=True, location="large.data")
        model, layer = tmp_path / "large.onnx", 32 << 20
    else:
        config = transformers.LlamaConfig(
            hidden_size=1024, intermediate_size=2048, num_hidden_layers=4, num_attention_heads=8, vocab_size=128
        )
        transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "folder")
        model, layer = tmp_path / "folder", 4 * (4 * 1024 * 1024 + 3 * 1024 * 2048)
    arguments = [sys.executable, "-c", STREAMED, kind, str(model), str(DEMO)]
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}  # what is freed is given back at once
    found = subprocess.run(arguments, env=environment, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    weights = (96 << 20) if kind == "file" else 4 * layer
    codes = weights / 4 * (0.5 + 2 / 128)
    assert codes < int(found.stdout) + (4 << 20) < codes + layer, found.stdout


def test_an_accuracy_level_is_kept(tmp_path: Path) -> None:
    """It is left out of the comparison, and is that of the source where none is given."""

    def levels(fused: fuser.FusedModel) -> set[int]:
        nodes = [node for node in fused._artifact.model.graph.node if node.op_type == "MatMulNBits"]
        found = [{a.name: a.i for a in node.attribute}.get("accuracy_level", 0) for node in nodes]
        assert fused.report.verification.passed and found
        return set(found)

    assert levels(fuser.fuse(DEMO, quantize="int8")) == {0}
    rounding = fuser.fuse(DEMO, quantize="int8", accuracy_level=4)
    assert levels(rounding) == {4}
    rounding.save(tmp_path / "q.onnx")
    assert levels(fuser.fuse(tmp_path / "q.onnx")) == {4}
    assert levels(fuser.fuse(tmp_path / "q.onnx", accuracy_level=0)) == {0}
    with pytest.raises(UsageError, match="0 to 4"):
        fuser.fuse(DEMO, quantize="int8", accuracy_level=5)


def test_a_wrong_result_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    right = products.nbits

    def wrong(weight: Quantized, block: int, dtype: DType) -> Any:
        codes, scales, zeros = right(weight, block, dtype)
        return codes, Array.of(scales.numpy() * 1.01, scales.dtype), zeros

    monkeypatch.setattr(products, "nbits", wrong)
    with pytest.raises(VerificationError):
        fuser.fuse(DEMO, quantize="int4")
