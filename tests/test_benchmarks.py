"""Do the benchmarks run, and is what they measure the model it was? Nothing is said of speed."""

import dataclasses
import json
import re
from pathlib import Path

import pytest

from tests import zoo
from tests.benchmarks import decode, front_door, generate
from tests.test_coverage import LLAMA


@pytest.mark.slow
def test_decode(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "SOURCES", decode.SOURCES[-2:])
    file = tmp_path / "decode.json"
    decode.main(["--quick", "--rounds", "2", "--json", str(file)])
    printed = capsys.readouterr().out
    rows = json.loads(file.read_text(encoding="utf-8"))["rows"]
    engines = [decode.BASELINE, "fuser", "transformers", "onnxscript", "onnxruntime"]
    assert [(row["source"], row["engine"]) for row in rows] == [
        (source.name, engine) for source in decode.SOURCES for engine in engines
    ]
    for row in rows:
        name = f"{row['engine']} ({row['variant']})" if row["variant"] else row["engine"]
        assert f"\n  {name} " in printed
        assert (row["ratio"] is None) == bool(row["reason"])
        if row["engine"] == "fuser":
            assert row["error"] is not None and row["error"] <= decode.TOLERANCE and not row["reason"]


def test_failures_are_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine that raises, and one whose result is not the model, are reported and not timed."""

    def raises(*_: object) -> None:
        raise RuntimeError("no such thing\nand more")

    def other_model(original: Path, fused: Path, source: decode.Source, setup: decode.Setup) -> None:
        source.write(zoo.model("qwen2"), dataclasses.replace(setup, quick=False), fused)

    (torchscript,) = (source for source in decode.SOURCES if source.name == "torchscript")
    engines = (decode.Engine("first", raises), decode.Engine("second", other_model))
    monkeypatch.setattr(decode, "ENGINES", engines)
    rows = decode.measure(torchscript, decode.QUICK.model(), decode.QUICK, tmp_path)
    assert [row.engine for row in rows] == [decode.BASELINE, "first", "second"]
    assert rows[0].ratio == 1 and rows[1].ratio is None and rows[2].ratio is None
    assert rows[1].reason == "no such thing"
    assert rows[2].reason.startswith("decode: differs by ")
    text = decode.section(torchscript, rows)
    assert "no such thing" in text and "differs by" in text


@pytest.mark.parametrize("buffers", ["cpu", "meta"])
def test_front_door(buffers: str, capsys: pytest.CaptureFixture[str]) -> None:
    """All is fused without a single weight; a table of cosines is recognised by its frequencies, where they are known."""
    report = front_door.measured(front_door.model(2, buffers=buffers))
    assert report.fused == {kind: n for kind, n in LLAMA.items() if buffers == "cpu" or kind != "rotary_table"}
    assert report.misses == [] and report.checked
    front_door.main(["--layers", "1", "--buffers", buffers, "--profile", "5"])
    printed = capsys.readouterr().out
    assert all(f"\n  {name} " in printed for name in (*report.stages_s, "all but export")) and "cumtime" in printed


@pytest.mark.gpu
@pytest.mark.slow
def test_kernels(capsys: pytest.CaptureFixture[str]) -> None:
    """Every line of `fuse bench` is right, and measured."""
    from fuser import bench

    bench.main(compiled=False)
    printed = capsys.readouterr().out
    assert " failed" not in printed and " wrong" not in printed
    assert len(re.findall(r"\dx +\d\.\de-\d\d ", printed)) == 34 and printed.count("chain M") == 3


def test_generate(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """64 greedy tokens of the demo model are transformers' own; the ratio is printed."""
    monkeypatch.setattr("sys.argv", ["generate", "--rounds", "1"])
    generate.main()
    printed = capsys.readouterr().out
    assert "demo: 64 tokens" in printed and "tokens    equal" in printed and "ratio" in printed
