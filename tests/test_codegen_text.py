"""The emitted source: as it was last looked at, and compiled for GPUs that need not be there."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fuser.codegen import attention, embedding, linear, matmul, quantized, rotary, rounding, sampling
from fuser.codegen.elementwise import elementwise, gate, norm
from fuser.codegen.kernel import Kernel
from fuser.formats import format_of

GOLDEN = Path(__file__).parent / "emitted"


def kernels() -> dict[str, Kernel]:
    """One of every family, small enough to read."""
    attend = attention.Attention(32, 8, 128, 0.08838834764831845, 16)
    extras = attention.Attention(8, 4, 80, 0.1118, 64, window=4096, softcap=50.0, alibi=True)
    int8 = attention.Attention(32, 8, 128, 0.08838834764831845, 16, kv_group=64)
    gate_up = linear.Linear(22016, 4096, norm="rms", norm_eps=1e-5, activation="silu")
    turning = rotary.Rotary(32, 8, 128, 128)
    qkv = linear.Linear(6144, 4096, norm="rms", norm_eps=1e-6, rotary=turning, head_norm_eps=1e-6)
    stored = rotary.Rotary(32, 8, 128, 128, kv_group=64)
    codes = linear.Linear(22016, 4096, tokens=16, activation="silu", format=format_of("int4"))
    eights = linear.Linear(6144, 4096, rotary=turning, format=format_of("int8:64:asymmetric"))
    return {
        "skip_rms_norm": elementwise(norm("rms", 4096, eps=1e-5, skip=True)),
        "layer_norm": elementwise(norm("layer", 2560, eps=1e-12, bias=True)),
        "gate": elementwise(gate(11008, activation="silu")),
        "linear_norm_gate_up": linear.linear(gate_up),
        "linear_norm_qkv_rotary": linear.linear(qkv),
        "linear_residual_parts": linear.linear(linear.Linear(4096, 4096, tokens=16, residual=True)),
        "matmul_gate_up": matmul.matmul(matmul.Matmul(22016, 4096, activation="silu", gated=True)),
        "embedding": embedding.embedding(embedding.Embedding(4096, (32000,))),
        "top": sampling.top(sampling.Top(32000, 50)),
        "draw": sampling.draw(50),
        "rotary_cache_write": rotary.rotary_cache_write(turning),
        "rotary_cache_write_int8": rotary.rotary_cache_write(stored),
        "linear_int4_gate_up": quantized.quantized_linear(codes),
        "linear_nf4_parts": quantized.quantized_linear(linear.Linear(4096, 4096, format=format_of("nf4"))),
        "linear_w8a8": linear.linear(linear.Linear(4096, 4096, tokens=16, residual=True, format=format_of("w8a8"))),
        "dequantize_int8": quantized.dequantize(quantized.Dequantize(eights)),
        "rounding_rms_norm": rounding.rounding(rounding.Rounding(4096, "int8", norm="rms", norm_eps=1e-5, weight=True)),
        "paged_decode_int8": attention.decode(int8),
        "paged_decode_parts": attention.decode(attend, splits=8),
        "paged_prefill_extras": attention.prefill(extras),
    }


@pytest.mark.parametrize("name", kernels())
def test_the_text_is_the_golden_one(name: str, update_golden: bool) -> None:
    text, golden = kernels()[name].text, GOLDEN / f"{name}.py"
    if update_golden:
        golden.parent.mkdir(exist_ok=True)
        golden.write_text(text)
    assert text == golden.read_text()


@pytest.mark.parametrize("name", kernels())
def test_the_text_is_a_documented_module(name: str) -> None:
    kernel = kernels()[name]
    tree = ast.parse(kernel.text)
    documentation = ast.get_docstring(tree)
    assert documentation is not None and "Grid: (" in documentation and "float32" in documentation
    functions = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
    parameters = [argument.arg for argument in functions["kernel"].args.args]
    assert parameters == [*kernel.signature, *kernel.constants]
    for function in functions.values():
        if function.name != "kernel":
            assert ast.get_docstring(function)


@pytest.mark.parametrize("name", kernels())
def test_the_text_is_formatted(name: str, tmp_path: Path) -> None:
    pytest.importorskip("ruff")
    file = tmp_path / f"{name}.py"
    file.write_text(kernels()[name].text)
    command = [sys.executable, "-m", "ruff", "format", "--line-length=120", "--diff", str(file)]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr


def test_two_emissions_are_one_text() -> None:
    assert {n: k.text for n, k in kernels().items()} == {n: k.text for n, k in kernels().items()}


@pytest.mark.slow
@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100"])
def test_compiles_without_spills(target: str, tmp_path: Path) -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "0", "FUSER_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-m", "tests.cross_compile", "--json", target]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    rows = [json.loads(line) for line in run.stdout.splitlines()]
    assert len(rows) > 120
    assert [row for row in rows if row.get("error") or row["spills"]] == []
    assert [row for row in rows if row["shared"] > row["limit"]] == []
