"""`fuser.evaluate` and `fuse eval`: numbers against a plain computation on the logits that transformers gives."""

import json
import math
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

import fuser
from fuser import quality
from fuser.cli import app
from fuser.errors import UsageError
from fuser.evaluating import Trial, line
from fuser.quality import Measurement, Quality, percentile
from fuser.quantizing import QuantizedLinear, choices
from fuser.sources import source_of

DEMO = Path(__file__).parents[1] / "models/demo"
TEXT = "import os\n\n\ndef read(path):\n    with open(path) as file:\n        return file.read()\n" * 4
CONTEXT = 40


@cache
def plain() -> Any:
    return AutoModelForCausalLM.from_pretrained(DEMO, dtype=torch.float32).eval()


@cache
def noisy() -> Any:
    """The same with other weights."""
    torch.manual_seed(0)
    module = AutoModelForCausalLM.from_pretrained(DEMO, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(1 + 0.05 * torch.randn_like(parameter))
    return module


@cache
def source() -> Any:
    return source_of(DEMO / "model.onnx", verify=False, note=lambda stage: None)


@cache
def ids() -> list[int]:
    return list(AutoTokenizer.from_pretrained(DEMO).encode(TEXT))


@torch.no_grad()
def rows(module: Any, tokens: list[int], context: int) -> Tensor:
    """Logits [n - 1, V] in windows."""
    starts = range(0, len(tokens) - 1, context)
    windows = [torch.tensor([tokens[start : min(start + context, len(tokens) - 1)]]) for start in starts]
    return torch.cat([module(input_ids=window, use_cache=False).logits[0] for window in windows])


def expected(logits: Tensor, original: Tensor, targets: list[int]) -> tuple[float, float, float, float]:
    """Perplexity, mean KL, its 99.9th percentile and top-1 agreement, token by token in numpy."""
    nats, kl, agreed = [], [], 0
    for given, wanted, target in zip(logits.numpy(), original.numpy(), targets, strict=True):
        q, p = (np.exp(x.astype(np.longdouble) - x.max()) for x in (given, wanted))
        q, p = q / q.sum(), p / p.sum()
        nats.append(-np.log(q[target]))
        kl.append((p * np.log(p / q)).sum())
        agreed += int(given.argmax() == wanted.argmax())
    least = next(value for value in sorted(kl) if sum(one <= value for one in kl) * 1000 >= 999 * len(kl))
    return float(np.exp(np.mean(nats))), float(np.mean(kl)), float(least), agreed / len(kl)


@pytest.mark.parametrize("context", [CONTEXT, 7, 500])
def test_numbers_are_those_of_plain_logits(context: int) -> None:
    tokens = ids()
    found = fuser.evaluate(noisy(), tokens, against=source(), context=context, device="cpu", verify=False)
    wanted = expected(rows(noisy(), tokens, context), rows(plain(), tokens, context), tokens[1:])
    assert found.tokens == len(tokens) - 1
    assert found.kl_mean is not None and found.kl_mean > 1e-3
    measured = found.perplexity, found.kl_mean, found.kl_p999, found.top1
    assert measured == pytest.approx(wanted, rel=1e-4)
    assert 0.5 < wanted[3] < 1


def test_a_model_beside_itself() -> None:
    alone = fuser.evaluate(source(), ids(), context=CONTEXT, device="cpu")
    assert alone.kl_mean is alone.kl_p999 is alone.top1 is None
    found = fuser.evaluate(source(), ids(), against=source(), context=CONTEXT, device="cpu")
    assert (found.kl_mean, found.kl_p999, found.top1) == (0, 0, 1)
    assert found.perplexity == alone.perplexity
    assert alone.weights_bytes == found.weights_bytes > 0


def test_a_text_shorter_than_a_window_and_of_two_tokens() -> None:
    tokens = ids()
    short = fuser.evaluate(source(), tokens[:9], device="cpu")
    assert short == fuser.evaluate(source(), tokens, tokens=9, context=8, device="cpu")
    two = fuser.evaluate(source(), tokens[:2], against=source(), device="cpu")
    assert (two.tokens, two.kl_mean) == (1, 0)
    logits = rows(plain(), tokens[:2], 8)[0].double().log_softmax(-1)
    assert two.perplexity == pytest.approx(float(torch.exp(-logits[tokens[1]])), rel=1e-5)


@pytest.mark.parametrize("V", [1, 2, 5])
def test_a_tiny_vocabulary_by_parts(V: int, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    logits, original = torch.randn(2, 11, V) * 3
    targets = torch.randint(V, (11,))
    whole = Measurement()
    whole.add(targets, logits, original)
    monkeypatch.setattr(quality, "CHUNK", 2 * V)
    parts = Measurement()
    for start in (0, 3, 4):
        stop = {0: 3, 3: 4, 4: 11}[start]
        parts.add(targets[start:stop], logits[start:stop], original[start:stop])
    assert parts.quality(7) == whole.quality(7)
    found = whole.quality(7)
    measured = found.perplexity, found.kl_mean, found.kl_p999, found.top1
    assert measured == pytest.approx(expected(logits, original, targets.tolist()), rel=1e-12, abs=1e-15)


def test_what_is_impossible_and_what_is_no_number() -> None:
    lowest = -math.inf
    never, even = torch.tensor([[0.0, lowest]]), torch.zeros(1, 2)
    for logits, original, kl in ((even, never, math.log(2)), (never, even, math.inf), (never, never, 0.0)):
        measurement = Measurement()
        measurement.add(torch.tensor([0]), logits, original)
        assert measurement.quality(0).kl_mean == pytest.approx(kl)
    measurement = Measurement()
    measurement.add(torch.tensor([0]), torch.full((1, 2), math.nan), even)
    found = measurement.quality(0)
    assert math.isnan(found.perplexity) and found.kl_mean is not None and math.isnan(found.kl_mean)


@pytest.mark.parametrize(
    ("values", "permille", "wanted"),
    [([5.0], 999, 5.0), ([3.0, 1.0, 2.0], 500, 2.0), ([4.0, 1.0, 2.0, 3.0], 500, 2.0), ([2.0, 1.0], 0, 1.0)],
)
def test_a_percentile_is_a_value_that_was_measured(values: list[float], permille: int, wanted: float) -> None:
    assert percentile(torch.tensor(values), permille) == wanted


def test_the_thousandth_is_left_out() -> None:
    assert percentile(torch.arange(1000.0), 999) == 998
    assert percentile(torch.arange(999.0), 999) == 998
    assert percentile(torch.arange(2001.0), 999) == 1998


def test_a_line_of_the_table() -> None:
    told = line("int8", Quality(10, 7.5, 3_000_000, 2e-4, 3e-3, 0.995))
    assert told.split() == ["int8", "7.5000", "2.000e-04", "3.000e-03", "99.50%", "3.0", "MB"]


def test_a_graph_that_is_not_token_wise_runs_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = ids()[:50]
    wanted = fuser.evaluate(source(), tokens, context=CONTEXT, device="cpu")

    def refuse(*_: Any, **__: Any) -> None:
        raise fuser.UnsupportedOperator("not token-wise")

    monkeypatch.setattr(fuser.llm.LLM, "_paged", refuse)
    found = fuser.evaluate(source(), tokens, context=CONTEXT, device="cpu")
    assert found.perplexity == pytest.approx(wanted.perplexity, rel=1e-5)


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ({"text": []}, "the text has 0 tokens"),
        ({"text": [5]}, "the text has 1 token,"),
        ({"text": [5, 1024, 6]}, "token id 1024 of the text is none of the model's 1024"),
        ({"text": [5, 6, -1, 7]}, "token ids must be whole numbers of 0 or more, got -1"),
        ({"text": [5, 1.5, 7]}, "got 1.5"),
        ({"text": [5, 1 << 40, 7]}, "got 1099511627776"),
        ({"context": 513}, "a window of 513 tokens is longer than the 512"),
        ({"context": 0}, "context must be"),
        ({"tokens": 1}, "tokens must be"),
        ({"text": TEXT, "tokenizer": None}, "a text needs a tokenizer"),
    ],
)
def test_what_cannot_be_is_told(asked: dict[str, Any], told: str, tmp_path: Path) -> None:
    made = source_of(source(), verify=False, note=print)
    if "tokenizer" in asked:
        shutil.copy(DEMO / "model.onnx", tmp_path)
        made = tmp_path / "model.onnx"
    with pytest.raises(UsageError, match=told):
        fuser.evaluate(made, **{"text": ids(), "device": "cpu", "verify": False} | asked)


def test_other_vocabularies_are_refused() -> None:
    module = AutoModelForCausalLM.from_pretrained(DEMO, dtype=torch.float32).eval()
    module.resize_token_embeddings(1000)
    with pytest.raises(UsageError, match="the model has 1000 tokens, the original has 1024"):
        fuser.evaluate(module, ids()[:9], against=source(), device="cpu", verify=False)


def test_other_tokenizers_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "other"
    folder.mkdir()
    for name in ("model.onnx", "config.json", "tokenizer_config.json", "tokenizer.json"):
        shutil.copy(DEMO / name, folder)
    held = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    held["model"]["merges"] = held["model"]["merges"][:100]
    (folder / "tokenizer.json").write_text(json.dumps(held), encoding="utf-8")
    with pytest.raises(UsageError, match="cut the text differently"):
        Trial(folder / "model.onnx", TEXT, against=DEMO / "model.onnx", verify=False)
    Trial(folder / "model.onnx", TEXT, against=DEMO / "model.onnx", verify=False, tokenizer=DEMO)


# The command


def run(*arguments: Any) -> Any:
    return CliRunner().invoke(app, ["eval", *(str(argument) for argument in arguments), "--device", "cpu"])


def test_the_command_prints_a_table_and_json(tmp_path: Path) -> None:
    file = tmp_path / "text"
    file.write_text(TEXT, encoding="utf-8")
    asked = [DEMO / "model.onnx", "--text", file, "--context", CONTEXT]
    told = run(*asked, "--json")
    assert told.exit_code == 0
    found = json.loads(told.stdout)
    assert found["tokens"] == len(ids()) and found["context"] == CONTEXT
    (row,) = found["measured"]
    assert row["name"] == "original" and row["kl_mean"] is None
    assert row["perplexity"] == fuser.evaluate(source(), ids(), context=CONTEXT, device="cpu").perplexity
    told = run(*asked, "--tokens", 60, "--against", DEMO / "model.onnx")
    assert told.exit_code == 0
    title, _, original, model = told.stdout.splitlines()
    assert title == "60 tokens in windows of 40"
    assert original.split()[0] == "original" and model.split()[2:5] == ["0.000e+00", "0.000e+00", "100.00%"]


def test_quantizations_are_rows_of_the_table(tmp_path: Path) -> None:
    file = tmp_path / "text"
    file.write_text(TEXT, encoding="utf-8")
    asked = [DEMO / "model.onnx", "--text", file, "--context", CONTEXT, "--tokens", 81]
    told = run(*asked, "--quantize", "int8, nf4,int4:32:asymmetric", "--json")
    assert told.exit_code == 0
    found = json.loads(told.stdout)["measured"]
    assert [row["name"] for row in found] == ["original", "int8:128", "nf4:64", "int4:32:asymmetric"]
    original, int8, nf4, int4 = (row["weights_bytes"] for row in found)
    assert original > int8 > int4 > nf4
    assert 0 < found[1]["kl_mean"] < found[2]["kl_mean"]
    one = fuser.evaluate(source(), ids(), quantization="nf4", context=CONTEXT, tokens=81, device="cpu")
    assert one.kl_mean == pytest.approx(found[2]["kl_mean"], rel=1e-6)
    assert run(*asked, "--quantize", "int5").exit_code == run(*asked, "--kv-cache", "int5").exit_code == 2


def test_clipped_and_calibrated_rows(tmp_path: Path) -> None:
    file = tmp_path / "text"
    file.write_text(TEXT, encoding="utf-8")
    calibrated = ["--calibrate", file, "--calibration-tokens", 80]
    asked = [
        DEMO / "model.onnx",
        "--text",
        file,
        "--context",
        CONTEXT,
        "--tokens",
        41,
        "--quantize",
        "int4:64",
        "--json",
    ]
    found = [
        json.loads(run(*asked, *more).stdout)["measured"][1]
        for more in ([], ["--clip"], calibrated, [*calibrated, "--method", "awq"])
    ]
    assert [row["name"] for row in found] == ["int4:64", "int4:64 clip", "int4:64 gptq", "int4:64 awq"]
    assert len({row["kl_mean"] for row in found}) == 4
    assert (
        max(found[2]["kl_mean"], found[3]["kl_mean"]) < found[0]["kl_mean"]
    )  # of the text that it was calibrated with


def test_a_file_that_is_quantized_says_what_it_costs(tmp_path: Path) -> None:
    file, out = tmp_path / "text", tmp_path / "q.onnx"
    file.write_text(TEXT, encoding="utf-8")

    def fused(*arguments: object) -> Any:
        return CliRunner().invoke(app, [str(DEMO / "model.onnx"), *map(str, arguments)])

    told = fused("-o", out, "--quantize", "int4:64", "--clip", "--text", file, "--json")
    assert told.exit_code == 0, told.stderr
    report = json.loads(told.stdout)
    trial = Trial(DEMO / "model.onnx", TEXT, device="cpu")
    wanted = trial.compared(choices("int4:64", clip="mse"))
    found = report["quality"]
    assert found["text"] == f"'{file}'" and found["tokens"] == wanted.tokens
    assert found["original_perplexity"] == pytest.approx(trial.original().perplexity, rel=1e-5)
    for name in ("perplexity", "kl_mean", "kl_p999", "top1"):
        assert found[name] == pytest.approx(getattr(wanted, name), rel=1e-3)
    assert f"mean KL {wanted.kl_mean:.2e}" in told.stderr
    rounded, errors = fuser.quantize(plain(), "int4:64", clip="mse"), []
    for path, part in rounded.named_modules():
        if isinstance(part, QuantizedLinear):
            weight = plain().get_submodule(path).weight.detach()
            errors.append(float((part.weight - weight).norm() / weight.norm()))
    assert report["weight_errors"] == {"int4:64": pytest.approx(sum(errors) / len(errors), rel=1e-4)}
    written = fuser.evaluate(out, TEXT, against=DEMO / "model.onnx", device="cpu")
    assert written.kl_mean == pytest.approx(wanted.kl_mean, rel=1e-3)

    lonely = tmp_path / "lonely.onnx"
    shutil.copy(DEMO / "model.onnx", lonely)
    asked = ["--calibrate", file, "--calibration-tokens", 100, "--tokenizer", DEMO, "--no-verify", "--json"]
    calibrated = CliRunner().invoke(app, [*map(str, [lonely, "--quantize", "nf4", *asked])])
    report = json.loads(calibrated.stdout)
    assert report["quality"]["text"] == "what follows the calibration"
    assert report["quality"]["tokens"] == len(trial.ids) - 101
    itself = json.loads(
        fused("--quantize", "nf4", "--calibrate", file, "--method", "awq", "--no-verify", "--json").stdout
    )
    assert itself["quality"]["text"] == "the calibration itself" and itself["quality"]["tokens"] == len(trial.ids) - 1
    assert itself["weight_errors"] != report["weight_errors"]
    textless = json.loads(fused("--quantize", "nf4", "--no-verify", "--json").stdout)
    assert textless["quality"] is None and 0.05 < textless["weight_errors"]["nf4:64"] < 0.1


def test_texts_that_a_file_cannot_be_quantized_with(tmp_path: Path) -> None:
    file, lonely = tmp_path / "text", tmp_path / "lonely" / "model.onnx"
    file.write_text(TEXT, encoding="utf-8")
    lonely.parent.mkdir()
    shutil.copy(DEMO / "model.onnx", lonely)
    for model, arguments, code, told in (
        (DEMO / "model.onnx", ["--calibrate", file], 2, "give quantize, a format"),
        (DEMO / "model.onnx", ["--text", file], 2, "give --quantize, a format"),
        (DEMO / "model.onnx", ["--clip"], 2, "give quantize, a format"),
        (DEMO / "model.onnx", ["--quantize", "int4", "--calibrate", file, "--method", "x"], 2, "gptq or awq"),
        (DEMO / "model.onnx", ["--quantize", "int4", "--calibrate", tmp_path / "none"], 3, "cannot be read"),
        (lonely, ["--quantize", "int4", "--calibrate", file], 2, "give --tokenizer DIR"),
    ):
        result = CliRunner().invoke(app, [str(model), "-o", str(tmp_path / "q.onnx"), *map(str, arguments), "-q"])
        assert (result.exit_code, result.stderr.count("\n")) == (code, 1), result.stderr
        assert told in result.stderr and not (tmp_path / "q.onnx").exists()


@pytest.mark.parametrize(
    ("content", "code", "told"),
    [
        (b"", 3, "is empty"),
        (b"\xff\xfe", 3, "is not UTF-8: byte 0"),
        (None, 3, "cannot be read: No such file"),
        (b"a", 2, "the text has 1 token, it takes two"),
    ],
)
def test_a_text_that_is_none_is_one_line(content: bytes | None, code: int, told: str, tmp_path: Path) -> None:
    file = tmp_path / "text"
    if content is not None:
        file.write_bytes(content)
    result = run(DEMO / "model.onnx", "--text", file, "-q")
    assert result.exit_code == code
    assert not result.stdout
    assert told in result.stderr
    assert result.stderr.count("\n") == 1
