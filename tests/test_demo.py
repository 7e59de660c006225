"""The demo model: what is stored fits the limit, agrees with itself, and completes Python as well as its card says."""

import argparse
import ast
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from fuser.models import export_demo, train_demo

DEMO = Path(__file__).resolve().parent.parent / "models" / "demo"


@pytest.fixture(scope="module")
def lm() -> Any:
    return export_demo.load(DEMO)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(DEMO)


@pytest.fixture(scope="module")
def record() -> dict[str, Any]:
    stored: dict[str, Any] = json.loads((DEMO / "training.json").read_text(encoding="utf-8"))
    return stored


@pytest.fixture(scope="module")
def proto() -> onnx.ModelProto:
    return onnx.load(DEMO / "model.onnx")


def test_the_folder_fits_in_12_mb() -> None:
    sizes = {path.name: path.stat().st_size for path in DEMO.iterdir()}
    assert {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "model.onnx",
        "tokenizer.json",
        "tokenizer_config.json",
        "training.json",
        "README.md",
    } == set(sizes)
    assert sum(sizes.values()) <= 12_000_000, sizes


def test_the_onnx_file_equals_transformers(lm: Any) -> None:
    errors = export_demo.check(DEMO / "model.onnx", lm)
    assert set(errors) == {"decode", "prefill", "chunk", "left-padded batch", "left-padded decode"}
    assert max(errors.values()) <= 2e-5, errors


def test_the_check_notices_one_changed_weight(lm: Any, proto: onnx.ModelProto, tmp_path: Path) -> None:
    changed = onnx.ModelProto()
    changed.CopyFrom(proto)
    tensor = next(t for t in changed.graph.initializer if t.name.endswith("norm.weight"))
    values = onnx.numpy_helper.to_array(tensor).copy()
    values[0] *= 1.1
    tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))
    onnx.save(changed, tmp_path / "changed.onnx")
    assert max(export_demo.check(tmp_path / "changed.onnx", lm).values()) > 2e-5


def test_the_onnx_file_generates_what_transformers_generates(lm: Any, tokenizer: Any) -> None:
    """Token by token through the file's own cache, which shares no code with the exporter's wrapper."""
    prompt = tokenizer.encode("import os\nimport sys\n\ndef main(")
    start = torch.tensor([prompt])
    expected = lm.generate(input_ids=start, attention_mask=torch.ones_like(start), max_new_tokens=24)[0].tolist()
    session = ort.InferenceSession(DEMO / "model.onnx", providers=["CPUExecutionProvider"])
    past = {
        i.name: np.zeros((1, i.shape[1], 0, i.shape[3]), np.float32)
        for i in session.get_inputs()
        if i.name.startswith("past_key_values.")
    }
    ids, new = list(prompt), prompt
    while len(ids) < len(expected):
        positions = np.arange(len(ids) - len(new), len(ids))[None]
        feeds = {
            "input_ids": np.array([new]),
            "attention_mask": np.ones((1, len(ids)), np.int64),
            "position_ids": positions,
            **past,
        }
        outputs = dict(zip((o.name for o in session.get_outputs()), session.run(None, feeds), strict=True))
        past = {name: outputs[name.replace("past_key_values", "present")] for name in past}
        new = [int(outputs["logits"][0, -1].argmax())]
        ids += new
    assert ids == expected


def test_the_onnx_file_keeps_its_modules_and_dimensions_and_names_no_machine(proto: onnx.ModelProto) -> None:
    onnx.checker.check_model(proto, full_check=True)
    inputs = {i.name: [d.dim_param or d.dim_value for d in i.type.tensor_type.shape.dim] for i in proto.graph.input}
    assert inputs["input_ids"] == inputs["position_ids"] == ["batch", "sequence"]
    assert inputs["attention_mask"] == ["batch", "total"]
    assert inputs["past_key_values.0.key"][::2] == ["batch", "past"]
    scopes = " ".join(entry.value for node in proto.graph.node for entry in node.metadata_props)
    assert "model.layers.4.self_attn" in scopes
    assert "modeling_llama.LlamaRMSNorm" in scopes
    assert "site-packages" not in scopes
    assert 'File "' not in scopes


def test_the_tied_embedding_is_stored_once(proto: onnx.ModelProto, lm: Any) -> None:
    shape = tuple(lm.get_input_embeddings().weight.shape)
    tables = [tensor for tensor in proto.graph.initializer if tuple(tensor.dims) in (shape, shape[::-1])]
    assert len(tables) == 1
    users = [node.op_type for node in proto.graph.node if tables[0].name in node.input]
    assert sorted(users) == ["Gather", "Transpose"]


def test_the_held_out_loss_is_the_recorded_one(lm: Any, tokenizer: Any, record: dict[str, Any]) -> None:
    """Measured again on the held-out files that this Python has letter for letter, the smallest first."""
    held_out = record["held_out"]
    assert held_out["nats_per_token"] == pytest.approx(
        sum(file["nats"] for file in held_out["files"].values()) / held_out["tokens"], rel=1e-5
    )
    sources = [s for s in train_demo.standard_library()[0] if s.held_out]
    same = [s for s in sources if held_out["files"].get(s.path, {}).get("sha256") == s.digest]
    same = sorted(same, key=lambda source: len(source.text))[:12]
    assert same, "no held-out file of this Python is one of those that training.json records"
    nats = train_demo.file_nats(lm, [[0, *tokenizer.encode(source.text), 0] for source in same])
    for source, measured in zip(same, nats, strict=True):
        assert measured == pytest.approx(held_out["files"][source.path]["nats"], rel=0.02), source.path
    assert 0 < held_out["bits_per_byte"] < 2  # an untrained model: 3.6


def test_the_card_is_the_records_and_the_defaults_are_the_stored_models(record: dict[str, Any]) -> None:
    assert (DEMO / "README.md").read_text(encoding="utf-8") == train_demo.card(record)
    assert record["tried"] == train_demo.TRIED
    assert record["second_run_nats_per_token"] == train_demo.SECOND_RUN
    best = dict(train_demo.BEST)
    assert record["held_out"]["nats_per_token"] == pytest.approx(best.pop("nats_per_token"), abs=1e-4)
    assert best == {name: record["settings"][name] for name in best}
    assert record["training"]["steps"] == record["settings"]["steps"]


def test_a_completed_argument_list_closes_and_is_python(lm: Any, tokenizer: Any) -> None:
    prompt = "def __init__(self, "
    text = prompt + train_demo.complete(lm, tokenizer, prompt, train_demo.NEW_TOKENS)
    depth, end = 0, 0
    for end, character in enumerate(text):  # noqa: B007  (the place where the list closes)
        depth += (character == "(") - (character == ")")
        if character == ")" and depth == 0:
            break
    assert depth == 0, text
    function = ast.parse(text[: end + 1] + ": pass").body[0]
    assert isinstance(function, ast.FunctionDef)
    a = function.args
    names = [p.arg for p in (*a.posonlyargs, *a.args, a.vararg, *a.kwonlyargs, a.kwarg) if p]
    assert names[0] == "self", text
    assert len(names) > 1, text


def test_a_table_is_told_from_code() -> None:
    assert train_demo.is_table("table = {\n" + "    1: 2,\n" * 50 + "}\n\ndef f():\n    return table\n")
    assert not train_demo.is_table("x = 1\n\n" + "def f():\n    return [\n        x,\n    ]\n" * 5)
    with pytest.raises(SyntaxError):
        train_demo.is_table("print 'python 2'")


def test_the_training_stream_holds_the_text_whole(tokenizer: Any) -> None:
    text = "def f(x):\n    return x + 1  # né\n\n" * 40
    stream = train_demo.token_stream(tokenizer.backend_tokenizer, [text], seed=1)
    passes = " ".join(map(str, stream)).split(" 0 ")
    assert len(passes) == train_demo.PIECE_PASSES
    for ids in passes:
        assert tokenizer.decode([int(i) for i in ids.split()], skip_special_tokens=True) == text
    assert len(set(passes)) > 1


def tiny() -> Any:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=32,
            hidden_size=16,
            num_hidden_layers=1,
            intermediate_size=16,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=8,
            bos_token_id=0,
            eos_token_id=0,
        )
    ).eval()


def test_file_nats_is_the_cross_entropy_of_each_file() -> None:
    model = tiny()
    lengths = (3, train_demo.CONTEXT + 1, train_demo.CONTEXT + 2, 40)
    files = [torch.randint(32, (n,)).tolist() for n in lengths]
    expected = []
    for ids in files:
        total = 0.0
        for at in range(0, len(ids) - 1, train_demo.CONTEXT):
            window = torch.tensor(ids[at : at + train_demo.CONTEXT + 1])
            with torch.no_grad():
                total += float(cross_entropy(model(window[None, :-1]).logits[0], window[1:], reduction="sum"))
        expected.append(total)
    assert train_demo.file_nats(model, files, batch=3) == pytest.approx(expected, rel=1e-5)


COUNTING = torch.arange(4 * train_demo.CONTEXT) % 32  # each token foretells the next


def trained(**settings: Any) -> tuple[Any, dict[str, Any]]:
    """`tiny` after a short run on `COUNTING`, and what the run recorded."""
    args = {"steps": 20, "minutes": None, "batch": 2, "lr": 1e-2, "weight_decay": 0.1, "noise": 0.1}
    args |= {"warmup": 2, "evals": 4, "seed": 0}
    model = tiny()
    return model, train_demo.train(model, COUNTING, [COUNTING[:100].tolist()], argparse.Namespace(**(args | settings)))


def loss_on_counting(model: Any) -> float:
    return train_demo.file_nats(model, [COUNTING[:100].tolist()])[0] / 99


def test_training_learns_from_inputs_and_only_noise_replaces_them() -> None:
    model, run = trained()
    assert run["steps"] == 20
    assert loss_on_counting(model) < 0.7 * math.log(32)
    noisy, _ = trained(noise=1.0)
    assert loss_on_counting(noisy) > 0.9 * math.log(32)


def test_training_again_gives_the_same_weights_and_another_seed_others() -> None:
    weights = [model.state_dict() for model in (trained()[0], trained()[0], trained(seed=1)[0])]
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())
    assert not all(torch.equal(value, weights[2][name]) for name, value in weights[0].items())


def test_the_cap_on_minutes_cuts_and_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    _, run = trained(steps=10**6, minutes=0.02)
    assert run["seconds"] < 10
    assert 1 < run["steps"] < 10**6
    assert f"--minutes 0.02 cut the run at step {run['steps']} of 1000000" in capsys.readouterr().out
