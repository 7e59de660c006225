"""Tuning: what is searched, what is kept and by whom, and what is done with it; times are made up where there is no GPU."""

import json
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from typer.testing import CliRunner

import fuser
from fuser import tuning
from fuser.cli import app
from fuser.codegen.attention import Attention
from fuser.codegen.compose import compose
from fuser.codegen.linear import Linear
from fuser.codegen.rotary import Rotary
from fuser.codegen.shapes import SHAPES
from fuser.codegen.tuning import Choice, Problem, Table, record, table_of, user_file
from fuser.errors import UsageError
from fuser.formats import format_of
from tests.test_stepper import fused

GPU = "Some GPU 80GB"
O = Problem(Linear(4096, 4096, residual=True))  # noqa: E741
DECODE = Problem(Attention(32, 8, 128, 0.0884), 1, 4096)


@pytest.fixture(autouse=True)
def _cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSER_CACHE_DIR", str(tmp_path))


def searched(problems: list[Problem], measure: tuning.Measure, seconds: float = 1e6) -> tuning.Search:
    return tuning.search(problems, measure, seconds=seconds, versions="made up", say=lambda text: None)


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
def test_every_candidate_is_a_kernel_or_refused(dtype: str) -> None:
    for problem in tuning.standard([1, 16, 64], dtype, ["llama-2-7b", "llama-3-8b"]):
        choices = list(problem.candidates())
        assert choices[0] == problem.default and len(choices) > 3
        assert problem.kernel(choices[0]).text == problem.kernel().text


def test_keys_tell_kernels_apart_and_nothing_else() -> None:
    problems = tuning.standard([1, 16, 64], "bf16", ["llama-2-7b", "llama-3-8b"])
    assert len({problem.key for problem in problems}) == len(problems)
    assert O.key == "linear N=4096 K=4096 residual=True"
    assert (
        Problem(Linear(4096, 4096, norm="rms", norm_eps=1e-5)).key
        == Problem(Linear(4096, 4096, norm="rms", norm_eps=1e-6)).key
    )
    assert Problem(DECODE.what, 1, 3000).key == DECODE.key != Problem(DECODE.what, 2, 4096).key
    few = [Problem(Linear(64, 64, tokens=count)).key for count in (1, 2, 5, 16, 17, 32, 33, 64)]
    assert len(set(few)) == 4 and len(set(few[1:4])) == len(set(few[4:6])) == len(set(few[6:])) == 1
    turning = Problem(Linear(6144, 4096, rotary=Rotary(32, 8, 128, 128)))
    assert turning.key == "linear N=6144 K=4096 rotary(heads=32 kv_heads=8 head_dim=128 rotary_dim=128)"


def test_the_fastest_that_is_right_is_kept() -> None:
    def measure(problem: Problem, choice: Choice) -> float:
        if choice.get("num_warps") == 8:
            return float("inf")  # fast, and wrong
        if choice.get("num_warps") == 1:
            raise RuntimeError("out of resources")
        return 10.0 - choice.get("BLOCK_N", 0)

    found = searched([O], measure)
    entry = found.entries[O.key]
    assert entry["choice"]["BLOCK_N"] == 4 and entry["us"] == 6.0 and entry["with"] == "made up"
    assert any("wrong" in reason for reason in found.wrong) and any("RuntimeError" in r for r in found.wrong)
    record(GPU, found.entries)
    assert table_of(GPU).chosen(O) == entry["choice"]
    assert "BLOCK_N: tl.constexpr = 4" in O.kernel(table_of(GPU).chosen(O)).text


def test_time_ends_a_search(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter(range(10**6))
    monkeypatch.setattr("time.monotonic", lambda: float(next(now)))
    found = searched([O, DECODE, Problem(Linear(8, 8))], lambda problem, choice: 1.0, seconds=8)
    assert found.left >= 1 and found.tried < 10 and "for want of time" in found.text()
    assert O.key in found.entries


def test_results_are_a_line_each_and_sorted() -> None:
    path = record(GPU, {"b": {"us": 1.0, "choice": {}}, "a": {"us": 2.0, "choice": {}}})
    lines = path.read_text().splitlines()
    assert [line.split('"')[1] for line in lines[3:5]] == ["a", "b"] and json.loads(path.read_text())["gpu"] == GPU
    record(GPU, {"c": {"us": 3.0, "choice": {}}})
    assert set(table_of(GPU).entries) == {"a", "b", "c"}


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"entries": 3}', '{"entries": {"k": 7}}', "\x00\xff", "[" * 100_000], ids=range(7)
)
def test_damaged_results_are_set_aside(text: str) -> None:
    user_file(GPU).parent.mkdir(parents=True)
    user_file(GPU).write_text(text)
    with pytest.warns(UserWarning, match="cannot be read"):
        assert table_of(GPU).chosen(O) is None
    assert user_file(GPU).with_suffix(".damaged").read_text() == text and not user_file(GPU).exists()
    record(GPU, {O.key: {"choice": dict(O.default), "us": 1.0}})
    assert table_of(GPU).chosen(O) == dict(O.default)


@pytest.mark.parametrize(
    "choice", [{"BLOCK": 3}, {**O.default, "BLOCK_N": 3}, {**O.default, "splits": 99}, {"BLOCK_N": "x"}, [], None]
)
def test_choices_that_do_not_fit_are_not_taken(choice: object) -> None:
    assert Table(GPU, {O.key: {"choice": choice}}).chosen(O) is None


def test_a_choice_that_fits_others_of_its_family_alone_is_not_taken() -> None:
    small = Problem(Linear(64, 64, tokens=5))
    unfit = [choice for choice in small.candidates() if not small.fits(choice)]
    assert unfit and all(Table(GPU, {small.key: {"choice": choice}}).chosen(small) is None for choice in unfit)


def test_numbers_of_a_file_do_not_reach_a_kernel_as_they_are_written() -> None:
    written = {name: float(value) for name, value in O.default.items()}
    chosen = Table(GPU, {O.key: {"choice": written}}).chosen(O)
    assert chosen is not None and O.kernel(chosen).text == O.kernel().text


def test_what_was_found_before_is_replaced_by_what_is_faster_alone() -> None:
    best = list(O.candidates())[5]
    table, kept = Table(GPU, {O.key: {"choice": dict(best)}}), []

    def measure(problem: Problem, choice: Choice) -> float:
        return 1.0 if choice == best else 2.0

    found = tuning.search([O], measure, seconds=0.0, versions="", say=lambda text: None, table=table, keep=kept.append)
    assert found.tried == 2 and found.entries[O.key]["choice"] == best  # there was no time for any other
    assert kept == [found.entries]


def test_an_interrupted_search_has_kept_what_it_found() -> None:
    def measure(problem: Problem, choice: Choice) -> float:
        if problem is DECODE:
            raise KeyboardInterrupt
        return 1.0

    keep = partial(record, GPU)
    with pytest.raises(KeyboardInterrupt):
        tuning.search([O, DECODE], measure, seconds=1e6, versions="", say=lambda text: None, keep=keep)
    assert set(table_of(GPU).entries) == {O.key}


def test_a_shipped_table_that_is_damaged_is_left_where_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fuser.codegen.tuning.SHIPPED", tmp_path)
    shipped = tmp_path / user_file(GPU).name
    shipped.write_text("{")
    with pytest.warns(UserWarning, match="not used"):
        assert table_of(GPU).entries == {}
    assert shipped.read_text() == "{"


def test_processes_lose_nothing_of_one_another() -> None:
    many = "import sys; from fuser.codegen.tuning import record"
    many += f"\nfor i in range(20): record({GPU!r}, {{sys.argv[1] + str(i): {{'choice': {{}}, 'us': 1.0}}}})"
    workers = [subprocess.Popen([sys.executable, "-c", many, name]) for name in "abc"]
    assert [worker.wait() for worker in workers] == [0, 0, 0]
    assert len(table_of(GPU).entries) == 60
    assert {file.suffix for file in user_file(GPU).parent.iterdir()} == {".json", ".lock"}


def test_a_program_is_composed_by_what_was_chosen() -> None:
    plain = compose(fused("llama"), dtype="bf16", tokens=1)
    problems = tuning.of_program(plain)
    first = next(problem for problem in problems if isinstance(problem.what, Linear))
    choice = list(first.candidates())[1]
    chosen = compose(fused("llama"), dtype="bf16", tokens=1, table=Table(GPU, {first.key: {"choice": choice}}))
    changed = [a.what for a, b in zip(plain.steps, chosen.steps, strict=True) if a.kernel != b.kernel]
    assert changed and all(what == first.what for what in changed)


@pytest.mark.parametrize(("name", "G", "F", "V"), [("llama-2-7b", 32, 11008, 32000), ("llama-3-8b", 8, 14336, 128256)])
def test_what_is_tuned_is_what_a_model_launches(name: str, G: int, F: int, V: int) -> None:
    """Two layers of the real widths, of memory that nothing was written to."""
    config = LlamaConfig(
        hidden_size=4096, intermediate_size=F, num_hidden_layers=2, num_attention_heads=32, num_key_value_heads=G,
        vocab_size=V, rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
    )  # fmt: skip
    with torch.device("meta"):
        module = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    module = module.to_empty(device="cpu")
    module.model.rotary_emb = LlamaRotaryEmbedding(config)
    graph = fuser.compile(module, verify=False).graph
    for tokens in (1, 16, 64):
        program = compose(graph, dtype="bf16", tokens=tokens)
        assert [step.kernel.name for step in program.steps if step.kernel] == [
            "embedding", *["linear", "paged_decode", "linear", "linear", "linear"] * 2, "linear"
        ]  # fmt: skip
        launched = {problem.key for problem in tuning.of_program(program)}
        assert launched == {problem.key for problem in tuning.standard([tokens], "bf16", [name])} - {
            Problem(step.what, 1, 4096, decode=False).key for step in program.steps if isinstance(step.what, Attention)
        }


def test_a_shipped_table_is_found() -> None:
    table = table_of("NVIDIA H100 80GB HBM3")
    problems = tuning.standard([1, 16, 64], "bf16", ["llama-2-7b", "llama-3-8b"])
    assert len(table.entries) > 40 and all(table.chosen(problem) is not None for problem in problems)


@pytest.mark.parametrize("format", ["int4", "nf4", "int8", "w8a8"])
def test_a_shipped_table_has_quantized_products(format: str) -> None:
    """Every choice still fits what may be chosen: one that does not would be passed over in silence."""
    table, shape = table_of("NVIDIA H200"), SHAPES["llama-2-7b"]
    for tokens in (1, 16, 64):
        for _, what in shape.linears(tokens, format=format_of(format)):
            assert table.chosen(Problem(what)) is not None


def test_the_command_wants_a_gpu_and_known_shapes() -> None:
    unknown = CliRunner().invoke(app, ["tune", "--shapes", "llama-9"])
    assert unknown.exit_code == 2 and "llama-2-7b" in unknown.output
    assert CliRunner().invoke(app, ["tune", "--tokens", "0"]).exit_code == 2
    if not torch.cuda.is_available():
        for command in (["tune"], ["bench"]):
            result = CliRunner().invoke(app, command)
            assert result.exit_code == 2 and "CUDA device" in result.output


def test_an_unknown_shape_is_refused() -> None:
    with pytest.raises(UsageError, match="no shape 'gpt-9'"):
        tuning.standard([1], "bf16", ["gpt-9"])


@pytest.mark.gpu
@pytest.mark.slow
def test_tuning_measures_and_keeps() -> None:
    problems = [O, Problem(Attention(32, 8, 128, 0.0884), 2, 300)]
    found = tuning.tune(problems, seconds=60, say=lambda text: None)
    assert set(found.entries) == {problem.key for problem in problems} and found.tried > 4
    table = table_of(torch.cuda.get_device_name())
    assert all(table.chosen(problem) is not None for problem in problems)
