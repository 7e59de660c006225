"""The paper plan: published figures follow from first principles, to the digits that were printed."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fuser import cost
from fuser.cli import app
from fuser.cost import OURS, TALK
from fuser.cost.gpus import GB, card_of, known
from fuser.cost.planning import kv_bytes
from fuser.cost.workload import shapes
from fuser.errors import InputError, UsageError

SEVEN = cost.workload("7B")
# batch, tokens a second, compute ms, memory ms, of a 7B in fp16 at 512 tokens
SINGLE = {
    "RTX-4090": (47, 1572.9, 9.7, 29.76),
    "L40": (140, 2022.3, 26.5, 69.44),
    "L4": (47, 468.1, 13.2, 100.00),
    "A100-80G": (265, 5408.7, 29.1, 49.04),
    "A30": (47, 1455.8, 9.7, 32.15),
    "A40": (140, 1629.0, 32.1, 86.21),
    "A10": (47, 936.5, 12.8, 49.98),
    "A2": (16, 156.0, 29.6, 100.00),
}
# batch, tokens a second, memory ms, communication ms, of a 176B in int4 on eight cards
EIGHT = {"A100-80G": (154, 3805.8, 36.79, 3.86), "RTX-4090": (30, 374.0, 24.82, 57.67)}


@pytest.mark.parametrize("model", ["7B", "Llama-2-7B"])
@pytest.mark.parametrize(
    ("seqlen", "one", "most"), [(128, "0.06", "2.00"), (512, "0.25", "8.00"), (4096, "2.00", "64.00")]
)
def test_cache_of_a_7b(model: str, seqlen: int, one: str, most: str) -> None:
    held = [kv_bytes(cost.workload(model).kv, "auto", "fp16", OURS) * seqlen * batch / GB for batch in (1, 32)]
    assert [f"{size:.2f}" for size in held] == [one, most]


def test_weights_of_a_7b_by_group() -> None:
    found = cost.plan("7B", "A100-80G").weights_bytes
    assert {name: f"{size / GB:.2f}" for name, size in found.items()} == {
        "q": "1.00", "k": "1.00", "v": "1.00", "o": "1.00", "feed-forward A": "4.00", "feed-forward B": "4.00"
    }  # fmt: skip
    assert f"{sum(found.values()) / GB:.2f}" == "12.00"


def test_compute_and_traffic_of_a_token_of_a_7b() -> None:
    """Multiply-adds in 2^40; those of attention as the talk counts them, eight times what they are at 512 tokens."""
    by_name = {op.name: op for op in SEVEN.operators}
    macs = {
        name: op.count * (op.macs + op.macs_per_key * 512 * TALK.key_weight) / 2**40 for name, op in by_name.items()
    }
    assert {name: f"{n:.6f}" for name, n in macs.items() if n} == {
        "qkv": "0.001465", "attention": "0.000977", "o": "0.000488", "feed-forward A": "0.001953", "feed-forward B": "0.001953"
    }  # fmt: skip
    assert f"{sum(macs.values()):.6f}" == "0.006836"
    assert f"{32 * by_name['attention'].macs_per_key * 512 / 2**40:.6f}" == "0.000122"
    parameters = {name: op.count * op.parameters * 2 / GB for name, op in by_name.items() if op.parameters}
    assert parameters == {"qkv": 3, "o": 1, "feed-forward A": 4, "feed-forward B": 4}
    assert f"{32 * by_name['attention'].kv * 512 * 2 / GB:.2f}" == "0.25"
    moved = sum(op.count * (op.kv * 512 + op.whole + op.split) for op in SEVEN.operators) * 2 / GB
    assert f"{moved:.4f}" == "0.2563"


@pytest.mark.parametrize("gpu", SINGLE)
def test_a_7b_on_one_gpu(gpu: str) -> None:
    plan = cost.plan("7B", gpu, seqlen=512, assumptions=TALK)
    found = f"{plan.batch:.0f} {plan.tokens_per_s:.1f} {plan.compute_s * 1e3:.1f} {plan.memory_s * 1e3:.2f}"
    assert found == "{:d} {:.1f} {:.1f} {:.2f}".format(*SINGLE[gpu])
    assert plan.memory_s == pytest.approx(plan.gpu.memory_gb / plan.gpu.bandwidth_gb_s / 0.8)  # all of memory is read


@pytest.mark.parametrize("gpu", EIGHT)
def test_a_176b_on_eight_gpus(gpu: str) -> None:
    """Weights, link and their sums follow; what a sequence takes is implied by the figures and no more (docs/cost.md)."""
    implied = replace(TALK, read_factor=1.35, held_factor=1.89)
    plan = cost.plan("176B", gpu, quantize="int4", tp=8, seqlen=512, assumptions=implied)
    found = f"{int(plan.batch)} {plan.tokens_per_s:.1f} {plan.memory_s * 1e3:.2f} {plan.communication_s * 1e3:.2f}"
    assert found == "{:d} {:.1f} {:.2f} {:.2f}".format(*EIGHT[gpu])


def test_what_the_figures_of_the_176b_imply() -> None:
    """Three unknowns of both cards' figures, by algebra: weights of a card, and what a sequence takes and is read."""
    batches = {name: rate * (memory + comm) / 1e3 for name, (_, rate, memory, comm) in EIGHT.items()}
    cards = [known()[name] for name in EIGHT]
    many, few = batches.values()
    held = (cards[0].memory_gb - cards[1].memory_gb) / (many - few)
    weights = cards[0].memory_gb - held * many
    plan = cost.plan("176B", cards[0], quantize="int4", tp=8, assumptions=TALK)
    assert weights == pytest.approx(plan.card_weights_bytes / GB, rel=5e-3)
    first, second = (
        EIGHT[card.name][2] / 1e3 * card.bandwidth_gb_s * 0.8 for card in cards
    )  # GB that are read in a step
    read = (first - second) / (many - few)
    assert first - read * many == pytest.approx(plan.read_weights_bytes / GB, rel=5e-3)
    cache = plan.cache_bytes / 8 / GB
    assert held / cache == pytest.approx(1.89, abs=5e-3) and read / cache == pytest.approx(1.35, abs=5e-3)


@pytest.mark.parametrize(
    "arguments",
    [
        ["7B", "--assume", "talk"],
        ["176B", "--quantize", "int4", "--tp", "8", "--gpu", "RTX-4090,L40,A100-80G,H100,H200"],
    ],
)
def test_documented_tables_are_what_the_command_prints(arguments: list[str]) -> None:
    page = (Path(__file__).parents[1] / "docs" / "cost.md").read_text(encoding="utf-8")
    shown = CliRunner().invoke(app, ["plan", *arguments]).output
    table = shown[shown.index("       GPU ") :].split("\n\n")[0]
    assert all(f"    {line}" in page.splitlines() for line in table.splitlines())


def test_our_own_assumptions_are_stricter() -> None:
    ours, theirs = (cost.plan("7B", "A100-80G", assumptions=how) for how in (OURS, TALK))
    assert ours.batch == int(ours.capacity) and ours.fits
    assert ours.compute_s / ours.batch < theirs.compute_s / theirs.batch  # attention is counted once
    pcie = cost.plan("176B", "RTX-4090", quantize="int4", tp=8)
    volume = 2 * 2 * 7 / 8 * 140 * 14336 * 2 * pcie.batch
    assert pcie.communication_s == pytest.approx(volume / (64e9 * 0.8) + 140 * 10e-6)


@pytest.mark.parametrize(
    ("name", "billions"), [("Llama-2-7B", 6.738), ("Llama-3-8B", 8.030), ("ChatGLM-6B", 6.173), ("BLOOM-176B", 176.247)]
)
def test_shapes_have_the_published_number_of_parameters(name: str, billions: float) -> None:
    assert f"{shapes()[name].parameters / 1e9:.3f}" == f"{billions:.3f}"


def test_quantized_weights_and_caches() -> None:
    plain, small = (cost.plan("Llama-2-7B", "A10", quantize=q, kv=kv) for q, kv in ((None, "auto"), ("int4", "int8")))
    products = 32 * (4 * 4096**2 + 3 * 4096 * 11008)
    rest = 2 * (2 * 32000 * 4096 + 65 * 4096)
    assert small.card_weights_bytes == pytest.approx(products * (0.5 + 2 / 128) + rest)
    assert plain.card_weights_bytes == products * 2 + rest
    assert small.cache_bytes / plain.cache_bytes == pytest.approx((1 + 2 / 64) / 2)
    assert small.capacity > 3 * plain.capacity


def test_eight_bit_products_are_faster_where_the_card_has_them() -> None:
    plain, eight = (cost.plan("7B", "A100-80G", quantize=q, batch=64, seqlen=1) for q in ("int8", "w8a8"))
    assert plain.compute_s / eight.compute_s == pytest.approx(2, rel=1e-3)


def test_a_model_that_does_not_fit_says_so() -> None:
    plan = cost.plan("BLOOM-176B", "A100-80G")
    assert not plan.fits and plan.batch == 0 and plan.tokens_per_s == 0


def test_heads_limit_how_far_a_cache_is_divided() -> None:
    eight, sixteen = (cost.plan("Llama-3-8B", "A100-80G", tp=n) for n in (8, 16))
    assert sixteen.sequence_bytes == pytest.approx(eight.sequence_bytes)
    assert sixteen.card_weights_bytes < eight.card_weights_bytes


def test_command(tmp_path: Path) -> None:
    own = tmp_path / "gpus.toml"
    own.write_text("[Mine]\nmemory_gb = 100\nbandwidth_gb_s = 1000\ntflops = 100\n", encoding="utf-8")
    result = CliRunner().invoke(app, ["plan", "llama-2-7b", "--gpu", "a10,mine", "--gpus", str(own), "--json"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert [plan["gpu"] for plan in found["plans"]] == ["A10", "Mine"]
    assert found["plans"][1]["batch"] > found["plans"][0]["batch"]
    shown = CliRunner().invoke(app, ["plan", "7B", "--assume", "talk"])
    assert shown.exit_code == 0 and "1572.9" in shown.output and "0.006836" in shown.output


@pytest.mark.parametrize(
    "arguments",
    [
        ["plan", "no-such-model"],
        ["plan", "7B", "--gpu", "Z100"],
        ["plan", "7B", "--quantize", "int3"],
        ["plan", "7B", "--kv", "int2"],
        ["plan", "7B", "--bandwidth", "1.5"],
        ["plan", "7B", "--assume", "nothing"],
        ["plan", "7B", "--gpus", "/does/not/exist"],
    ],
)
def test_bad_calls_are_one_line(arguments: list[str]) -> None:
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code in (2, 3) and "Traceback" not in result.output


@pytest.mark.parametrize(
    "text",
    ["[A", "[A]\nmemory_gb = 1", "[A]\nmemory_gb = -1\nbandwidth_gb_s = 1\ntflops = 1", "a = 1", "[A]\nwide = 1"],
)
def test_bad_tables_of_gpus(tmp_path: Path, text: str) -> None:
    path = tmp_path / "gpus.toml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=r"gpus\.toml"):
        known(path)


def test_devices_are_known_by_their_names() -> None:
    names = {
        "NVIDIA H200": "H200", "NVIDIA A100-SXM4-80GB": "A100-80G", "NVIDIA A100-SXM4-40GB": "A100-40G",
        "NVIDIA GeForce RTX 4090": "RTX-4090", "NVIDIA L40": "L40", "NVIDIA L4": "L4", "NVIDIA GeForce RTX 5090": None,
    }  # fmt: skip
    found = {name: card_of(name) for name in names}
    assert {name: gpu and gpu.name for name, gpu in found.items()} == names


def test_plans_refuse_what_cannot_be() -> None:
    for wrong in ({"tp": 0}, {"seqlen": 0}, {"batch": 0}, {"dtype": "fp8"}):
        with pytest.raises(UsageError):
            cost.plan("7B", "A10", **wrong)  # type: ignore[arg-type]
