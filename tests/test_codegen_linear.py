"""The small-M linear family: against the references in Triton's interpreter, and compiled for GPUs that are not here."""

import ast
import json
import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from fuser.codegen.linear import Linear, emit
from fuser.codegen.source import load
from fuser.errors import OutputError
from tests import interpreted

ROOT = Path(__file__).resolve().parents[1]
GOLDEN = ROOT / "tests" / "emitted"
# Relative, norm-wise: one rounding of the result, and of x where a norm's gain is multiplied in.
TOLERANCE = {"float32": 2e-6, "float16": 1e-3, "bfloat16": 8e-3}
ON_A_CARD = [pytest.param("cuda", marks=pytest.mark.gpu)]


@cache
def _interpreted() -> dict[str, float]:
    command = [sys.executable, "-m", "tests.interpreted", "linear"]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found: dict[str, float] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("kernel", interpreted.KERNELS, ids=str)
def test_equals_the_reference(kernel: Linear, dtype: str) -> None:
    cases = {name: error for name, error in _interpreted().items() if name.startswith(f"{kernel} |")}
    mine = {name: error for name, error in cases.items() if name.endswith(f" {dtype}")}
    assert len(mine) == len(interpreted.shapes(dtype))
    assert {name: error for name, error in mine.items() if not error <= TOLERANCE[dtype]} == {}


@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("kernel", [interpreted.KERNELS[0], interpreted.KERNELS[5]], ids=str)
def test_compiles_for(kernel: Linear, capability: int, tmp_path: Path) -> None:
    """No register is spilled, and shared memory fits, at a width that models have."""
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    limit = {80: 163, 90: 227, 100: 227}[capability] << 10
    module = load(emit(kernel))
    for name, sizes in (
        ("one_row", {"BLOCK_N": 4, "BLOCK_K": 1024}),
        ("several_rows", {"BLOCK_M": 16, "BLOCK_N": 32, "BLOCK_K": 128}),
    ):
        function = getattr(module, name)
        constants = {"N": 4096, "K": 4096, **sizes}
        types = {n: "*bf16" if n.endswith("_ptr") else "i32" if n == "M" else "fp32" for n in function.arg_names}
        signature = {n: "constexpr" if n in constants else kind for n, kind in types.items()}
        attributes = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(function.arg_names) if n.endswith("_ptr")}
        source = ASTSource(
            function, signature, {(function.arg_names.index(n),): v for n, v in constants.items()}, attributes
        )
        compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": 4})
        assert compiled.metadata.shared <= limit
        assert _spilled_bytes(compiled.asm["ptx"], tmp_path) == 0
        assert "ld.global.v4" in compiled.asm["ptx"] or "cp.async" in compiled.asm["ptx"]  # sixteen bytes at once


def _spilled_bytes(ptx: str, folder: Path) -> int:
    """What ptxas, the one that comes with Triton, says it has to spill."""
    import triton

    (target,) = re.findall(r"\.target (sm_\w+)", ptx)
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    (folder / "kernel.ptx").write_text(ptx, encoding="utf-8")
    options = ["-v", f"--gpu-name={target}", folder / "kernel.ptx", "-o", folder / "kernel.cubin"]
    for tool in sorted(tools.glob("ptxas*")):  # of two, the newer one knows newer cards and versions of the language
        told = subprocess.run([tool, *options], capture_output=True, text=True, check=False)
        if told.returncode == 0:
            break
    assert told.returncode == 0, told.stderr
    stored, loaded = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", told.stderr)[0]
    return int(stored) + int(loaded)


@pytest.mark.parametrize("device", ON_A_CARD)
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("kernel", interpreted.KERNELS, ids=str)
def test_on_a_card(kernel: Linear, dtype: str, device: str) -> None:
    for M, N, K in [*interpreted.SHAPES, (1, 4096, 4096), (16, 1000, 4096)]:
        given = interpreted.arguments(kernel, M, N, K, interpreted.DTYPES[dtype], device)
        out = torch.full((M, N), float("nan"), dtype=given["x"].dtype, device=device)
        found = interpreted.call(kernel, given, 1e-6, out)
        assert interpreted.relative_error(found, interpreted.expected(kernel, given, 1e-6)) <= TOLERANCE[dtype], (
            M,
            N,
            K,
        )


@pytest.mark.parametrize("number", range(len(interpreted.KERNELS)))
def test_emitted_text(number: int, update_golden: bool) -> None:
    """The text is Python as a person would have it, and is what was read and committed."""
    kernel = interpreted.KERNELS[number]
    text = emit(kernel)
    tree = ast.parse(text)
    assert ast.get_docstring(tree) and max(map(len, text.splitlines())) <= 132
    golden = GOLDEN / f"linear_{number}.py.txt"
    if update_golden:
        golden.parent.mkdir(exist_ok=True)
        golden.write_text(text, encoding="utf-8")
    assert golden.read_text(encoding="utf-8") == text


def test_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSER_CACHE", str(tmp_path))
    text = "answer = 42  # of this test\n"
    module: Any = load(text)
    assert module.answer == 42 and load(text) is module
    (file,) = (tmp_path / "kernels").iterdir()
    assert file.read_text(encoding="utf-8") == text
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FUSER_CACHE", str(tmp_path / "file"))
    with pytest.raises(OutputError, match="set FUSER_CACHE"):
        load("answer = 43  # of this test\n")
