"""`fuse explain`: what it says of whole models, and whether it puts its finger on what is broken."""

import json
from pathlib import Path

import onnx
import pytest
from typer.testing import CliRunner

from fuser import api
from fuser.cli import app
from tests import breaks, models, zoo

NAMED = 0.9  # of the planted breaks, by the first reason given


def test_planted_breaks_are_named() -> None:
    missed = []
    for name in breaks.BREAKS:
        model, broken = breaks.planted(name)
        reasons = api.explain(model).to_json()["reasons"]
        if not reasons or not set(reasons[0]["nodes"]) & broken:
            missed.append(name)
    print(f"\n{len(breaks.BREAKS) - len(missed)} of {len(breaks.BREAKS)} named; not: {', '.join(missed) or 'none'}")
    assert len(breaks.BREAKS) >= 20
    assert len(missed) <= (1 - NAMED) * len(breaks.BREAKS), missed


def _explained(*arguments: str) -> str:
    result = CliRunner().invoke(app, ["explain", *arguments])
    assert result.exit_code == 0, result.output
    return result.stdout + (result.stderr or "")


def test_layers_alike_are_folded() -> None:
    text = _explained(str(zoo.exported("llama", "torchscript", layers=32)))
    assert "32 layers" in text
    assert "layers 1-31" in text
    assert "rotary_cache_write   1" in text
    assert "no near misses" in text
    assert max(map(len, text.splitlines()[1:])) <= 100


def test_without_metadata(tmp_path: Path) -> None:
    path = tmp_path / "plain.onnx"
    onnx.save(models.decoder(3), path)
    text = _explained(str(path))
    assert "3 layers" in text and "attention" in text


def test_json(tmp_path: Path) -> None:
    model, broken = breaks.planted("softmax over the queries")
    path = tmp_path / "broken.onnx"
    onnx.save(model, path)
    found = json.loads(CliRunner().invoke(app, ["explain", str(path), "--json"]).stdout)
    assert found["version"] == 1
    reason = found["reasons"][0]
    assert set(reason["nodes"]) & broken
    assert "attention" in reason["missed"]
    assert reason["expected"] and reason["found"]


@pytest.mark.parametrize("name", ["missing.onnx", "text.onnx"])
def test_errors_are_typed(name: str, tmp_path: Path) -> None:
    (tmp_path / "text.onnx").write_text("no model")
    result = CliRunner().invoke(app, ["explain", str(tmp_path / name)])
    assert result.exit_code == 3
    assert "Traceback" not in result.output


def test_a_model_called_explain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    onnx.save(models.decoder(1), "explain")
    result = CliRunner().invoke(app, ["./explain", "-o", "fused.onnx"])
    assert result.exit_code == 0, result.output
    assert (tmp_path / "fused.onnx").exists()
