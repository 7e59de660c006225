"""The command: what it prints where, what it writes, and the exit code of everything that can go wrong."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from typer.testing import CliRunner, Result

import fuser
from fuser import api, cli, exporter, pipeline, verification
from fuser.cli import console
from tests import models, zoo
from tests.models import one

REPOSITORY = Path(__file__).parent.parent


def fuse(*arguments: Any) -> Result:
    """The command in this process."""
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments])


def refused(code: int, *arguments: Any) -> str:
    """Asserts that the command fails with `code` and one line on stderr; returns the line."""
    result = fuse(*arguments)
    assert result.exit_code == code, result.stderr
    assert result.stdout == ""
    assert result.stderr.startswith("fuse: ") and result.stderr.count("\n") == 1 and result.stderr.endswith("\n")
    assert "Traceback" not in result.stderr and "internal error" not in result.stderr
    return result.stderr


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("source") / "model.onnx"
    onnx.save(models.decoder(2), path)
    return path


NEAR_MISS = """(float[N, 8] x) => (float[N, 8] y) {
    q = Mul(x, x) m = ReduceMean <axes = [-1], keepdims = 1> (q) e = Add(m, eps) r = Sqrt(e) d = Div(x, r) y = Mul(d, w)
}"""


@pytest.fixture(scope="module")
def missing(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An RMSNorm whose epsilon is no scalar: a near miss."""
    path = tmp_path_factory.mktemp("missing") / "near.onnx"
    eps = np.linspace(1e-3, 1e-2, 8, dtype=np.float32)
    onnx.save(one(NEAR_MISS, {"eps": eps, "w": models.random(8)}), path)
    return path


# What it does


def test_done(source: Path, tmp_path: Path) -> None:
    result = fuse(source, "-o", tmp_path / "out.onnx")
    assert result.exit_code == 0
    assert result.stdout == ""
    for name, count in models.decoder_fusions(2).items():
        assert re.search(rf"^ +{name} +{count} fused", result.stderr, re.MULTILINE)
    assert re.search(r"result   equal within \d", result.stderr)
    assert result.stderr.endswith(f"wrote {tmp_path / 'out.onnx'}\n")
    assert [f.name for f in tmp_path.iterdir()] == ["out.onnx"]
    ids = {"input_ids": np.array([[1, 5, 2], [3, 4, 5]])}
    np.testing.assert_allclose(
        models.run(tmp_path / "out.onnx", ids)[0], models.run(source, ids)[0], rtol=1e-4, atol=1e-5
    )


def test_without_an_output_only_the_report_is_made(source: Path, tmp_path: Path) -> None:
    before = list(source.parent.iterdir())
    result = fuse(source)
    assert result.exit_code == 0 and "fused" in result.stderr and "wrote" not in result.stderr
    assert list(source.parent.iterdir()) == before


@pytest.mark.parametrize("target", ["ort", "functions"])
def test_targets(target: str, source: Path, tmp_path: Path) -> None:
    assert fuse(source, "-o", tmp_path / "out.onnx", "--target", target, "-q").exit_code == 0
    model = onnx.load(tmp_path / "out.onnx")
    assert {p.key: p.value for p in model.metadata_props}["fuser.target"] == target
    assert bool(model.functions) == (target == "functions")


def test_quiet_says_nothing(source: Path, tmp_path: Path) -> None:
    result = fuse(source, "-o", tmp_path / "out.onnx", "-q")
    assert (result.exit_code, result.output) == (0, "")
    assert (tmp_path / "out.onnx").exists()


def test_version_and_help() -> None:
    assert fuse("--version").stdout == f"fuse {fuser.__version__}\n"
    for flag in ("-h", "--help"):
        result = fuse(flag)
        assert result.exit_code == 0
        for word in ("--target", "--dim", "--no-verify", "--report", "--explain", "--expect", "--strict", "--json"):
            assert word in result.stdout


REPORT_KEYS = {
    "version", "model", "target", "nodes", "weights_bytes", "quantized", "weight_errors", "quality", "notes", "fusions", "misses", "checks", "stages_s",
    "verification",
}  # fmt: skip


def test_report(source: Path, tmp_path: Path) -> None:
    result = fuse(source, "-o", tmp_path / "out.onnx", "--report", tmp_path / "report.json", "--json")
    assert result.exit_code == 0
    report = json.loads((tmp_path / "report.json").read_text())
    assert json.loads(result.stdout) == report
    assert set(report) == REPORT_KEYS and report["version"] == 1
    assert report["nodes"] == {
        "before": len(onnx.load(source).graph.node),
        "after": len(onnx.load(tmp_path / "out.onnx").graph.node),
    }
    assert report["fusions"] == {
        name: {"fused": count, "missed": 0} for name, count in sorted(models.decoder_fusions(2).items())
    }
    assert report["misses"] == []
    assert set(report["stages_s"]) == {
        "read",
        "canonicalize",
        "recognize",
        "match",
        "check",
        "rewrite",
        "export",
        "verify",
    }
    assert all(seconds >= 0 for seconds in report["stages_s"].values())
    found = report["verification"]
    assert found["status"] == "passed" and found["reason"] is None
    assert 0 < found["max_relative_error"] <= found["tolerance"] and set(found["cases"]) == {"short", "full"}


def test_report_of_near_misses(missing: Path, tmp_path: Path) -> None:
    result = fuse(missing, "--report", tmp_path / "report.json", "--explain")
    assert result.exit_code == 0
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["fusions"]["rms_norm"]["missed"] == 1
    (miss,) = (m for m in report["misses"] if m["fusion"] == "rms_norm")
    assert set(miss) == {
        "fusion", "count", "places", "module", "node", "matched", "total", "pattern", "expected", "found", "reason",
    }  # fmt: skip
    assert "rms_norm" in result.stderr and "1 near miss" in result.stderr
    assert miss["expected"] in result.stderr and miss["pattern"] in result.stderr


def test_reports_are_equal_apart_from_times(source: Path, missing: Path, tmp_path: Path) -> None:
    for path in (source, missing):
        reports = []
        for name in ("a", "b"):
            assert fuse(path, "--report", tmp_path / name, "-q").exit_code == 0
            report = json.loads((tmp_path / name).read_text())
            del report["stages_s"]
            reports.append(json.dumps(report))
        assert reports[0] == reports[1]


def test_no_verify(source: Path) -> None:
    report = json.loads(fuse(source, "--no-verify", "--json", "-q").stdout)
    assert report["verification"]["status"] == "skipped" and report["verification"]["reason"] == "--no-verify"
    assert report["checks"] == {"evaluated": 0, "reused": 0}
    assert report["fusions"]["skip_rms_norm"]["fused"] == 4


def test_dims(tmp_path: Path) -> None:
    path = zoo.exported("llama", "torchscript")
    result = fuse(path, "-o", tmp_path / "out.onnx", "--dim", "batch=1", "--dim", "sequence=1", "--strict", "-q")
    assert result.exit_code == 0, result.stderr
    inputs = {i.name: i.type.tensor_type.shape.dim for i in onnx.load(tmp_path / "out.onnx").graph.input}
    assert [d.dim_value for d in inputs["input_ids"]] == [1, 1]
    feeds = zoo.cases(path)["decode"]
    assert zoo.relative_error(zoo.run(tmp_path / "out.onnx", feeds), zoo.run(path, feeds)) < 2e-5
    line = refused(2, path, "--dim", "btach=1")
    assert "named dims: batch, past, sequence, total" in line


# What it expects


def test_expectations_met(source: Path, tmp_path: Path) -> None:
    result = fuse(
        source, "-o", tmp_path / "o.onnx", "--expect", "skip_rms_norm=4", "--expect", "qkv_linear=2", "--strict", "-q"
    )
    assert (result.exit_code, result.output) == (0, "")
    assert (tmp_path / "o.onnx").exists()


@pytest.mark.parametrize("expected", ["skip_rms_norm=3", "skip_rms_norm=5", "layer_norm=1"])
def test_expectations_unmet(expected: str, source: Path, tmp_path: Path) -> None:
    (tmp_path / "o.onnx").write_bytes(b"old")
    result = fuse(source, "-o", tmp_path / "o.onnx", "--report", tmp_path / "r.json", "--expect", expected, "-q")
    name, count = expected.split("=")
    found = {"skip_rms_norm": 4}.get(name, 0)
    assert result.exit_code == 5
    assert result.stderr == f"fuse: expected {count} {name}, fused {found}; nothing was written\n"
    assert (tmp_path / "o.onnx").read_bytes() == b"old"
    assert json.loads((tmp_path / "r.json").read_text())["fusions"]["skip_rms_norm"]["fused"] == 4


def test_strict(source: Path, missing: Path, tmp_path: Path) -> None:
    out = tmp_path / "o.onnx"
    assert fuse(source, "-o", out, "--strict", "-q").exit_code == 0
    out.write_bytes(b"old")
    result = fuse(missing, "-o", out, "--strict", "-q")
    assert result.exit_code == 5 and "near miss" in result.stderr and "rms_norm" in result.stderr
    result = fuse(source, "-o", out, "--strict", "--no-verify", "-q")
    assert result.exit_code == 5 and "not compared end to end: --no-verify" in result.stderr
    assert out.read_bytes() == b"old"


# What is wrong with the call


@pytest.mark.parametrize(
    "arguments",
    [
        ["--target", "tpu"],
        ["--dim", "batch"],
        ["--dim", "batch=x"],
        ["--dim", "=3"],
        ["--dim", "batch=-1"],
        ["--dim", "batch=1", "--dim", "batch=2"],
        ["--dim", "batch=99999999999999999999"],
        ["--dim", "nobody=1"],
        ["--expect", "rms_norm"],
        ["--expect", "rms_norm=many"],
    ],
)
def test_usage(arguments: list[str], source: Path, tmp_path: Path) -> None:
    refused(2, source, "-o", tmp_path / "o.onnx", *arguments)
    assert not list(tmp_path.iterdir())


def test_usage_that_typer_sees(source: Path) -> None:
    for arguments in ([], [source, "--no-such-option"], [source, source], [source, "-o"]):
        result = fuse(*arguments)
        assert result.exit_code == 2 and result.stdout == "" and "Error: " in result.stderr


def test_output_is_the_input(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    data = models.save_external(models.norms(), path)
    (tmp_path / "soft.onnx").symlink_to("m.onnx")
    os.link(path, tmp_path / "hard.onnx")
    os.link(data, tmp_path / "hard.data")
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    for output in (path, tmp_path / "soft.onnx", tmp_path / "hard.onnx", data, tmp_path / "hard.data"):
        assert "is the input; write to another file" in refused(2, path, "-o", output)
        assert "is the input; write to another file" in refused(2, path, "--report", output)
    assert "is the input" in refused(2, tmp_path / "soft.onnx", "-o", path)
    assert "same file" in refused(2, path, "-o", tmp_path / "new", "--report", tmp_path / "." / "new")
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_outputs_that_are_no_files(source: Path, tmp_path: Path) -> None:
    for option in ("-o", "--report"):
        assert "is a directory" in refused(2, source, option, tmp_path)
        assert "is not a folder" in refused(2, source, option, tmp_path / "missing" / "o.onnx")
        assert "is not a folder" in refused(2, source, option, source / "o.onnx")
        assert "File name too long" in refused(2, source, option, tmp_path / ("n" * 300))
    assert not list(tmp_path.iterdir())


# What is wrong with the file


def test_files_that_are_no_models(tmp_path: Path) -> None:
    path = tmp_path / "x.onnx"
    assert "does not exist" in refused(3, path)
    assert "is a directory" in refused(3, tmp_path)
    for content in (b"", b"text", bytes(range(256)), models.norms().SerializeToString()[:-100]):
        path.write_bytes(content)
        refused(3, path, "-o", tmp_path / "o.onnx")
    path.chmod(0)
    if not os.access(path, os.R_OK):
        assert "cannot be read: Permission denied" in refused(3, path)
    os.mkfifo(tmp_path / "pipe")
    assert "is not a regular file" in refused(3, tmp_path / "pipe")
    assert not (tmp_path / "o.onnx").exists()


def test_truncated_files(source: Path, tmp_path: Path) -> None:
    data = source.read_bytes()
    path = tmp_path / "cut.onnx"
    for length in [*range(1, 40), *range(40, len(data), len(data) // 80)]:
        path.write_bytes(data[:length])
        line = refused(3, path, "-o", tmp_path / "o.onnx")
        assert len(line) < 400
    assert not (tmp_path / "o.onnx").exists()


def test_external_data_that_is_wrong(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    data = models.save_external(models.norms(), path)
    proto = onnx.load(path, load_external_data=False)
    out = tmp_path / "o.onnx"
    changes = {
        "offset": ["-1", "9" * 30, "x"],
        "length": ["1", "-1", "9" * 30],
        "location": ["../x", "/etc/hosts", "gone"],
    }
    for key, values in changes.items():
        for value in values:
            copy = onnx.ModelProto()
            copy.CopyFrom(proto)
            models.entry(copy.graph.initializer[1], key).value = value
            path.write_bytes(copy.SerializeToString())
            assert copy.graph.initializer[1].name in refused(3, path, "-o", out)
    path.write_bytes(proto.SerializeToString())
    os.truncate(data, 10)
    assert "has only 10 bytes" in refused(3, path, "-o", out)
    data.unlink()
    assert "'weights.bin' is missing" in refused(3, path, "-o", out)
    assert not out.exists()


def test_not_supported(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    onnx.save(one("(float[N] x) => (float[N] y) { y = Relu(x) }", opset=9), path)
    assert "opset 9; fuser reads 13 to" in refused(3, path)


def test_names_cannot_write_to_the_terminal(tmp_path: Path) -> None:
    """Names come from the file: no line breaks, no escape sequences, no markup."""
    name = "x\n\x1b[31mred\x07[bold]\r"
    model = one("(float[N] x) => (float[N] y) { y = Relu(x) }")
    model.graph.node[0].input[0] = name
    onnx.save(model, tmp_path / "m.onnx")
    line = refused(3, tmp_path / "m.onnx")
    assert r"x\n\x1b[31mred\x07[bold]\r" in line
    assert all(c.isprintable() for c in line[:-1])


# What goes wrong on the way


def test_verification_failure_writes_nothing(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "o.onnx").write_bytes(b"old")
    real = exporter.export

    def wrong(*arguments: Any) -> Any:
        """Exports a model one weight of which is off by a little."""
        artifact = real(*arguments)
        weight = next(w for w in artifact.model.graph.initializer if w.name == "head")
        changed = numpy_helper.to_array(weight) * np.float32(1.001)
        weight.CopyFrom(numpy_helper.from_array(changed, "head"))
        return artifact

    monkeypatch.setattr(api, "export", wrong)
    line = refused(4, source, "-o", tmp_path / "o.onnx", "--report", tmp_path / "r.json")
    assert re.search(
        r"differs from the original by more than 2\.0e-05 \(short \d\.\de-0\d, full .*; nothing was written", line
    )
    assert (tmp_path / "o.onnx").read_bytes() == b"old"
    assert [f.name for f in tmp_path.iterdir()] == ["o.onnx"]


def test_model_that_does_not_load_writes_nothing(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = exporter.export

    def broken(*arguments: Any) -> Any:
        artifact = real(*arguments)
        artifact.model.graph.node[3].op_type = "NoSuchOperator"
        return artifact

    monkeypatch.setattr(api, "export", broken)
    assert "does not load the fused model" in refused(4, source, "-o", tmp_path / "o.onnx")
    assert not list(tmp_path.iterdir())


def test_disk_full(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    (tmp_path / "o.onnx").write_bytes(b"old")
    (tmp_path / "r.json").write_bytes(b"old")
    monkeypatch.setattr(os, "fsync", full)
    assert "the disk is full; nothing was changed" in refused(1, source, "-o", tmp_path / "o.onnx")
    assert "the disk is full; nothing was changed" in refused(1, source, "--report", tmp_path / "r.json")
    assert {f.name: f.read_bytes() for f in tmp_path.iterdir()} == {"o.onnx": b"old", "r.json": b"old"}


def test_bugs_of_our_own(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One line and exit 1; the traceback only with -v."""

    def bug(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError("by\nzero")

    monkeypatch.setattr(pipeline, "canonicalize", bug)
    result = fuse(source, "-o", tmp_path / "o.onnx")
    assert result.exit_code == 1 and result.stdout == ""
    assert result.stderr == "fuse: internal error, ZeroDivisionError: by (-v shows where; please report it)\n"
    result = fuse(source, "-v")
    assert result.exit_code == 1 and "Traceback" in result.stderr
    assert not list(tmp_path.iterdir())


def test_interrupted(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "canonicalize", interrupt)
    result = fuse(source, "-o", tmp_path / "o.onnx")
    assert result.exit_code == 130
    assert result.stderr == "fuse: interrupted; nothing was written\n"


def test_model_that_the_check_cannot_run(tmp_path: Path) -> None:
    """A custom operator: rewrites are proven one by one, and the report says what was not done."""
    model = one(
        "(float[N, 8] x) => (float[N, 8] y) { g = Sigmoid(x) s = Mul(x, g) y = other.Thing(s) }", more=', "other": 1'
    )
    onnx.save(model, tmp_path / "m.onnx")
    result = fuse(tmp_path / "m.onnx", "-o", tmp_path / "o.onnx", "--expect", "silu=1")
    assert result.exit_code == 0
    assert "not compared end to end: ONNX Runtime does not run the original" in result.stderr
    assert fuse(tmp_path / "m.onnx", "--strict", "-q").exit_code == 5


def test_progress_names_slow_stages(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console, "QUIET_SECONDS", 0.05)
    real = verification.compare

    def slow(*arguments: Any) -> Any:
        time.sleep(0.2)
        return real(*arguments)

    monkeypatch.setattr(api, "compare", slow)
    assert "verify ...\n" in fuse(source).stderr
    assert fuse(source, "-q").stderr == ""


# In a process of its own


def command(*arguments: Any, **options: Any) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-m", "fuser.cli", *map(str, arguments)],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "2", **options},
    )


def test_as_a_process(source: Path, tmp_path: Path) -> None:
    folder = tmp_path / "ein Ordner mit Ümläuten [1] *"
    folder.mkdir()
    path = folder / "mödel.onnx"
    path.write_bytes(source.read_bytes())
    process = command(path, "-o", folder / "öut.onnx", "--json", LC_ALL="C", PYTHONUTF8="0", PYTHONIOENCODING="")
    stdout, stderr = process.communicate(timeout=120)
    assert process.returncode == 0, stderr
    assert json.loads(stdout)["version"] == 1
    assert "wrote" in stderr and "Warning" not in stderr
    assert sorted(f.name for f in folder.iterdir()) == ["mödel.onnx", "öut.onnx"]


def test_reader_of_stdout_has_gone(source: Path) -> None:
    read, write = os.pipe()
    os.close(read)
    process = subprocess.run(
        [sys.executable, "-m", "fuser.cli", str(source), "--json", "-q", "--no-verify"],
        cwd=REPOSITORY,
        stdout=write,
        stderr=subprocess.PIPE,
        text=True,
        timeout=120,
    )
    os.close(write)
    assert process.returncode != 0
    assert "Traceback" not in process.stderr and "internal error" not in process.stderr


def test_killed_in_the_middle(source: Path, tmp_path: Path) -> None:
    """Whenever SIGKILL or SIGINT comes, the old file stands or the new one does."""
    old = models.norms().SerializeToString()
    assert fuse(source, "-o", tmp_path / "whole.onnx", "-q").exit_code == 0
    whole = (tmp_path / "whole.onnx").read_bytes()
    for number, with_signal in enumerate((signal.SIGKILL, signal.SIGINT)):
        out = tmp_path / f"{number}.onnx"
        out.write_bytes(old)
        process = command(source, "-o", out)
        time.sleep(1.5)
        while process.poll() is None:  # as soon as it has begun to write, or has done so
            time.sleep(0.0005)
            if any(f.name.startswith(f".{out.name}.") for f in tmp_path.iterdir()) or out.read_bytes() != old:
                process.send_signal(with_signal)
                break
        process.communicate(timeout=60)
        assert out.read_bytes() in (old, whole)
