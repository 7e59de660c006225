"""Kernel families on a GPU: correct, then how fast; a table of GB/s, of the measured ceiling's share, and of torch's time.

Run as `python -m tests.benchmarks.kernels [--seconds 200] [--only WORD]`. Inputs rotate through more memory than the cache
holds, a run of launches is one CUDA graph, and the median replay counts. Configurations are tried in order while time lasts.
"""

import argparse
import itertools
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as functional
import triton
from torch import Tensor

from fuser.codegen import attention, cache, rotary, rowwise
from fuser.codegen.kernel import Kernel
from fuser.codegen.linear import Linear, Tiling, default_tiling, linear

DEVICE = "cuda"
LAUNCHES = 20  # of one graph
SETS = 300 << 20  # bytes that inputs rotate through: several times any cache
Call = Callable[[int], object]


@dataclass
class Work:
    """One line of the table: `ours` gives kernels with how to call each on set i, `torch_call` what torch does instead."""

    name: str
    moved: int  # bytes read and written at least
    ours: Iterable[tuple[str, Kernel]]
    arguments: Callable[[int], list[object]]
    output: Callable[[int], Tensor]
    torch_call: Call
    expected: Callable[[], Tensor]  # float64, for set 0
    operations: int = 0  # floating-point operations, where they bound


def measured(call: Call, sets: int) -> float:
    """Microseconds of one call: the median replay of a graph of calls on rotating sets."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for i in range(min(sets, 3)):
            call(i)
        stream.synchronize()
        launches = max(LAUNCHES, sets)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for i in range(launches):
                call(i % sets)
        times = []
        for _ in range(12):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record(stream)
            graph.replay()
            end.record(stream)
            end.synchronize()
            times.append(start.elapsed_time(end) * 1000 / launches)
    return statistics.median(times[2:])


def sets_of(size: int) -> int:
    return max(2, min(40, -(-SETS // size)))


def drawn(*shape: int, scale: float = 1.0) -> Tensor:
    return (torch.randn(*shape, device=DEVICE) * scale).bfloat16()


def error(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


def rms(x: Tensor, weight: Tensor) -> Tensor:
    return functional.rms_norm(x, (x.shape[-1],), weight, 1e-5)


def row_work() -> Iterator[Work]:
    D = 4096
    for rows in (1, 64, 512, 4096):
        n = sets_of(rows * D * 8)
        data = [[drawn(rows, D), drawn(rows, D), drawn(D), *(torch.empty(rows, D, device=DEVICE).bfloat16() for _ in "yt")]
                for _ in range(n)]  # fmt: skip
        kernels = [(f"warps {w}", rowwise.norm("rms", D, eps=1e-5, skip=True, num_warps=w)) for w in (4, 8, 16)]

        def by_torch(i: int, data: list[list[Tensor]] = data) -> Tensor:
            x, skip, weight, _, _ = data[i % len(data)]
            return rms(x + skip, weight)

        def expected(data: list[list[Tensor]] = data) -> Tensor:
            return rms((data[0][0] + data[0][1]).double(), data[0][2].double())

        yield Work(f"skip_rms_norm {rows}x{D}", rows * D * 8, kernels, lambda i, d=data: d[i], lambda i, d=data: d[i][3],
                   by_torch, expected)  # fmt: skip
    for rows, F in ((1, 11008), (64, 11008), (4096, 11008)):
        n = sets_of(rows * F * 6)
        gates = [[*drawn(rows, 2 * F).chunk(2, -1), torch.empty(rows, F, device=DEVICE).bfloat16()] for _ in range(n)]
        kernels = [(f"block {b}", rowwise.gate(F, activation="silu", BLOCK=b)) for b in (512, 1024, 2048)]
        yield Work(f"silu gate {rows}x{F}", rows * F * 6, kernels, lambda i, d=gates: d[i], lambda i, d=gates: d[i][2],
                   lambda i, d=gates: functional.silu(d[i][0]) * d[i][1],
                   lambda d=gates: functional.silu(d[0][0].double()) * d[0][1].double())  # fmt: skip


def tilings(what: Linear) -> Iterator[Tiling]:
    yield default_tiling(what)
    if what.tokens == 1:
        for rows, columns, warps in (
            (1, 1024, 4),
            (2, 1024, 4),
            (1, 2048, 4),
            (4, 1024, 4),
            (1, 4096, 8),
            (1, 512, 1),
            (4, 512, 2),
        ):
            yield Tiling(rows, columns, 1, warps, 1)
        return
    for rows, columns, parts, warps, stages in (
        (64, 128, 1, 4, 4), (64, 128, 2, 4, 4), (64, 128, 4, 4, 4), (32, 256, 1, 4, 3), (32, 256, 2, 4, 3),
        (32, 128, 2, 4, 5), (128, 64, 4, 4, 4), (64, 64, 4, 4, 6), (16, 256, 1, 2, 4),
    ):  # fmt: skip
        yield Tiling(rows, columns, parts, warps, stages)


def tuned(what: Linear) -> Iterator[tuple[str, Kernel]]:
    for t in dict.fromkeys(tilings(what)):
        yield f"{t.BLOCK_N}x{t.BLOCK_K} parts {t.splits} warps {t.num_warps} stages {t.num_stages}", linear(what, t)


def linear_work() -> Iterator[Work]:
    shapes = (
        ("norm+qkv 4096x12288", {"N": 12288, "K": 4096, "norm_eps": 1e-5}),
        ("o+residual 4096x4096", {"N": 4096, "K": 4096, "residual": True}),
        ("norm+gate_up+silu 4096x22016", {"N": 22016, "K": 4096, "norm_eps": 1e-5, "activation": "silu"}),
        ("down+residual 11008x4096", {"N": 4096, "K": 11008, "residual": True}),
    )
    for tokens, (name, parts) in itertools.product((1, 16, 64), shapes):
        what = Linear(tokens=tokens, **parts)  # type: ignore[arg-type]
        n = sets_of(what.N * what.K * 2)
        x, scale, residual = drawn(tokens, what.K), drawn(what.K), drawn(tokens, what.width)
        weights = [drawn(what.N, what.K, scale=what.K**-0.5) for _ in range(n)]
        y = torch.empty(tokens, what.width, device=DEVICE).bfloat16()

        def arguments(i: int, w: Linear = what, x: Tensor = x, scale: Tensor = scale, r: Tensor = residual,
                      weights: list[Tensor] = weights, y: Tensor = y) -> list[object]:  # fmt: skip
            given = {"x": x, "norm_weight": scale, "weight": weights[i], "residual": r, "y": y}
            return [given[name] for name in w.tensors]

        def expected(w: Linear = what, x: Tensor = x, scale: Tensor = scale, r: Tensor = residual,
                     weights: list[Tensor] = weights) -> Tensor:  # fmt: skip
            h = x.double()
            h = (rms(h, scale.double()) if w.norm_eps else h) @ weights[0].double().T
            if w.activation:
                gate, up = h.chunk(2, -1)
                h = functional.silu(gate) * up
            return h + r.double() if w.residual else h

        moved = 2 * (what.N * what.K + tokens * (what.K + what.width * (1 + what.residual)))
        yield Work(f"M{tokens} {name}", moved, tuned(what), arguments, lambda i, y=y: y,
                   lambda i, x=x, weights=weights: functional.linear(x, weights[i]), expected)  # fmt: skip


def paged_set(what: attention.Attention, B: int, T: int) -> tuple[Tensor, Tensor, Tensor]:
    blocks = -(-T // what.page)
    table = torch.randperm(B * blocks, device=DEVICE, dtype=torch.int32).reshape(B, blocks)
    shape = (B * blocks, what.page, what.kv_heads, what.head_dim)
    return drawn(*shape), drawn(*shape), table


def contiguous(cached: tuple[Tensor, Tensor, Tensor], T: int) -> tuple[Tensor, Tensor]:
    """Keys and values [B, G, T, D] in memory's order."""
    k, v, table = cached
    return tuple(c[table.long()].flatten(1, 2)[:, :T].transpose(1, 2).contiguous() for c in (k, v))  # type: ignore[return-value]


def decode_work() -> Iterator[Work]:
    for (H, G), B, T, page in (
        ((32, 32), 1, 512, 16), ((32, 32), 64, 512, 16), ((32, 32), 64, 512, 64), ((32, 8), 64, 4096, 16),
        ((32, 8), 1, 4096, 16), ((32, 8), 1, 32768, 16), ((32, 32), 16, 4096, 64),
    ):  # fmt: skip
        what = attention.Attention(H, G, 128, 128**-0.5, page)
        size = 4 * B * T * G * 128
        cached = [paged_set(what, B, T) for _ in range(min(sets_of(size), 20))]
        flat = [contiguous(c, T) for c in cached]
        q, y = drawn(B, H, 128), torch.empty(B, H, 128, device=DEVICE).bfloat16()
        lengths = torch.full((B,), T, dtype=torch.int32, device=DEVICE)
        best = max(1, min(-(-T // 64), -(-132 * 4 // (B * G))))
        counts = sorted(
            {1 << (best.bit_length() - 1), min(2 << (best.bit_length() - 1), -(-T // 64)), max(best // 2, 1)}
        )
        kernels = (
            (
                f"parts {s} step {t} warps {w} stages {n}",
                attention.decode(what, splits=s, BLOCK_T=t, num_warps=w, num_stages=n),
            )
            for (t, w, n), s in itertools.product(
                ((64, 4, 3), (64, 4, 4), (32, 2, 4), (128, 4, 3), (128, 8, 2)), counts
            )
        )

        def by_torch(i: int, q: Tensor = q, flat: list[tuple[Tensor, Tensor]] = flat, H: int = H, G: int = G) -> Tensor:
            return functional.scaled_dot_product_attention(q[:, :, None], *flat[i], enable_gqa=H != G)

        def expected(q: Tensor = q, flat: list[tuple[Tensor, Tensor]] = flat, H: int = H, G: int = G) -> Tensor:
            k, v = (x.double() for x in flat[0])
            rows = q.double().reshape(q.shape[0], G, H // G, 128)
            return ((rows @ k.transpose(-1, -2) * 128**-0.5).softmax(-1) @ v).reshape(q.shape)

        yield Work(f"decode {H}/{G} B{B} x {T} page {page}", size, kernels,
                   lambda i, q=q, c=cached, n=lengths, y=y: [q, *c[i], n, y], lambda i, y=y: y, by_torch, expected)  # fmt: skip
        del cached, flat


def prefill_work() -> Iterator[Work]:
    for B, S in ((1, 4096), (8, 2048)):
        what = attention.Attention(32, 8, 128, 128**-0.5, 16)
        cached = [paged_set(what, B, S) for _ in range(2)]
        flat = [contiguous(c, S) for c in cached]
        q = drawn(B * S, 32, 128)
        y = torch.empty_like(q)
        by_head = q.reshape(B, S, 32, 128).transpose(1, 2).contiguous()
        lengths = torch.full((B,), S, dtype=torch.int32, device=DEVICE)
        starts = torch.arange(B + 1, dtype=torch.int32, device=DEVICE) * S
        kernels = (
            (
                f"rows {m} step {t} warps {w} stages {n}",
                attention.prefill(what, BLOCK_M=m, BLOCK_T=t, num_warps=w, num_stages=n),
            )
            for m, t, w, n in ((64, 64, 4, 2), (128, 64, 8, 2), (128, 64, 4, 3), (128, 128, 8, 2), (64, 64, 4, 3))
        )

        def expected(q: Tensor = by_head, flat: list[tuple[Tensor, Tensor]] = flat, B: int = B, S: int = S) -> Tensor:
            found = []
            for h in range(32):  # a head at a time: scores in float64 are large
                k, v = (x[:1, h // 4].double() for x in flat[0])
                scores = q[:1, h].double() @ k.transpose(-1, -2) * 128**-0.5
                later = torch.ones(S, S, dtype=torch.bool, device=DEVICE).triu(1)
                found.append(scores.masked_fill(later, float("-inf")).softmax(-1) @ v)
            return torch.stack(found, 2)[0]

        yield Work(f"prefill 32/8 {B} x {S}", 4 * q.numel() + 4 * B * S * 8 * 128, kernels,
                   lambda i, c=cached, q=q, n=lengths, s=starts, S=S, y=y: [q, *c[i], n, s, S, y],
                   lambda i, y=y, S=S: y[:S],
                   lambda i, q=by_head, f=flat: functional.scaled_dot_product_attention(q, *f[i], is_causal=True, enable_gqa=True),
                   expected, 2 * B * 32 * S * S * 128)  # fmt: skip


def rotary_work() -> Iterator[Work]:
    H = G = 32
    for tokens in (1, 64, 4096):
        size = 2 * tokens * 3 * H * 128 * 2
        n = sets_of(size)
        qkv = [drawn(tokens, 3 * H * 128) for _ in range(n)]
        turned = torch.empty(tokens, H, 128, device=DEVICE).bfloat16()
        caches = [torch.empty(-(-tokens // 16) + 1, 16, G, 128, device=DEVICE).bfloat16() for _ in "kv"]
        angles = torch.rand(4096, 64, device=DEVICE)
        cos, sin = angles.cos(), angles.sin()
        positions = torch.arange(tokens, dtype=torch.int32, device=DEVICE)
        slots = torch.randperm(tokens, device=DEVICE).int()
        kernels = (
            (f"heads {b} warps {w}", rotary.rotary_cache_write(rotary.Rotary(H, G, 128, 128), BLOCK_H=b, num_warps=w))
            for b, w in ((1, 1), (2, 1), (4, 2), (8, 4), (16, 4))
        )

        def arguments(
            i: int, qkv: list[Tensor] = qkv, rest: tuple[Tensor, ...] = (cos, sin, positions, slots, turned, *caches)
        ) -> list[object]:
            return [*qkv[i].chunk(3, -1), *rest]

        def by_torch(i: int, qkv: list[Tensor] = qkv, tokens: int = tokens, cos: Tensor = cos, sin: Tensor = sin,
                     p: Tensor = positions, s: Tensor = slots, caches: list[Tensor] = caches) -> Tensor:  # fmt: skip
            q, k, v = (x.reshape(tokens, 32, 128) for x in qkv[i].chunk(3, -1))
            c, sn = (t[p.long()][:, None] for t in (cos, sin))

            def turn(x: Tensor) -> Tensor:
                a, b = x.chunk(2, -1)
                return torch.cat([a * c - b * sn, b * c + a * sn], -1)

            caches[0].flatten(0, 1).index_copy_(0, s.long(), turn(k).to(k.dtype))
            caches[1].flatten(0, 1).index_copy_(0, s.long(), v)
            return turn(q)

        def expected(
            qkv: list[Tensor] = qkv, tokens: int = tokens, cos: Tensor = cos, sin: Tensor = sin, p: Tensor = positions
        ) -> Tensor:
            a, b = qkv[0].chunk(3, -1)[0].double().reshape(tokens, 32, 128).chunk(2, -1)
            c, s = (t.double()[p.long()][:, None] for t in (cos, sin))
            return torch.cat([a * c - b * s, b * c + a * s], -1)

        yield Work(f"rotary+cache write {tokens}", size, kernels, arguments, lambda i, t=turned: t, by_torch, expected)


def ceiling() -> float:
    """GB/s of the device's own copy, bytes read and written."""
    pairs = [
        (torch.empty(1 << 28, dtype=torch.uint8, device=DEVICE), torch.empty(1 << 28, dtype=torch.uint8, device=DEVICE))
        for _ in range(2)
    ]
    return 2 * (1 << 28) / measured(lambda i: pairs[i][1].copy_(pairs[i][0]), 2) / 1000


def line(work: Work, sets: int, copy: float, until: float) -> str:
    """One line of the table: the best configuration that is right."""
    reference = work.expected()
    best: tuple[float, str, float] | None = None
    wrong: list[str] = []
    for label, kernel in work.ours:
        if best is not None and time.monotonic() > until:
            break
        try:
            launch = cache.load(kernel).launch
            output = work.output(0)
            output.fill_(float("nan"))
            launch(*work.arguments(0))
            off = error(output, reference)
            if not off < 1e-2:
                wrong.append(f"{label}: relative error {off:.1e}")
                continue
            took = measured(lambda i, launch=launch: launch(*work.arguments(i)), sets)
        except Exception as failure:
            wrong.append(f"{label}: {type(failure).__name__} {str(failure).splitlines()[:1]}")
            torch.cuda.synchronize()
            continue
        if best is None or took < best[0]:
            best = (took, label, off)
    notes = "".join(f"\n    not counted: {reason}" for reason in wrong)
    if best is None:
        return f"{work.name:32} failed{notes}"
    peer = measured(work.torch_call, sets)
    took, label, off = best
    rate = work.moved / took / 1000
    tera = f" {work.operations / took / 1e6:6.0f} TFLOP/s" if work.operations else ""
    return f"{work.name:32} {took:8.1f} {rate:8.0f} {rate / copy:6.0%} {peer:9.1f} {peer / took:6.2f}x {off:8.1e}  {label}{tera}{notes}"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=200.0, help="when to stop trying more configurations")
    parser.add_argument("--only", default="", help="only work whose name holds this")
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    began = time.monotonic()
    copy = ceiling()
    print(
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}, copy {copy:.0f} GB/s, bf16"
    )
    print(f"{'work':32} {'us':>8} {'GB/s':>8} {'copy':>6} {'torch us':>9} {'speed':>7} {'error':>8}  configuration")
    families = (linear_work, decode_work, row_work, rotary_work, prefill_work)
    total = 12 + 7 + 7 + 3 + 2
    done = 0
    for family in families:
        for work in family():
            done += 1
            if options.only in work.name:
                left = options.seconds - (time.monotonic() - began)
                until = time.monotonic() + max(left, 0) / max(total - done + 1, 1) * 1.5
                try:
                    print(line(work, _sets(work), copy, until), flush=True)
                except Exception as failure:
                    print(f"{work.name:32} failed: {type(failure).__name__}: {str(failure)[:200]}", flush=True)
            del work
            torch.cuda.empty_cache()
    print(f"{time.monotonic() - began:.0f} s")


def _sets(work: Work) -> int:
    """How many sets of inputs the work has."""
    count = 1
    while count < 40:
        try:
            work.arguments(count)
        except IndexError:
            break
        count += 1
    return count


if __name__ == "__main__":
    main()
