"""`fuse explain`: what it says of whole models, and whether it puts its finger on what is broken."""

import json
import re
from pathlib import Path

import onnx
import pytest
from typer.testing import CliRunner

import fuser
from fuser import api
from fuser.cli import app
from fuser.explanation import Reason
from fuser.layers import Layer, Layers, Step
from fuser.report import explanation_text
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


def _first(model: onnx.ModelProto) -> Reason:
    return api.explain(model, verify=False).reasons[0]


def _names(reason: Reason, broken: set[str]) -> bool:
    return bool({*reason.at, *reason.found.replace(",", " ").split()} & broken)


@pytest.mark.parametrize("name", breaks.BREAKS)
def test_a_break_loads_and_is_named_without_metadata(name: str) -> None:
    """Where no module is known, layers are told apart by what repeats."""
    model, broken = breaks.planted(name)
    models.session(model)
    for node in model.graph.node:
        del node.metadata_props[:]
    assert _names(_first(model), broken)


# Named though every layer is broken alike, so that only patterns can tell.
BY_PATTERNS = 22


def test_breaks_of_every_layer() -> None:
    named = []
    for name in breaks.BREAKS:
        model, broken = breaks.planted(name, range(breaks.LAYERS))
        reasons = api.explain(model, verify=False).reasons
        if reasons and _names(reasons[0], broken):
            named.append(name)
    assert len(named) >= BY_PATTERNS, named


def test_what_one_layer_misses_comes_before_what_all_do() -> None:
    model, everywhere = breaks.planted("softmax over the queries", range(breaks.LAYERS))
    layer = breaks.Layer(model, 2)
    breaks.BREAKS["gate and up added"](layer)
    first, second, *_ = api.explain(model, verify=False).reasons
    assert first.odd and _names(first, layer.broken)
    assert not second.odd and _names(second, everywhere) and len(second.spots) == breaks.LAYERS


@pytest.mark.parametrize(("architecture", "layers"), [("llama", 6), ("gemma2", 6), ("bert", 6)])
def test_nothing_is_said_of_a_whole_model(architecture: str, layers: int) -> None:
    """Every other layer of gemma2 is of another kind, and the first and the last of any read and give other things."""
    assert api.explain(zoo.exported(architecture, "torchscript", layers=layers), verify=False).reasons == []


@pytest.mark.parametrize(
    ("module", "stack", "index", "rest"),
    [
        ("model.layers.3.self_attn", "model.layers", 3, "self_attn"),
        ("transformer.h.3", "transformer.h", 3, ""),
        ("model.layers.3.mlp.experts.5.up", "model.layers", 3, "mlp.experts.5.up"),
        ("encoder.layer_3.attention", "encoder.layer", 3, "attention"),
        ("encoder.block[3].attention", "encoder.block", 3, "attention"),
    ],
)
def test_layers_in_paths(module: str, stack: str, index: int, rest: str) -> None:
    paths = {module.replace("3", str(i), 1) for i in range(4)}
    layers = Layers([Step("Add", (), (), False, (path,), path, 1) for path in sorted(paths)], [])
    assert layers.of([module]) == Layer(stack, index)
    assert layers.within(module) == rest


def test_a_number_at_the_end_of_a_name_is_no_layer_by_itself() -> None:
    layers = Layers([Step("Add", (), (), False, (path,), path, 1) for path in ("mlp.fc1", "mlp.fc2")], [])
    assert layers.all == []


def test_help_lists_the_commands() -> None:
    stdout = CliRunner().invoke(app, ["--help"]).stdout
    assert "Usage: fuse [OPTIONS]" in stdout.replace("root", "fuse") and "--strict" in stdout
    assert stdout.partition("Commands:")[2].split()[0] == "explain"
    stdout = CliRunner().invoke(app, ["explain", "--help"]).stdout
    assert all(option in stdout for option in ("--target", "--dim", "--json", "--all"))


def test_what_is_wrong_with_the_call(tmp_path: Path) -> None:
    onnx.save(models.decoder(1), tmp_path / "m.onnx")
    for arguments in ([], ["m.onnx", "-o", "x"], ["m.onnx", "m.onnx"]):
        assert CliRunner().invoke(app, ["explain", *arguments]).exit_code == 2
    for arguments in (["--target", "tpu"], ["--dim", "nobody=1"], ["--dim", "batch"]):
        result = CliRunner().invoke(app, ["explain", str(tmp_path / "m.onnx"), *arguments])
        assert result.exit_code == 2 and result.stdout == "" and result.stderr.startswith("fuse: ")
    assert [file.name for file in tmp_path.iterdir()] == ["m.onnx"]


def test_the_same_text_in_python(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    onnx.save(models.decoder(3), path)
    assert fuser.fuse(path).explain() + "\n" == _explained(str(path))


def test_the_json_is_what_its_page_says(tmp_path: Path) -> None:
    model, _ = breaks.planted("softmax over the queries")
    found = api.explain(model, verify=False).to_json()
    page = (Path(__file__).parent.parent / "docs" / "explain.md").read_text()
    entries = [found, *found["layers"], *found["constructs"], *found["reasons"], *found["reasons"][0]["places"]]
    assert {key for entry in entries for key in entry} <= set(re.findall(r"`(\w+)`", page))
    assert found == api.explain(model, verify=False).to_json()


GOLDEN = Path(__file__).parent / "explained"
EXPLAINED = {
    "decoder": lambda: models.decoder(3),
    "folded": lambda: models.decoder(32),
    "broken": lambda: breaks.planted("softmax over the queries")[0],
    "broken_everywhere": lambda: breaks.planted("halves swapped", range(breaks.LAYERS))[0],
    "different": lambda: breaks.planted("relu after the gate")[0],
}


@pytest.mark.parametrize("name", EXPLAINED)
def test_text(name: str, update_golden: bool) -> None:
    """What is told, whole; `--update-golden` writes it."""
    text = explanation_text(api.explain(EXPLAINED[name](), verify=False))
    text = re.sub(r"\.py:\d+", ".py", text) + "\n"  # a pattern may move within its file
    assert max(map(len, text.splitlines())) <= 100
    if update_golden:
        (GOLDEN / f"{name}.txt").write_text(text)
    assert text == (GOLDEN / f"{name}.txt").read_text()
