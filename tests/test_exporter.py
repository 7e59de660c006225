"""What goes out to a file: nothing lost, nothing twice, the same bytes every time, and whole or not at all."""

import contextlib
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import ModelProto, TensorProto, helper, numpy_helper

import fuser
from fuser import exporter, patterns
from fuser.canonicalize import canonicalize
from fuser.importer import load
from fuser.lowering import lower
from fuser.rewriting import rewrite
from tests import models, zoo
from tests.models import one, tensor

TARGETS = ("ort", "functions")


@pytest.fixture
def beside(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights go beside the model from the first byte on."""
    monkeypatch.setattr(exporter, "INLINE_LIMIT", 0)


def props(message: Any) -> dict[str, str]:
    return {entry.key: entry.value for entry in message.metadata_props}


def files(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


# What the file says of itself


def test_header_and_metadata_survive() -> None:
    model = models.decoder(1)
    model.producer_name, model.producer_version, model.domain = "an exporter", "7.1", "org.example"
    model.model_version, model.doc_string, model.graph.doc_string = 42, "a model", "a graph"
    model.graph.name = "the name"
    model.metadata_props.add(key="license", value="none")
    model.metadata_props.add(key="fuser.version", value="0.0.0")  # of an earlier run
    model.graph.metadata_props.add(key="graph", value="kept")
    for node in model.graph.node:
        node.metadata_props.add(key="namespace", value=f": {node.op_type}")
    fused = fuser.fuse(model)
    result = fused._artifact.model
    for name in ("producer_name", "producer_version", "domain", "model_version", "doc_string", "ir_version"):
        assert getattr(result, name) == getattr(model, name)
    assert (result.graph.name, result.graph.doc_string) == ("the name", "a graph")
    assert props(result.graph) == {"graph": "kept"}
    assert props(result) == {
        "license": "none",
        "fuser.version": fuser.__version__,
        "fuser.target": "ort",
        "fuser.fusions": json.dumps(dict(sorted(models.decoder_fusions(1).items()))),
    }
    untouched = [node for node in result.graph.node if node.op_type == "Gather"]
    assert {props(node)["namespace"] for node in untouched} == {": Gather"}
    norms = [node for node in result.graph.node if node.op_type == "SkipSimplifiedLayerNormalization"]
    assert all("fuser.sources" in props(node) for node in norms) and norms


def test_nodes_say_where_they_came_from() -> None:
    result = fuser.fuse(zoo.exported("llama", "dynamo"), verify=False, target="functions")._artifact.model
    found = {props(node).get("fuser.module") for node in result.graph.node if node.domain == "fuser"}
    assert {"model.model.layers.0.mlp", "model.model.layers.1.mlp"} & found or any(
        name and "layers.1" in name for name in found
    )
    for node in result.graph.node:
        if node.domain == "fuser":
            assert props(node)["fuser.sources"]


def test_functions_target_is_a_complete_model() -> None:
    """Bodies of standard operators: the file passes ONNX's checker and runs without any contributed operator."""
    model = models.decoder(2)
    result = fuser.fuse(model, target="functions")._artifact.model
    onnx.checker.check_model(result, full_check=True)
    assert {o.domain for o in result.opset_import} == {"", "fuser"}
    assert {n.domain for n in result.graph.node} == {"", "fuser"}
    assert len({f.name for f in result.functions}) == len(result.functions)
    feeds = {"input_ids": np.array([[1, 5, 2]])}
    np.testing.assert_allclose(models.run(result, feeds)[0], models.run(model, feeds)[0], rtol=1e-4, atol=1e-5)


def test_shapes_in_the_file_are_consistent() -> None:
    result = fuser.fuse(zoo.exported("llama", "torchscript"), target="functions")._artifact.model
    onnx.checker.check_model(result, full_check=True)
    made = {value for node in result.graph.node for value in node.output} - {
        value.name for value in result.graph.output
    }
    read = {value for node in result.graph.node for value in node.input}
    assert {info.name for info in result.graph.value_info} >= made & read
    inferred = onnx.shape_inference.infer_shapes(result, strict_mode=True, data_prop=True)
    assert [o.name for o in inferred.graph.output] == [o.name for o in result.graph.output]


@pytest.mark.parametrize("target", TARGETS)
def test_fusing_again_changes_nothing(target: str, tmp_path: Path) -> None:
    """What fuser wrote is read again, found fused, and written again the same."""
    first = fuser.fuse(models.decoder(2), target=target)
    first.save(tmp_path / "first.onnx")
    second = fuser.fuse(tmp_path / "first.onnx", target=target)
    assert second.report.fused == first.report.fused
    assert not second.report.verification.skipped
    second.save(tmp_path / "second.onnx")
    third = fuser.fuse(tmp_path / "second.onnx", target=target)
    assert third.report.fused == first.report.fused
    after, before = (fused._artifact.model.graph for fused in (third, second))
    assert [node.op_type for node in after.node] == [node.op_type for node in before.node]


# Weights


@pytest.mark.parametrize("target", TARGETS)
def test_merged_weights_are_written_once(target: str, beside: None, tmp_path: Path) -> None:
    source = models.decoder(2)
    weights = {w.name: numpy_helper.to_array(w) for w in source.graph.initializer}
    fuser.fuse(source, target=target).save(tmp_path / "m.onnx")
    (data,) = tmp_path.glob("*.data")
    result = onnx.load(tmp_path / "m.onnx")
    written = [numpy_helper.to_array(w) for w in result.graph.initializer]
    for layer in range(2):
        for parts in ("qkv", ("gate", "up")):
            whole = np.concatenate([weights[f"layers.{layer}.{part}"] for part in parts], axis=1)
            assert sum(w.shape == whole.shape and (w == whole).all() for w in written) == 1
            for part in parts:
                alone = weights[f"layers.{layer}.{part}"]
                assert not any(w.shape == alone.shape and (w == alone).all() for w in written)
    large = sum(w.nbytes for w in written if w.nbytes > 1024)
    assert large == sum(w.nbytes for w in weights.values() if w.nbytes > 1024)
    assert data.stat().st_size < sum(w.nbytes for w in written) + 4096 * (len(written) + 1)


def test_external_data_is_aligned_and_complete(beside: None, tmp_path: Path) -> None:
    fused = fuser.fuse(models.decoder(1))
    fused.save(tmp_path / "m.onnx")
    (data,) = tmp_path.glob("*.data")
    proto = onnx.load(tmp_path / "m.onnx", load_external_data=False)
    ranges = []
    for weight in proto.graph.initializer:
        if weight.data_location == TensorProto.EXTERNAL:
            assert not weight.raw_data and models.entry(weight, "location").value == data.name
            offset, length = (int(models.entry(weight, key).value) for key in ("offset", "length"))
            assert offset % 4096 == 0
            assert length == int(np.prod(weight.dims)) * 4
            ranges.append((offset, offset + length))
    ranges.sort()
    assert all(end <= start for (_, end), (start, _) in pairwise(ranges))
    assert ranges[-1][1] == data.stat().st_size
    feeds = {"input_ids": np.array([[1, 5, 2]])}
    np.testing.assert_array_equal(
        models.run(tmp_path / "m.onnx", feeds)[0], models.run(onnx.load(tmp_path / "m.onnx"), feeds)[0]
    )
    assert not fuser.fuse(tmp_path / "m.onnx").report.verification.skipped


def test_odd_weights_beside_the_model(beside: None, tmp_path: Path) -> None:
    """Scalars, empty tensors, strings and four-bit integers, next to a large tensor."""
    weights = {
        "scalar": np.float32(2),
        "none": np.zeros((0, 3), np.float32),
        "large": models.random(64, 64),
        "text": np.array(["a", "b"], object),
    }
    model = one(
        "(float[N] x) => (float a, float[0, 3] b, float[64, 64] c, string[2] d, float[N] e) {"
        " a = Identity(scalar) b = Identity(none) c = Identity(large) d = Identity(text) e = Mul(x, scalar) }",
        weights,
    )
    model.graph.initializer.append(helper.make_tensor("four", TensorProto.INT4, [3000], [1, -2, 3] * 1000))
    model.graph.node.append(helper.make_node("Identity", ["four"], ["f"]))
    model.graph.output.append(tensor("f", [3000], TensorProto.INT4))
    model.opset_import[0].version = 21
    fuser.fuse(model).save(tmp_path / "m.onnx")
    found = {w.name: numpy_helper.to_array(w) for w in onnx.load(tmp_path / "m.onnx").graph.initializer}
    for name, array in weights.items():
        np.testing.assert_array_equal(found[name], array)
    np.testing.assert_array_equal(found["four"].astype(int), [1, -2, 3] * 1000)


# Determinism

PROGRAM = """
import json, sys
from pathlib import Path
import fuser
from fuser import exporter
source, folder, target, beside = sys.argv[1:]
if beside == "beside":
    exporter.INLINE_LIMIT = 0
fused = fuser.fuse(source, target=target)
fused.save(Path(folder) / "out.onnx")
report = fused.report.to_json()
del report["stages_s"]
(Path(folder) / "report.json").write_text(json.dumps(report))
"""


@pytest.mark.parametrize(
    ("architecture", "made_by", "target", "where"),
    [("llama", "torchscript", "ort", "inside"), ("gpt2", "dynamo", "functions", "beside")],
)
def test_same_input_same_bytes(architecture: str, made_by: str, target: str, where: str, tmp_path: Path) -> None:
    source = zoo.exported(architecture, made_by)
    runs = []
    for seed in ("0", "1", "4242"):
        folder = tmp_path / seed
        folder.mkdir()
        runs.append(
            (
                folder,
                subprocess.Popen(
                    [sys.executable, "-c", PROGRAM, str(source), str(folder), target, where],
                    env={**os.environ, "PYTHONHASHSEED": seed, "OMP_NUM_THREADS": "1"},
                    cwd=Path(__file__).parent.parent,
                ),
            )
        )
    assert [process.wait(120) for _, process in runs] == [0, 0, 0]
    first = runs[0][0]
    assert ("out.onnx" in files(first)) and (len(files(first)) == (3 if where == "beside" else 2))
    for folder, _ in runs[1:]:
        assert files(folder) == files(first)
        for name in files(first):
            assert (folder / name).read_bytes() == (first / name).read_bytes(), name


def test_same_call_same_bytes(beside: None, tmp_path: Path) -> None:
    for target in TARGETS:
        made = []
        for run in ("a", "b"):
            folder = tmp_path / target / run
            folder.mkdir(parents=True)
            fuser.fuse(models.decoder(2), target=target).save(folder / "m.onnx")
            made.append({name: (folder / name).read_bytes() for name in files(folder)})
        assert made[0] == made[1]
        assert len(made[0]) == 2


# Whole or not at all

OLD = b"what stood here before"


@pytest.fixture
def old(tmp_path: Path) -> Path:
    path = tmp_path / "out.onnx"
    path.write_bytes(OLD)
    return path


def failing(monkeypatch: pytest.MonkeyPatch, at: int, error: OSError) -> list[int]:
    """Makes the `at`-th of the calls that change the disk fail; the list counts them."""
    calls: list[int] = []

    def wrap(module: Any, name: str) -> None:
        real = getattr(module, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            calls.append(0)
            if len(calls) == at:
                raise error
            return real(*args, **kwargs)

        monkeypatch.setattr(module, name, call)

    for name in ("replace", "fsync"):
        wrap(os, name)
    wrap(exporter.tempfile, "mkstemp")
    real_open = Path.open

    def opening(self: Path, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        file = real_open(self, mode, *args, **kwargs)
        if "w" not in mode:
            return file

        class Failing:
            """A file whose every write counts."""

            def __enter__(self) -> "Failing":
                return self

            def __exit__(self, *_: object) -> None:
                file.close()

            def write(self, data: bytes) -> int:
                calls.append(0)
                if len(calls) == at:
                    file.write(data[: len(data) // 2])
                    raise error
                return int(file.write(data))

            def __getattr__(self, name: str) -> Any:
                return getattr(file, name)

        return Failing()

    monkeypatch.setattr(Path, "open", opening)
    return calls


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EACCES, errno.EROFS, errno.EDQUOT])
def test_failure_at_every_step_leaves_the_old_file(
    code: int, old: Path, beside: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    fused = fuser.fuse(models.norms())
    step = 0
    while True:
        step += 1
        with monkeypatch.context() as patch:
            calls = failing(patch, step, OSError(code, os.strerror(code)))
            try:
                fused.save(old)
            except fuser.OutputError as error:
                reason = "the disk is full" if code == errno.ENOSPC else os.strerror(code)
                assert str(error) == f"'{old}' could not be written: {reason}; nothing was changed"
            else:
                break
        assert old.read_bytes() == OLD
        leftover = [name for name in files(old.parent) if name != old.name]
        assert all(name.endswith(".data") for name in leftover) and len(leftover) <= 1, leftover
    assert step == len(calls) == 10  # the last is the folder, whose sync is a courtesy
    onnx.load(old)
    assert len(files(old.parent)) == 2


@contextlib.contextmanager
def small_disk(folder: Path, size: str) -> Iterator[None]:
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], capture_output=True)
    if mounted.returncode:
        pytest.skip("a small file system cannot be mounted here")
    try:
        yield
    finally:
        subprocess.run(["umount", folder], check=True)


@pytest.mark.parametrize("where", ["inside", "beside"])
def test_full_disk(where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not shutil.which("mount") or os.geteuid() != 0:
        pytest.skip("a small file system cannot be mounted here")
    if where == "beside":
        monkeypatch.setattr(exporter, "INLINE_LIMIT", 0)
    fused = fuser.fuse(models.decoder(2, D=128, F=256), verify=False)  # 1.2 MB
    with small_disk(tmp_path, "600k"):
        path = tmp_path / "out.onnx"
        path.write_bytes(OLD)
        with pytest.raises(fuser.OutputError, match="the disk is full; nothing was changed"):
            fused.save(path)
        assert path.read_bytes() == OLD
        assert files(tmp_path) == ["out.onnx"]


def test_read_only_folder(tmp_path: Path) -> None:
    fused = fuser.fuse(models.norms(), verify=False)
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "out.onnx").write_bytes(OLD)
    folder.chmod(0o555)
    try:
        if os.access(folder, os.W_OK):
            pytest.skip("this user may write anywhere")
        with pytest.raises(fuser.OutputError, match="Permission denied; nothing was changed"):
            fused.save(folder / "out.onnx")
        assert (folder / "out.onnx").read_bytes() == OLD
    finally:
        folder.chmod(0o755)


def test_read_only_disk(tmp_path: Path) -> None:
    if not shutil.which("mount") or os.geteuid() != 0:
        pytest.skip("a file system cannot be mounted here")
    fused = fuser.fuse(models.norms(), verify=False)
    with small_disk(tmp_path, "1m"):
        (tmp_path / "out.onnx").write_bytes(OLD)
        subprocess.run(["mount", "-o", "remount,ro", tmp_path], check=True)
        with pytest.raises(fuser.OutputError, match="Read-only file system; nothing was changed"):
            fused.save(tmp_path / "out.onnx")
        assert (tmp_path / "out.onnx").read_bytes() == OLD


KILLED = """
import os, sys
from pathlib import Path
import fuser
from fuser import exporter
exporter.INLINE_LIMIT = 0
step, real = int(sys.argv[3]), {}
count = 0
def wrap(module, name):
    real = getattr(module, name)
    def call(*args, **kwargs):
        global count
        count += 1
        if count == step:
            os.kill(os.getpid(), 9)
        return real(*args, **kwargs)
    setattr(module, name, call)
fused = fuser.fuse(sys.argv[1], verify=False)
for name in ("replace", "fsync", "chmod"):
    wrap(os, name)
fused.save(sys.argv[2])
print("done", count)
"""


def test_killed_while_writing(tmp_path: Path) -> None:
    """After SIGKILL at any step, the old model is there with its weights, or the new one is."""
    source = tmp_path / "source.onnx"
    onnx.save(models.decoder(1), source)
    other = fuser.fuse(models.norms(), verify=False)
    feeds = [{"x": models.random(1, 2, 24)}, {"input_ids": np.array([[1, 2]])}]
    finished, step, running = False, 0, []
    while step < 8:
        step += 1
        folder = tmp_path / str(step)
        folder.mkdir()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(exporter, "INLINE_LIMIT", 0)
            fuser.fuse(models.norms(), verify=False).save(folder / "out.onnx")
        command = [sys.executable, "-c", KILLED, str(source), str(folder / "out.onnx"), str(step)]
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            cwd=Path(__file__).parent.parent,
        )
        running.append((folder / "out.onnx", process))
        if len(running) < 2 and step < 8:
            continue
        for path, waiting in running:
            waiting.communicate(timeout=60)
            assert waiting.returncode in (0, -signal.SIGKILL)
            inputs = models.session(path).get_inputs()[0].name  # the file loads, its weights are there
            (fed,) = (f for f in feeds if inputs in f)
            models.run(path, fed)
            if waiting.returncode == 0:
                finished = True
                assert inputs == "input_ids"
        running = []
    assert finished
    assert other.report.fused == models.NORMS


def test_a_smaller_model_takes_the_old_weights_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "m[1].onnx"
    with monkeypatch.context() as patch:
        patch.setattr(exporter, "INLINE_LIMIT", 0)
        fuser.fuse(models.decoder(1)).save(path)
        assert len(files(tmp_path)) == 2
        fuser.fuse(models.norms()).save(path)
        assert len(files(tmp_path)) == 2
    for name in ("m[1].onnx.mine.data", "m[1].onnx.0123456789ab.data.txt", "m1.onnx.0123456789ab.data"):
        (tmp_path / name).touch()
    fuser.fuse(models.norms()).save(path)
    assert len(files(tmp_path)) == 4


def test_weights_that_the_source_still_reads_stay(tmp_path: Path, beside: None) -> None:
    fuser.fuse(models.decoder(1)).save(tmp_path / "a.onnx")
    shutil.copy(tmp_path / "a.onnx", tmp_path / "b.onnx")  # b reads a's weights
    fuser.fuse(tmp_path / "b.onnx", target="functions").save(tmp_path / "a.onnx")
    for name in ("a.onnx", "b.onnx"):
        models.run(tmp_path / name, {"input_ids": np.array([[1, 2]])})


def test_outputs_that_are_inputs(tmp_path: Path) -> None:
    data = models.save_external(models.norms(), tmp_path / "m.onnx")
    fused = fuser.fuse(tmp_path / "m.onnx")
    os.link(tmp_path / "m.onnx", tmp_path / "hard.onnx")
    (tmp_path / "soft.onnx").symlink_to("m.onnx")
    before = {name: (tmp_path / name).read_bytes() for name in files(tmp_path)}
    for path in (tmp_path / "m.onnx", tmp_path / "hard.onnx", tmp_path / "soft.onnx", data, tmp_path / "." / "m.onnx"):
        with pytest.raises(fuser.UsageError, match="is the input; write to another file"):
            fused.save(path)
    with pytest.raises(fuser.UsageError, match="is a directory"):
        fused.save(tmp_path)
    with pytest.raises(fuser.UsageError, match="is not a folder"):
        fused.save(tmp_path / "missing" / "m.onnx")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(fuser.UsageError, match="is not a regular file"):
        fused.save(tmp_path / "pipe")
    (tmp_path / "pipe").unlink()
    with pytest.raises(fuser.UsageError, match="File name too long"):
        fused.save(tmp_path / ("n" * 300))
    assert {name: (tmp_path / name).read_bytes() for name in files(tmp_path)} == before


def test_names_at_the_limit(tmp_path: Path, beside: None) -> None:
    """A name that is legal itself, but not with what is put around it, is refused in words."""
    path = tmp_path / ("n" * 250 + ".onnx")
    with pytest.raises(fuser.OutputError, match="File name too long; nothing was changed"):
        fuser.fuse(models.norms()).save(path)
    assert files(tmp_path) == []


def test_files_have_the_usual_permissions(tmp_path: Path, beside: None) -> None:
    mask = os.umask(0o027)
    try:
        fuser.fuse(models.norms()).save(tmp_path / "m.onnx")
    finally:
        os.umask(mask)
    assert {file.stat().st_mode & 0o777 for file in tmp_path.iterdir()} == {0o640}


def test_saving_is_quick_enough_to_be_done_twice(tmp_path: Path) -> None:
    fused = fuser.fuse(models.decoder(1))
    start = time.perf_counter()
    fused.save(tmp_path / "a.onnx")
    fused.save(tmp_path / "b.onnx")
    assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes()
    assert time.perf_counter() - start < 5


def test_model_given_as_a_proto_is_not_changed() -> None:
    model = models.decoder(1)
    copy = ModelProto()
    copy.CopyFrom(model)
    fuser.fuse(model)
    assert model == copy


@pytest.mark.parametrize(
    ("architecture", "made_by"), [("llama", "torchscript"), ("gpt2", "optimum"), ("qwen2", "dynamo")]
)
@pytest.mark.parametrize("target", TARGETS)
def test_graph_is_valid_after_every_stage(architecture: str, made_by: str, target: str) -> None:
    graph = load(zoo.exported(architecture, made_by))
    graph.validate()
    canonicalize(graph)
    graph.validate()
    for operator in patterns.ALL:
        rewrite(graph, [operator], verify=False)
        graph.validate()
    before = str(graph)
    lowered = graph.clone()
    lowered.validate()
    lower(lowered, target)
    lowered.validate()
    assert str(graph) == before
    assert not any(node.domain == "fuser" for node in lowered.nodes) or target == "functions"
