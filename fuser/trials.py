"""Kernels tried on a CUDA device: are they right, and how long do they take on inputs that are not in the cache."""

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as functional
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from fuser.codegen import cache
from fuser.codegen.attention import Attention
from fuser.codegen.elementwise import Column, Elementwise
from fuser.codegen.kernel import Kernel
from fuser.codegen.linear import Linear
from fuser.codegen.matmul import Matmul
from fuser.codegen.quantized import sides_of
from fuser.codegen.rotary import Rotary
from fuser.quantized import Codes, quantize_activations
from fuser.runtime.kv_groups import dequantized, quantized
from fuser.runtime.packing import packed

SETS_BYTES = 300 << 20  # that inputs rotate through: several times any cache
MOST_SETS = 40
BF16_SETS = 8  # of a weight that a kernel reads as codes, for others
DRAWN = True  # whether inputs hold random numbers; to compile a kernel they need not
LAUNCHES = 20  # of one graph, at least
REPLAYS = 12  # of which the first two do not count
UNWRITTEN = -128  # no code of int8
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

Call = Callable[[int], object]


def measured(call: Call, sets: int) -> float:
    """Microseconds of one call: the median replay of a CUDA graph of calls on rotating sets of inputs."""
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
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
        for _ in range(REPLAYS):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            start.record(stream)
            graph.replay()
            end.record(stream)
            end.synchronize()
            times.append(start.elapsed_time(end) * 1000 / launches)
    return float(statistics.median(times[2:]))


def copy_rate() -> float:
    """GB/s of the device's own copy, bytes read and written: the ceiling of what streams."""
    size = 1 << 28
    held = [torch.empty(size, dtype=torch.uint8, device="cuda") for _ in range(4)]
    return 2 * size / measured(lambda i: held[2 * i + 1].copy_(held[2 * i]), 2) / 1000


def product_rate() -> float:
    """TFLOP/s of torch's product of two bfloat16 matrices of 8192: the ceiling of what multiplies."""
    a, b = (torch.randn(8192, 8192, device="cuda").bfloat16() for _ in "ab")
    return 2 * 8192**3 / measured(lambda i: a @ b, 1) / 1e6


@dataclass
class Trial:
    """A kernel's work: `sets` of arguments, of which `results` (of set 0) are to be what `expected` says."""

    what: Any
    moved_bytes: int  # read and written at least
    operations: int
    sets: list[list[Any]]
    results: list[Tensor]
    expected: Callable[[], list[Tensor]]  # float64
    peers: Mapping[str, Call]  # torch's ways to do the same, by name
    sequences: int = 1  # that a kernel's workspace is for
    known: list[Tensor] = field(default_factory=list)  # what was expected, once computed

    def call(self, kernel: Kernel, *, pdl: bool = False, weight: int | None = None) -> Callable[..., object]:
        """A kernel's launch on set i; with `weight`, on the tensor that is given in that argument's place."""
        launch = cache.load(kernel).launch
        floats, counters = (self.sequences * n for n in kernel.workspace)
        scratch = []
        if floats:
            scratch = [torch.empty(floats, device="cuda"), torch.zeros(counters, dtype=torch.int32, device="cuda")]
        options = {"pdl": True} if pdl else {}
        if weight is None:
            return lambda i: launch(*self.sets[i], *scratch, **options)
        before, after = self.sets[0][:weight], self.sets[0][weight + 1 :]
        return lambda i, other: launch(*before, other, *after, *scratch, **options)

    def error(self, kernel: Kernel) -> float:
        """The largest relative error of a kernel's results; infinite where any is not written."""
        for result in self.results:
            result.fill_(float("nan") if result.is_floating_point() else UNWRITTEN)
        self.call(kernel)(0)
        worst = 0.0
        if not self.known:
            self.known = self.expected()
        for found, expected in zip(self.results, self.known, strict=True):
            off = float((found.double().reshape(expected.shape) - expected).norm() / expected.norm())
            worst = max(worst, off if off == off else float("inf"))
        return worst

    def took(self, kernel: Kernel) -> float:
        """Microseconds of a launch."""
        return measured(self.call(kernel), len(self.sets))


def _count(size: int) -> int:
    return max(min(2, MOST_SETS), min(MOST_SETS, -(-SETS_BYTES // max(size, 1))))


class _Drawn:
    """Random tensors of a dtype."""

    def __init__(self, dtype: str) -> None:
        self.dtype = DTYPES[dtype]
        self.size = torch.empty((), dtype=self.dtype).element_size()

    def __call__(self, *shape: int, scale: float = 1.0) -> Tensor:
        if not DRAWN:
            return self.empty(*shape)
        return (torch.randn(*shape, device="cuda") * scale).to(self.dtype)

    def empty(self, *shape: int) -> Tensor:
        return torch.empty(*shape, dtype=self.dtype, device="cuda")


def linear_trial(what: Linear, sets: int | None = None) -> Trial:
    """A product: beside cuBLAS's product alone, and torch.compile of all of it but rotary embedding and cache write."""
    drawn, M = _Drawn(what.dtype), what.tokens
    shared: dict[str, Any] = {
        "x": drawn(M, what.K),
        "bias": drawn(what.N),
        "residual": drawn(M, what.width),
        "y": drawn.empty(M, what.width),
    }
    if what.rotary is not None:
        shared |= _rotary_tensors(what.rotary, M, drawn)
        shared |= {f"{name}_norm_weight": drawn(what.rotary.head_dim) for name in "qk"}
    moved = drawn.size * M * (what.K + what.width * (1 + what.residual))
    made: list[list[Any]] = []
    weights: list[Tensor] = []
    exact: Tensor | None = None  # where it is not of the kernel's type
    x_whole = shared["x"]
    if what.rounds and what.format is not None:
        shared["x"], scales = quantize_activations(x_whole, what.format.kind)
        shared["x_scales"] = scales[:, 0].contiguous()
        x_whole = (shared["x"].float() * scales).to(x_whole.dtype)
    if what.format is not None:
        given, whole_weight = _codes(what)
        size = sum(x.numel() * x.element_size() for x in given.values())
        made = [
            [(shared | {name: x.clone() for name, x in given.items()})[name] for name in what.tensors]
            for _ in range(sets or _count(size))
        ]
        exact, moved = whole_weight, moved + size
        weights = [whole_weight.to(DTYPES[what.dtype]) for _ in range(min(len(made), BF16_SETS))]
    else:
        moved += drawn.size * what.N * what.K
    for _ in range(0 if made else sets or _count(what.N * what.K * drawn.size)):
        weights.append(drawn(what.N, what.K, scale=what.K**-0.5))
        own = {"weight": weights[-1].T.contiguous() if what.by_input else weights[-1]}
        if what.norm == "layer":
            own["column_sums"] = weights[-1].float().sum(1)
        made.append([(shared | own)[name] for name in what.tensors])

    def whole(x: Tensor, weight: Tensor) -> Tensor:
        h = x
        if what.norm == "rms":
            h = functional.rms_norm(x, (what.K,), eps=what.norm_eps)
        elif what.norm == "layer":
            h = functional.layer_norm(x, (what.K,), eps=what.norm_eps)
        return _finished(what, functional.linear(h, weight), shared, gated=what.pairs)

    def expected() -> list[Tensor]:
        x = x_whole if not what.rounds else shared["x"].double() * shared["x_scales"].double()[:, None]
        h = whole(x.double(), (weights[0] if exact is None else exact).double())
        if what.rotary is None:
            return [h]
        heads = what.rotary.heads, what.rotary.kv_heads, what.rotary.kv_heads
        D = what.rotary.head_dim
        q, k, v = (x.reshape(M, -1, D) for x in torch.split(h, [n * D for n in heads], -1))
        if what.head_norm_eps is not None:
            q, k = (
                functional.rms_norm(x, (D,), shared[f"{name}_norm_weight"].double(), what.head_norm_eps)
                for x, name in ((q, "q"), (k, "k"))
            )
        kept = _kept(what.rotary, _turned(what.rotary, k, shared), v, shared)
        return [_turned(what.rotary, q, shared).flatten(1), *kept]

    compiled = torch.compile(whole)
    peers: dict[str, Call] = {
        "torch": lambda i: functional.linear(x_whole, weights[i % len(weights)]),
        "compiled": lambda i: compiled(x_whole, weights[i % len(weights)]),
    }
    results = [shared["y"]] + (_written(what.rotary, shared, M) if what.rotary is not None else [])
    return Trial(what, moved, 2 * M * what.N * what.K, made, results, expected, peers)


def _codes(what: Linear) -> tuple[dict[str, Tensor], Tensor]:
    """The tensors of a weight of codes, and the weight they stand for."""
    assert what.format is not None
    codes = Codes.of(torch.randn(what.N, what.K, device="cuda") * what.K**-0.5, what.format)
    if what.rounds:
        return {"weight": codes.numbers, "scales": codes.scales[:, 0].float()}, codes.weight
    sides = torch.tensor(sides_of(what), device="cuda")
    words, scales, zeros = packed(codes, sides, DTYPES[what.dtype])
    made = {"weight": words, "scales": scales}
    if zeros is not None:
        made["zeros"] = zeros
    return made, codes.weight


def _written(what: Rotary, given: Mapping[str, Tensor], tokens: int) -> list[Tensor]:
    """The slots of the cache that a step's tokens go to, the first ones, and the scales of those in the first page."""
    scales = [given[name][0, ..., :tokens] for name in what.caches[2:]]
    return [given[name].flatten(0, 1)[:tokens] for name in what.caches[:2]] + scales


def _kept(what: Rotary, k: Tensor, v: Tensor, given: Mapping[str, Tensor]) -> list[Tensor]:
    """What these slots are to hold of turned keys and of values [tokens, G, Dh]."""
    slots = given["slot_mapping"].long().argsort()
    if not what.kv_group:
        return [k[slots], v[slots]]
    codes, scales = zip(*(quantized(x[slots], what.kv_group) for x in (k, v)), strict=True)
    return [x.double() for x in (*codes, *(scale[: what.page].permute(1, 2, 0) for scale in scales))]


def _finished(what: Linear | Matmul, h: Tensor, given: Mapping[str, Tensor], *, gated: bool) -> Tensor:
    """What follows a product: bias, activation and gate, residual, in the product's type."""
    h = h + given["bias"].to(h.dtype) if what.bias else h
    if gated:
        gate, up = h.chunk(2, -1)
        h = _activated(what.activation, gate) * up
    elif what.activation:
        h = _activated(what.activation, h)
    return h + given["residual"].to(h.dtype) if what.residual else h


def _activated(name: str | None, x: Tensor) -> Tensor:
    if name == "silu":
        return functional.silu(x)
    return functional.gelu(x, approximate="tanh" if name == "gelu_tanh" else "none")


def _rotary_tensors(what: Rotary, tokens: int, drawn: _Drawn) -> dict[str, Any]:
    """Tables, places and a cache for a step's tokens."""
    angles = torch.rand(8192, max(what.rotary_dim // 2, 1), device="cuda")
    pages = -(-tokens // what.page) + 1
    cached = (pages, what.page, what.kv_heads, what.head_dim)
    made: dict[str, Any] = {
        "cos": angles.cos(),
        "sin": angles.sin(),
        "positions": torch.arange(tokens, dtype=torch.int32, device="cuda"),
        "slot_mapping": torch.randperm(tokens, device="cuda").int(),
    }
    if not what.kv_group:
        return made | {name: drawn.empty(*cached) for name in what.caches}
    groups = pages, what.kv_heads, what.head_dim // what.kv_group, what.page
    made |= {name: torch.empty(cached, dtype=torch.int8, device="cuda") for name in what.caches[:2]}
    return made | {name: torch.empty(groups, dtype=torch.float16, device="cuda") for name in what.caches[2:]}


def _turned(what: Rotary, x: Tensor, given: Mapping[str, Tensor]) -> Tensor:
    """Rotary embedding of x [tokens, heads, Dh], in its own type."""
    R = what.rotary_dim // 2
    cos, sin = (given[name][given["positions"].long()][:, None].to(x.dtype) for name in ("cos", "sin"))
    part, rest = x[..., : 2 * R], x[..., 2 * R :]
    a, b = (part[..., ::2], part[..., 1::2]) if what.interleaved else torch.split(part, R, -1)
    c, d = a * cos - b * sin, b * cos + a * sin
    joined = torch.stack([c, d], -1).flatten(-2) if what.interleaved else torch.cat([c, d], -1)
    return torch.cat([joined, rest], -1)


def rotary_trial(what: Rotary, tokens: int) -> Trial:
    """Rotary embedding and cache write, beside torch's operators for them, which write what is of the kernel's type."""
    drawn, H, G, D = _Drawn(what.dtype), what.heads, what.kv_heads, what.head_dim
    width = (H + 2 * G) * D
    shared = _rotary_tensors(what, tokens, drawn) | {"turned": drawn.empty(tokens, H, D)}
    plain = _rotary_tensors(replace(what, kv_group=0), tokens, drawn)
    packed = [drawn(tokens, width) for _ in range(_count(2 * tokens * width * drawn.size))]
    sets = []
    for rows in packed:
        parts = dict(zip("qkv", torch.split(rows, [H * D, G * D, G * D], -1), strict=True))
        sets.append([(shared | parts)[name] for name in what.tensors])

    def by_torch(rows: Tensor) -> Tensor:
        q, k, v = (x.reshape(tokens, -1, D) for x in torch.split(rows, [H * D, G * D, G * D], -1))
        slots = shared["slot_mapping"].long()
        plain["k_cache"].flatten(0, 1).index_copy_(0, slots, _turned(what, k, shared))
        plain["v_cache"].flatten(0, 1).index_copy_(0, slots, v)
        return _turned(what, q, shared)

    def expected() -> list[Tensor]:
        q, k, v = (x.double().reshape(tokens, -1, D) for x in torch.split(packed[0], [H * D, G * D, G * D], -1))
        return [_turned(what, q, shared), *_kept(what, _turned(what, k, shared), v, shared)]

    compiled = torch.compile(by_torch)
    peers: dict[str, Call] = {"torch": lambda i: by_torch(packed[i]), "compiled": lambda i: compiled(packed[i])}
    results = [shared["turned"], *_written(what, shared, tokens)]
    moved = tokens * width * drawn.size + tokens * (H * D * drawn.size + 2 * G * _row_bytes(what))
    return Trial(what, moved, 0, sets, results, expected, peers)


def _row_bytes(what: Rotary | Attention) -> int:
    """Bytes of a head's keys, or values, of one token in the cache."""
    if what.kv_group:
        return what.head_dim + 2 * (what.head_dim // what.kv_group)
    return what.head_dim * DTYPES[what.dtype].itemsize


def quantized_pages(pages: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """Pages [n, page, G, Dh] as codes, and scales [n, G, Dh / group, page]; the pages become what these stand for."""
    codes = torch.empty_like(pages, dtype=torch.int8)
    n, page, G, D = pages.shape
    scales = torch.empty(n, G, D // group, page, dtype=torch.float16, device=pages.device)
    for start in range(0, n, 4096):  # in float32 they are large
        some = slice(start, start + 4096)
        codes[some], made = quantized(pages[some], group)
        scales[some] = made.permute(0, 2, 3, 1)
        pages[some] = dequantized(codes[some], scales[some]).to(pages.dtype)
    return codes, scales


def rows_trial(what: Elementwise, rows: int, by_torch: Callable[..., Sequence[Tensor]]) -> Trial:
    """A chain, beside `by_torch`, which gives its outputs for its inputs."""
    drawn, width = _Drawn(what.dtype), what.groups * what.D
    count = sum(not isinstance(kind, Column) for kind in what.inputs) + len(what.outputs)
    made = [drawn.empty(rows, width) for _ in what.outputs]
    sets = [
        [*(drawn(what.D) if isinstance(kind, Column) else drawn(rows, width) for kind in what.inputs), *made]
        for _ in range(_count(rows * width * drawn.size * count))
    ]
    inputs = len(what.inputs)
    compiled = torch.compile(by_torch)
    peers: dict[str, Call] = {
        "torch": lambda i: by_torch(*sets[i][:inputs]),
        "compiled": lambda i: compiled(*sets[i][:inputs]),
    }
    return Trial(
        what, rows * width * drawn.size * count, 0, sets, made,
        lambda: list(by_torch(*(x.double() for x in sets[0][:inputs]))), peers,
    )  # fmt: skip


def matmul_trial(what: Matmul, tokens: int) -> Trial:
    """A product of many tokens, beside cuBLAS's product alone and torch.compile of all of it."""
    drawn = _Drawn(what.dtype)
    shared = {
        "x": drawn(tokens, what.K),
        "bias": drawn(what.N),
        "residual": drawn(tokens, what.width),
        "y": drawn.empty(tokens, what.width),
    }
    weights = [drawn(what.N, what.K, scale=what.K**-0.5) for _ in range(2)]
    sets = [[(shared | {"weight": weight})[name] for name in what.tensors] for weight in weights]

    def whole(x: Tensor, weight: Tensor) -> Tensor:
        return _finished(what, functional.linear(x, weight), shared, gated=what.gated)

    compiled = torch.compile(whole)
    peers: dict[str, Call] = {
        "torch": lambda i: functional.linear(shared["x"], weights[i]),
        "compiled": lambda i: compiled(shared["x"], weights[i]),
    }
    moved = drawn.size * (what.N * what.K + tokens * (what.K + what.width * (1 + what.residual)))
    return Trial(
        what, moved, 2 * tokens * what.N * what.K, sets, [shared["y"]],
        lambda: [whole(shared["x"].double(), weights[0].double())], peers,
    )  # fmt: skip


def attention_trial(what: Attention, sequences: int, tokens: int, *, decode: bool) -> Trial:
    """Paged attention of sequences of `tokens` keys, one query each or all of them, beside SDPA on contiguous memory."""
    drawn, H, G, D = _Drawn(what.dtype), what.heads, what.kv_heads, what.head_dim
    queries = 1 if decode else tokens
    blocks = -(-tokens // what.page)
    size = 2 * sequences * tokens * G * _row_bytes(what)
    q = drawn(sequences * queries, H, D)
    y = torch.empty_like(q)
    integers: dict[str, Any] = {"dtype": torch.int32, "device": "cuda"}
    more: list[Any] = [torch.full((sequences,), tokens, **integers)]
    if not decode:
        more += [torch.arange(sequences + 1, **integers) * queries, queries]
    if what.alibi:
        more.append(torch.rand(H, device="cuda"))
    if what.sinks:
        more.append(torch.randn(H, device="cuda"))
    sets, flat = [], []
    for _ in range(min(_count(size), 20) if decode else 2):
        table = torch.randperm(sequences * blocks, device="cuda").int().reshape(sequences, blocks)
        caches = [drawn(sequences * blocks, what.page, G, D) for _ in "kv"]
        stored = caches
        if what.kv_group:
            codes, scales = zip(*(quantized_pages(cache, what.kv_group) for cache in caches), strict=True)
            stored = [*codes, *scales]
        sets.append([q, *stored, table, *more, y])
        flat.append([c[table.long()].flatten(1, 2)[:, :tokens].transpose(1, 2).contiguous() for c in caches])
    rows = q.reshape(sequences, queries, H, D).transpose(1, 2).contiguous()

    def expected() -> list[Tensor]:
        """A head at a time: scores in float64 are large."""
        found = torch.empty(sequences, queries, H, D, dtype=torch.float64, device="cuda")
        later = torch.ones(queries, tokens, dtype=torch.bool, device="cuda").triu(tokens - queries + 1)
        for b in range(sequences):
            for h in range(H):
                k, v = (x[b, h // what.group].double() for x in flat[0])
                scores = rows[b, h].double() @ k.T * what.scale
                found[b, :, h] = scores.masked_fill(later, float("-inf")).softmax(-1) @ v
        return [found.reshape(q.shape)]

    def sdpa(backend: SDPBackend) -> Call:
        def call(i: int) -> Tensor:
            with sdpa_kernel(backend):
                k, v = flat[i]
                return functional.scaled_dot_product_attention(
                    rows, k, v, is_causal=not decode, enable_gqa=H != G, scale=what.scale
                )

        return call

    peers = {
        f"sdpa {b.name.split('_')[0].lower()}": sdpa(b)
        for b in (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION)
    }
    pairs = sequences * (tokens if decode else tokens * (tokens + 1) // 2)
    moved = size + 2 * q.numel() * drawn.size
    return Trial(what, moved, 4 * pairs * H * D, sets, [y], expected, peers, sequences if decode else 1)


def best_peer(trial: Trial, names: Iterable[str]) -> tuple[float, str]:
    """The fastest of some ways of torch that work: microseconds, name."""
    found = []
    for name in names:
        try:
            found.append((measured(trial.peers[name], len(trial.sets)), name))
        except Exception:  # a backend that does not take these shapes
            torch.cuda.synchronize()
    return min(found, default=(float("nan"), "none"))
