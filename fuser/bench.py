"""`fuse bench`: emitted kernels beside torch's on this GPU, in one run, with the share of the ceilings it measures first.

Inputs rotate through more memory than the cache holds; launches are one CUDA graph; medians of its replays. Kernels are those
that tuning chose, or the defaults. torch is cuBLAS's product alone, SDPA's fastest backend, or eager operators; compiled is
torch.compile of all the work of the launch but the cache.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as functional
import triton
from torch import Tensor

from fuser.codegen.attention import Attention
from fuser.codegen.elementwise import gate, norm
from fuser.codegen.kernel import Kernel
from fuser.codegen.matmul import Matmul, matmul
from fuser.codegen.rotary import Rotary
from fuser.codegen.shapes import SHAPES
from fuser.codegen.tuning import Problem, Table, table_of
from fuser.formats import format_of
from fuser.trials import (
    Trial,
    attention_trial,
    best_peer,
    copy_rate,
    linear_trial,
    matmul_trial,
    measured,
    product_rate,
    rotary_trial,
    rows_trial,
)

HEADER = (
    f"{'work':34} {'us':>8} {'GB/s':>6} {'TF/s':>6} {'ceiling':>8} {'torch us':>9} {'compiled':>9} {'speed':>7} "
    f"{'error':>8}  configuration"
)
LAYERS = 32
FORMATS = ("int4", "nf4", "int8", "w8a8")
DECODE = (
    ((32, 32), 1, 512, 16), ((32, 32), 64, 512, 16), ((32, 32), 64, 512, 64), ((32, 8), 64, 4096, 16),
    ((32, 8), 1, 4096, 16), ((32, 8), 1, 32768, 16), ((32, 32), 16, 4096, 16),
)  # fmt: skip
DECODE_INT8 = (*(work for work in DECODE if work[3] == 16), ((32, 32), 64, 4096, 16))


@dataclass
class Work:
    """One line of the table."""

    name: str
    trial: Trial
    kernel: Kernel
    chosen: str
    peers: tuple[str, ...] = ("torch",)


def works(table: Table) -> Iterator[Work]:
    """What is measured; inputs are made as each comes."""

    def chosen(name: str, problem: Problem, trial: Trial, *peers: str) -> Work:
        choice = table.chosen(problem)
        given = choice or problem.default
        told = " ".join(f"{k.removeprefix('num_')} {v}" for k, v in given.items()) or "default"
        return Work(name, trial, problem.kernel(choice), told + ("" if choice else " (not tuned)"), peers or ("torch",))

    for tokens in (1, 16, 64):
        for name, what in SHAPES["llama-2-7b"].linears(tokens):
            yield chosen(f"M{tokens} {name} {what.K}x{what.N}", Problem(what), linear_trial(what))
    for format in map(format_of, FORMATS):
        for tokens in (1, 16, 64):
            for name, what in SHAPES["llama-2-7b"].linears(tokens, format=format):
                yield chosen(f"M{tokens} {format} {name} {what.K}x{what.N}", Problem(what), linear_trial(what))
    for (H, G), B, T, page in DECODE:
        attend = Attention(H, G, 128, 128**-0.5, page)
        trial = attention_trial(attend, B, T, decode=True)
        yield chosen(f"decode {H}/{G} B{B} x {T} page {page}", Problem(attend, B, T), trial, *trial.peers)
    for group in (64, 128):
        for (H, G), B, T, page in DECODE_INT8:
            attend = Attention(H, G, 128, 128**-0.5, page, kv_group=group)
            trial = attention_trial(attend, B, T, decode=True)
            yield chosen(
                f"decode int8:{group} {H}/{G} B{B} x {T} page {page}", Problem(attend, B, T), trial, *trial.peers
            )
    for rows in (1, 64, 512, 4096):
        skip = norm("rms", 4096, eps=1e-5, skip=True)
        yield chosen(f"skip_rms_norm {rows}x4096", Problem(skip), rows_trial(skip, rows, _skip_norm))
    for rows in (1, 64, 4096):
        gated = gate(11008, activation="silu")
        yield chosen(f"silu gate {rows}x11008", Problem(gated), rows_trial(gated, rows, _silu_gate))
    for tokens in (1, 64, 4096):
        for group in (0, 64):
            turning = Rotary(32, 32, 128, 128, kv_group=group)
            name = f"rotary+cache write {tokens}{f' int8:{group}' if group else ''}"
            yield chosen(name, Problem(turning), rotary_trial(turning, tokens))
    for B, S in ((1, 4096), (8, 2048)):
        attend = Attention(32, 8, 128, 128**-0.5, 16)
        trial = attention_trial(attend, B, S, decode=False)
        yield chosen(f"prefill 32/8 {B} x {S}", Problem(attend, B, S, decode=False), trial, *trial.peers)
    for name, large in (
        ("qkv 4096x12288", Matmul(12288, 4096)),
        ("gate_up+silu 4096x22016", Matmul(22016, 4096, activation="silu", gated=True)),
        ("down+residual 11008x4096", Matmul(4096, 11008, residual=True)),
    ):
        yield Work(f"M4096 {name}", matmul_trial(large, 4096), matmul(large), "default")


def _skip_norm(x: Tensor, skip: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    total = x + skip
    return functional.rms_norm(total, (x.shape[-1],), weight, 1e-5), total


def _silu_gate(gate: Tensor, up: Tensor) -> tuple[Tensor]:
    return (functional.silu(gate) * up,)


def line(work: Work, copy: float, product: float, *, compiled: bool) -> str:
    """A line of the table; a kernel that is wrong says so in place of a time."""
    trial = work.trial
    error = trial.error(work.kernel)
    if not error < 2e-2:
        return f"{work.name:34} wrong: relative error {error:.1e}  {work.chosen}"
    took = trial.took(work.kernel)
    peer, _ = best_peer(trial, work.peers)
    whole = best_peer(trial, ["compiled"])[0] if compiled and "compiled" in trial.peers else float("nan")
    rate, tera = trial.moved_bytes / took / 1000, trial.operations / took / 1e6
    share = max(rate / copy, tera / product)
    other = f"{whole:9.1f}" if whole == whole else f"{'':9}"
    return (
        f"{work.name:34} {took:8.1f} {rate:6.0f} {tera:6.0f} {share:8.0%} {peer:9.1f} {other} {peer / took:6.2f}x "
        f"{error:8.1e}  {work.chosen}"
    )


def chain(table: Table, tokens: int, dtype: str = "bf16") -> tuple[float, float, float]:
    """Milliseconds of the four products of 32 layers in one graph: one after another, overlapped, and by cuBLAS alone."""
    calls: list[tuple[Any, ...]] = []
    for _, what in SHAPES["llama-2-7b"].linears(tokens, dtype):
        problem = Problem(what)
        calls.append((what, linear_trial(what, sets=1), problem.kernel(table.chosen(problem))))
    weights = [
        [torch.randn(what.N, what.K, device="cuda").mul_(what.K**-0.5).to(trial.results[0].dtype) for what, trial, _ in calls]
        for _ in range(LAYERS)
    ]  # fmt: skip

    def launches(pdl: bool) -> Any:
        made = [trial.call(kernel, pdl=pdl, weight=what.tensors.index("weight")) for what, trial, kernel in calls]

        def layer(i: int) -> None:
            for call, weight in zip(made, weights[i], strict=True):
                call(0, weight)

        return layer

    inputs = [trial.sets[0][0] for _, trial, _ in calls]

    def by_torch(i: int) -> None:
        for x, weight in zip(inputs, weights[i], strict=True):
            functional.linear(x, weight)

    plain, overlapped, torch_us = (
        measured(each, LAYERS) for each in (launches(False), launches(True), by_torch)
    )  # fmt: skip
    return plain * LAYERS / 1000, overlapped * LAYERS / 1000, torch_us * LAYERS / 1000


def main(only: str = "", *, compiled: bool = True) -> None:
    """Prints the table, a line as it is measured; `only`: works whose name holds this."""
    say = partial(print, flush=True)
    torch.manual_seed(0)
    gpu = torch.cuda.get_device_name()
    table = table_of(gpu)
    copy, product = copy_rate(), product_rate()
    versions = f"torch {torch.__version__}, triton {triton.__version__}"
    say(f"{gpu}, {versions}, bf16; ceilings: copy {copy:.0f} GB/s, product {product:.0f} TFLOP/s")
    say(HEADER)
    for work in works(table):
        if only in work.name:
            try:
                say(line(work, copy, product, compiled=compiled))
            except Exception as failure:  # one kernel that fails takes no others with it
                say(f"{work.name:34} failed: {type(failure).__name__}: {str(failure)[:200]}")
                torch.cuda.synchronize()
        del work
        torch.cuda.empty_cache()
    for tokens in (1, 16, 64):
        if only in "chain":
            plain, overlapped, torch_ms = chain(table, tokens)
            size = LAYERS * sum(2 * what.N * what.K for _, what in SHAPES["llama-2-7b"].linears(tokens))
            say(
                f"chain M{tokens}: four products, {LAYERS} layers, {size / 1e9:.2f} GB: {plain:.3f} ms, overlapped "
                f"{overlapped:.3f} ms ({size / overlapped / 1e6:.0f} GB/s, {size / overlapped / 1e6 / copy:.0%} of the copy), "
                f"cuBLAS alone {torch_ms:.3f} ms ({torch_ms / overlapped:.2f}x)"
            )
            torch.cuda.empty_cache()
