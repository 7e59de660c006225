"""`fuse generate` and `fuse bench MODEL` on the demo model."""

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from fuser import generating
from fuser.cli import app

DEMO = Path(__file__).parents[1] / "models/demo"
ASKED = ["--device", "cpu", "--max-new-tokens", "6"]


def run(*arguments: Any) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_text_comes_from_a_file_and_from_a_folder_alike() -> None:
    told = [run("generate", path, "-p", "def read(self", *ASKED) for path in (DEMO / "model.onnx", DEMO)]
    assert [result.exit_code for result in told] == [0, 0]
    assert told[0].stdout == told[1].stdout
    assert len(told[0].stdout) > 6


def test_json_holds_results_and_statistics() -> None:
    result = run(
        "generate", DEMO / "model.onnx", "-p", "import os", "--token-ids", "5, 6,7", "-n", 2, "--temperature", 1,
        "--seed", 1, "--json", "--stats", *ASKED,
    )  # fmt: skip
    assert result.exit_code == 0
    found = json.loads(result.stdout)
    assert [r["prompt_token_ids"] for r in found["results"][2:]] == [[5, 6, 7]] * 2
    assert [r["index"] for r in found["results"]] == [0, 1, 0, 1]
    held = found["statistics"]
    assert held["tokens"] == sum(len(r["token_ids"]) for r in found["results"])
    assert held["time_to_first_token_s"] > 0
    assert 0 < held["most_pages_used"] <= held["pages"]
    assert max(held["batch"]) == 4
    for said in ("first token", "step", "tokens", "pages", "batch"):
        assert said in result.stderr


def test_several_prompts_are_told_apart() -> None:
    result = run("generate", DEMO / "model.onnx", "-p", "import os", "-p", "class A", *ASKED, "-q")
    assert result.exit_code == 0
    assert result.stdout.count("---") == 2


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ([], "there is no prompt"),
        (["-p", ""], "the prompt is empty"),
        (["--token-ids", "1,x"], "expected whole numbers"),
        (["--token-ids", "999999999"], "token id 999999999 of the prompt is none of"),
        (["-p", "x", "--max-new-tokens", "0"], "max_new_tokens must be"),
        (["-p", "x", "--temperature", "nan"], "temperature must be"),
        (["-p", "x", "--device", "quantum"], "there is no device"),
    ],
)
def test_what_cannot_be_is_one_line(arguments: list[str], told: str) -> None:
    result = run("generate", DEMO / "model.onnx", *arguments, "-q")
    assert result.exit_code == 2
    assert not result.stdout
    assert told in result.stderr
    assert result.stderr.count("\n") == 1


def test_steps_of_a_model_are_measured() -> None:
    asked = ["bench", DEMO / "model.onnx", "--batch", "1,3", "--context", "20", "--steps", "4", "--device", "cpu"]
    result = run(*asked, "--json")
    assert result.exit_code == 0
    found = json.loads(result.stdout)["measured"]
    assert [(line["batch"], line["context"], line["steps"]) for line in found] == [(1, 20, 4), (3, 20, 4)]
    assert all(line["step_s"] > 0 for line in found)
    assert found[1]["step_bytes"] > found[0]["step_bytes"] > 0
    assert len(run(*asked).stdout.splitlines()) == 4
    assert "need" in run("bench", DEMO / "model.onnx", "--batch", "1000", "--context", "400", "--device", "cpu").stderr


def test_batches_over_time_as_a_line() -> None:
    assert generating.levels([]) == ""
    assert generating.levels([0, 4, 8]) == " ▄█"
    assert len(generating.levels(range(1000))) <= generating.WIDTH
