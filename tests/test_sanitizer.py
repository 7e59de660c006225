"""Every kernel family under NVIDIA's compute-sanitizer, on small shapes: no stray access, no race."""

import os
import shutil
import subprocess
import sys

import pytest

FAMILIES = {
    "norms": ("kernels", "test_norm and 5-416-bf16"),
    "products of a token": ("kernels", "test_linear[ and 3-1-bf16"),
    "products of tokens": ("kernels", "test_linear[ and 3-5-bf16"),
    "projection": ("kernels", "test_projection and False and bf16"),
    "rotary embedding": ("kernels", "test_rotary_cache_write and bf16"),
    "decode": ("kernels", "test_paged_decode and 3-bf16"),
    "prefill": ("kernels", "test_paged_prefill and bf16 and 80"),
    "rows": ("rows", "bf16 and (residual or embedding)"),
    "tokens": ("sampling", "test_the_highest and bf16"),
    "products of many tokens": ("matmul", "test_matmul and 37-bf16"),
}


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
@pytest.mark.parametrize("family", FAMILIES)
def test_sanitizer(tool: str, family: str) -> None:
    sanitizer = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not os.path.exists(sanitizer):
        pytest.skip("compute-sanitizer is not installed")
    checked = [sanitizer, "--tool", tool, "--error-exitcode", "3", "--target-processes", "all", sys.executable]
    file, which = FAMILIES[family]
    tests = ["-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", f"tests/test_codegen_{file}.py", "-k", which]
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    run = subprocess.run([*checked, *tests], env=environment, capture_output=True, text=True)
    said = run.stdout + run.stderr
    assert run.returncode == 0 and " passed" in said, said[-6000:]
    assert "ERROR SUMMARY: 0 errors" in said or "RACECHECK SUMMARY: 0 hazards" in said, said[-2000:]
