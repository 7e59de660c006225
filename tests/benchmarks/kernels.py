"""Emitted kernels on a GPU against torch: time, bandwidth and the fraction of what a copy reaches, cold L2.

    python -m tests.benchmarks.kernels                     # Llama-3-8B's shapes, bfloat16, 1 to 64 rows: about two minutes
    python -m tests.benchmarks.kernels --json results.json

Medians of `triton.testing.do_bench`, which clears the L2 cache before every run. The best of a handful of configurations is
told, and which; torch's side is what its eager mode launches for the same result. The ceiling is a read of 2 GB in this process.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from fuser.codegen.linear import Linear
from tests.interpreted import arguments, call, expected, relative_error

EPS = 1e-6
TOLERANCE = 1e-2  # bfloat16
# Name, kernel, N, K: those of Llama-3-8B (8 of 32 heads for keys and values; feed-forward 14336).
CASES = [
    ("norm + qkv", Linear(norm=True), 6144, 4096),
    ("o + residual", Linear(residual=True), 4096, 4096),
    ("norm + gate/up + silu", Linear(norm=True, activation="silu", gated=True), 14336, 4096),
    ("down + residual", Linear(residual=True), 4096, 14336),
    ("norm + lm_head", Linear(norm=True), 128256, 4096),
]
ROWS = (1, 4, 16, 64)
ONE_ROW = [
    {"block_n": n, "block_k": k, "num_warps": w} for n, k, w in product((1, 2, 4, 8), (512, 1024, 2048), (4, 8)) if n * k <= 8192
]  # fmt: skip
SEVERAL = [
    {"block_n": n, "block_k": k, "num_warps": 4, "num_stages": s} for n, k, s in product((16, 32, 64), (128, 256), (3, 4, 6))
]  # fmt: skip


@dataclass
class Row:
    """One line of the table."""

    case: str
    M: int
    fuser_us: float
    torch_us: float
    bandwidth: float  # bytes a second
    ceiling: float  # likewise
    config: str
    error: float
    failed: int  # configurations that did not run


def torch_side(kernel: Linear, given: dict[str, Tensor]) -> Tensor:
    """What eager torch does for the same result."""
    x = given["x"]
    if kernel.norm:
        x = functional.rms_norm(x, x.shape[-1:], given["gain"], EPS)
    y = functional.linear(x, given["weight"], given.get("bias"))
    if kernel.gated:
        gate, up = y.chunk(2, -1)
        y = functional.silu(gate) * up
    return y + given["residual"] if kernel.residual else y


def seconds(run: Callable[[], Any]) -> float:
    from triton.testing import do_bench

    found: float = do_bench(run, warmup=5, rep=25, return_mode="median")
    return found / 1e3


def ceiling() -> float:
    """Bytes a second that a sum over 2 GB reads."""
    data = torch.ones(1 << 30, dtype=torch.bfloat16, device="cuda").view(torch.int32)
    return data.nbytes / seconds(data.amax)


def measure() -> Iterator[Row]:
    top = ceiling()
    for name, kernel, N, K in CASES:
        for M in ROWS:
            given = arguments(kernel, M, N, K, torch.bfloat16, "cuda")
            out = torch.empty(M, N, dtype=torch.bfloat16, device="cuda")
            found, failed = [], 0
            for config in ONE_ROW if M == 1 else SEVERAL:
                try:
                    call(kernel, given, EPS, out, **config)
                    found.append((seconds(partial(call, kernel, given, EPS, out, **config)), config))
                except Exception as error:  # a configuration that does not fit the card is one less
                    failed += 1
                    print(f"{name} {M} {config}: {str(error)[:100]}", file=sys.stderr)
            best, config = min(found, key=lambda pair: pair[0])
            out.fill_(float("nan"))
            call(kernel, given, EPS, out, **config)
            error = relative_error(out, expected(kernel, given, EPS))
            moved = sum(tensor.nbytes for tensor in given.values()) + out.nbytes
            torch_s = seconds(partial(torch_side, kernel, given))
            settings = ", ".join(f"{key} {value}" for key, value in config.items())
            yield Row(name, M, best * 1e6, torch_s * 1e6, moved / best, top, settings, error, failed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("a CUDA GPU is needed")
    import triton

    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}, bfloat16")
    print(
        f"{'':24}{'rows':>5}{'fuser us':>10}{'torch us':>10}{'ratio':>7}{'TB/s':>7}{'of ceiling':>12}{'error':>9}  configuration"
    )
    rows = []
    for row in measure():
        rows.append(asdict(row))
        wrong = "" if row.error <= TOLERANCE else "  WRONG"
        print(
            f"{row.case:24}{row.M:5}{row.fuser_us:10.1f}{row.torch_us:10.1f}{row.fuser_us / row.torch_us:7.2f}"
            f"{row.bandwidth / 1e12:7.2f}{row.bandwidth / row.ceiling:12.2f}{row.error:9.1e}  {row.config}{wrong}",
            flush=True,
        )
    if asked.json is not None:
        asked.json.write_text(json.dumps(rows, indent=2), encoding="utf-8")


if __name__ == "__main__":
    main()
