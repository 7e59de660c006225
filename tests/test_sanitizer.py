"""Every kernel family under NVIDIA's compute-sanitizer, on small shapes: no stray access, no race."""

import os
import shutil
import subprocess
import sys

import pytest

FAMILIES = {
    "norms and gates": "test_norm or test_gate",
    "products": "test_linear and 3-16 or test_projection",
    "rotary embedding": "test_rotary_cache_write",
    "decode": "test_paged_decode and bf16",
    "prefill": "test_paged_prefill and bf16",
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
    tests = [
        "-m",
        "pytest",
        "-q",
        "-x",
        "-p",
        "no:cacheprovider",
        "tests/test_codegen_kernels.py",
        "-k",
        FAMILIES[family],
    ]
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    run = subprocess.run([*checked, *tests], env=environment, capture_output=True, text=True)
    said = run.stdout + run.stderr
    assert run.returncode == 0 and " passed" in said, said[-6000:]
    assert "ERROR SUMMARY: 0 errors" in said or "RACECHECK SUMMARY: 0 hazards" in said, said[-2000:]
