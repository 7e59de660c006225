"""Every kernel family against the reference of its operator, in Triton's interpreter or on the GPU that is there.

References in float64. Outputs hold NaN before. A kernel's error is relative, by norm. The interpreter truncates where a GPU
rounds to bfloat16, which doubles the error of each rounding: the tolerance is three truncations.
"""

from tests.interpreter import DEVICE  # isort: skip

from itertools import product

import pytest
import torch
from torch import Tensor

from fuser.codegen import attention as paged
from fuser.codegen import cache, linear, rotary
from fuser.codegen import elementwise as rows
from fuser.codegen.kernel import Kernel
from fuser.errors import OutputError, UsageError
from fuser.patterns.attention import attention
from fuser.patterns.gated_mlp import gated_mlp
from fuser.patterns.layer_norm import layer_norm
from fuser.patterns.rms_norm import rms_norm
from fuser.patterns.rotary import rotary as rotary_op

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
TOLERANCE = {"bf16": 1.2e-2, "fp16": 1.5e-3, "fp32": 2e-6}


@pytest.fixture(autouse=True)
def _cache_folder(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSER_CACHE_DIR", str(tmp_path_factory.getbasetemp() / "kernels"))
    torch.manual_seed(0)


def drawn(*shape: int, dtype: str = "bf16", scale: float = 1.0) -> Tensor:
    return (torch.randn(*shape) * scale).to(DTYPES[dtype]).to(DEVICE)


def unwritten(*shape: int, dtype: str = "bf16") -> Tensor:
    return torch.full(shape, float("nan"), dtype=DTYPES[dtype], device=DEVICE)


def launch(kernel: Kernel, *tensors: object, sequences: int = 1) -> None:
    """Launches twice on one workspace, whose floats are NaN: counters are left as they were found."""
    floats, counters = (sequences * n for n in kernel.workspace)
    workspace = [unwritten(floats, dtype="fp32"), torch.zeros(counters, dtype=torch.int32, device=DEVICE)]
    for _ in range(2 if floats else 1):
        cache.load(kernel).launch(*tensors, *workspace[: 2 * bool(floats)])
    assert (workspace[1] == 0).all()


def close(found: Tensor, expected: Tensor, dtype: str) -> None:
    error = (found.double() - expected).norm() / expected.norm()
    assert error < TOLERANCE[dtype], f"relative error {error:.2e}"  # NaN is not below


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("M", "D"), [(1, 64), (3, 33), (5, 416), (2, 1)])
@pytest.mark.parametrize(
    ("kind", "skip", "weight", "bias"),
    [c for c in product(("rms", "layer"), (0, 1), (0, 1), (0, 1)) if c[3] <= (c[0] == "layer" and c[2])],
)
def test_norm(dtype: str, M: int, D: int, kind: str, skip: int, weight: int, bias: int) -> None:
    x, other = drawn(M, D, dtype=dtype) + 2.0, drawn(M, D, dtype=dtype)
    w, b = drawn(D, dtype=dtype), drawn(D, dtype=dtype)
    y, total = unwritten(M, D, dtype=dtype), unwritten(M, D, dtype=dtype)
    what = rows.norm(kind, D, eps=1e-5, dtype=dtype, skip=bool(skip), weight=bool(weight), bias=bool(bias))
    launch(rows.elementwise(what), x, *[other] * skip, *[w] * weight, *[b] * bias, y, *[total] * skip)
    if skip:
        close(total, x.double() + other.double(), dtype)
    normed = (total if skip else x).double()
    ones = torch.ones(D, dtype=torch.float64, device=DEVICE)
    w64 = w.double() if weight else ones
    if kind == "rms":
        expected = rms_norm.reference(normed, w64, eps=1e-5)
    else:
        expected = layer_norm.reference(normed, w64, b.double() if bias else None, eps=1e-5)
    if D == 1 and kind == "layer" and not bias:
        assert (y == 0).all()
    else:
        close(y, expected, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh"])
@pytest.mark.parametrize(("M", "F"), [(1, 64), (3, 1100)])
def test_gate(dtype: str, activation: str, M: int, F: int) -> None:
    packed = drawn(M, 2 * F, dtype=dtype, scale=3.0)
    gate, up = packed.chunk(2, -1)
    y = unwritten(M, F, dtype=dtype)
    launch(rows.elementwise(rows.gate(F, activation=activation, dtype=dtype)), gate, up, y)
    close(y, gated_mlp.reference(gate.double(), up.double(), activation=activation), dtype)


def normed(x: Tensor, kind: str | None, eps: float) -> Tensor:
    """A norm without scale and shift."""
    if kind is None:
        return x
    ones = torch.ones(x.shape[-1], dtype=x.dtype, device=x.device)
    return rms_norm.reference(x, ones, eps=eps) if kind == "rms" else layer_norm.reference(x, ones, None, eps=eps)


def check_linear(what: linear.Linear, tiling: linear.Tiling | None, M: int) -> None:
    dtype = what.dtype
    W = drawn(what.N, what.K, dtype=dtype, scale=what.K**-0.5)
    tensors = {
        "x": drawn(M, what.K, dtype=dtype, scale=3.0) + 1.0,
        "weight": W.T.contiguous() if what.by_input else W,
        "column_sums": W.float().sum(1),
        "bias": drawn(what.N, dtype=dtype),
        "residual": drawn(M, what.width, dtype=dtype),
        "y": unwritten(M, what.width, dtype=dtype),
    }
    expected = normed(tensors["x"].double(), what.norm, what.norm_eps) @ W.double().T
    if what.bias:
        expected = expected + tensors["bias"].double()
    if what.activation:
        gate, up = expected.chunk(2, -1) if what.gated else (expected, torch.ones_like(expected))
        expected = gated_mlp.reference(gate, up, activation=what.activation)
    if what.residual:
        expected = expected + tensors["residual"].double()
    launch(linear.linear(what, tiling), *(tensors[name] for name in what.tensors))
    close(tensors["y"], expected, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 5, 16])
@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("by_input", [False, True])
@pytest.mark.parametrize(
    "parts",
    [
        {},
        {"bias": True},
        {"norm": "rms", "norm_eps": 1e-5, "activation": "silu"},
        {"norm": "layer", "norm_eps": 1e-5, "residual": True, "bias": True},
        {"norm": "layer", "norm_eps": 1e-3, "activation": "gelu_tanh", "bias": True, "residual": True},
        {"activation": "gelu", "gated": False, "bias": True},
    ],
    ids=lambda parts: "+".join(parts) or "plain",
)
def test_linear(dtype: str, tokens: int, splits: int, by_input: bool, parts: dict[str, object]) -> None:
    what = linear.Linear(50, 90, tokens=tokens, dtype=dtype, by_input=by_input, **parts)  # type: ignore[arg-type]
    check_linear(what, linear.Tiling(16, 16 if splits > 1 else 32, splits, num_stages=2), tokens)


@pytest.mark.parametrize("M", [1, 7, 33])
def test_linear_takes_fewer_tokens_than_it_was_made_for(M: int) -> None:
    check_linear(linear.Linear(48, 128, tokens=33, norm="rms", norm_eps=1e-6, residual=True), None, M)


@pytest.mark.parametrize("by_input", [False, True])
@pytest.mark.parametrize("tokens", [1, 2])
def test_linear_by_its_default_tiling(by_input: bool, tokens: int) -> None:
    check_linear(linear.Linear(72, 1280, tokens=tokens, by_input=by_input), None, tokens)


def test_split_sums_repeat_bit_by_bit() -> None:
    what = linear.Linear(40, 256, tokens=4)
    kernel = linear.linear(what, linear.Tiling(16, 32, 4))
    x, W = drawn(4, 256), drawn(40, 256)
    first, second = unwritten(4, 40), unwritten(4, 40)
    launch(kernel, x, W, first)
    launch(kernel, x, W, second)
    assert torch.equal(first, second)


def turned_by(what: rotary.Rotary, x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor) -> Tensor:
    """Rotary embedding in float64: x [tokens, heads, Dh]."""
    if not what.rotary_dim:
        return x.double()
    tables = (table.double()[positions.long()][None, None] for table in (cos, sin))
    rows = x.double().transpose(0, 1)[None]
    found = rotary_op.reference(rows, *tables, rotary_dim=what.rotary_dim, interleaved=what.interleaved)
    return found[0].transpose(0, 1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "splits"), [(1, 1), (1, 2), (4, 1), (4, 3)])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(
    ("H", "G", "D", "rotary_dim", "parts"),
    [
        (4, 2, 32, 32, {}),
        (3, 1, 20, 12, {"norm": "layer", "bias": True}),
        (2, 1, 32, 32, {"norm": "rms", "head_norm_eps": 1e-4}),
        (2, 2, 32, 16, {"norm": "rms", "bias": True, "head_norm_eps": 1e-4}),
        (2, 1, 20, 0, {"norm": "layer", "bias": True}),
    ],
    ids=str,
)
def test_projection_with_rotary_and_cache_write(
    dtype: str,
    tokens: int,
    splits: int,
    interleaved: bool,
    H: int,
    G: int,
    D: int,
    rotary_dim: int,
    parts: dict[str, object],
) -> None:
    page, K = 4, 90
    turning = rotary.Rotary(H, G, D, rotary_dim, page, interleaved, dtype=dtype)
    N = (H + 2 * G) * D
    what = linear.Linear(N, K, tokens=tokens, dtype=dtype, rotary=turning, norm_eps=1e-5, **parts)  # type: ignore[arg-type]
    angles = torch.randn(9, rotary_dim // 2, device=DEVICE)
    integers = {"dtype": torch.int32, "device": DEVICE}
    tensors = {
        "x": drawn(tokens, K, dtype=dtype, scale=3.0),
        "weight": drawn(N, K, dtype=dtype, scale=K**-0.5),
        "bias": drawn(N, dtype=dtype),
        "q_norm_weight": drawn(D, dtype=dtype),
        "k_norm_weight": drawn(D, dtype=dtype),
        "cos": angles.cos(),
        "sin": angles.sin(),
        "positions": torch.tensor([5, 0, 8, 3][:tokens], **integers),
        "slot_mapping": torch.tensor([13, -1, 20, 2][:tokens], **integers),
        "k_cache": unwritten(7, page, G, D, dtype=dtype),
        "v_cache": unwritten(7, page, G, D, dtype=dtype),
        "y": unwritten(tokens, H * D, dtype=dtype),
    }
    tensors["column_sums"] = tensors["weight"].float().sum(1)
    launch(linear.linear(what, linear.Tiling(16, 16, splits)), *(tensors[name] for name in what.tensors))
    product = normed(tensors["x"].double(), what.norm, what.norm_eps) @ tensors["weight"].double().T
    if what.bias:
        product = product + tensors["bias"].double()
    q, k, v = (x.unflatten(-1, (-1, D)) for x in product.split([H * D, G * D, G * D], -1))
    if what.head_norm_eps is not None:
        q, k = (
            normed(x, "rms", what.head_norm_eps) * tensors[f"{name}_norm_weight"].double()
            for x, name in ((q, "q"), (k, "k"))
        )
    where = tensors["cos"], tensors["sin"], tensors["positions"]
    close(tensors["y"], turned_by(turning, q, *where).flatten(1), dtype)
    keys = turned_by(turning, k, *where)
    slots = tensors["slot_mapping"].tolist()
    for cached, held in ((tensors["k_cache"], keys), (tensors["v_cache"], v)):
        for token, slot in enumerate(slots):
            if slot >= 0:
                close(cached.flatten(0, 1)[slot], held[token], dtype)
        others = [i for i in range(7 * page) if i not in slots]
        assert cached.flatten(0, 1)[others].isnan().all()  # nothing else was touched


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("by_block_table", [False, True])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("H", "G", "D", "rotary_dim"), [(6, 2, 64, 64), (3, 3, 80, 32), (5, 1, 20, 12), (2, 1, 20, 0)])
def test_rotary_cache_write(
    dtype: str, by_block_table: bool, interleaved: bool, H: int, G: int, D: int, rotary_dim: int
) -> None:
    page, tokens = 4, 3
    what = rotary.Rotary(H, G, D, rotary_dim, page, interleaved, by_block_table, dtype)
    packed = drawn(tokens, (H + 2 * G) * D, dtype=dtype)
    q, k, v = packed.split([H * D, G * D, G * D], -1)
    angles = torch.randn(9, rotary_dim // 2, device=DEVICE)
    cos, sin = angles.cos(), angles.sin()
    positions = torch.tensor([5, 0, 8], dtype=torch.int32, device=DEVICE)
    table = torch.tensor([[3, 1, 6], [2, 0, 5]], dtype=torch.int32, device=DEVICE)
    sequences = torch.tensor([0, -1, 1], dtype=torch.int32, device=DEVICE)
    slots = torch.tensor([1 * page + 1, -1, 5 * page + 0], dtype=torch.int32, device=DEVICE)
    turned = unwritten(tokens, H, D, dtype=dtype)
    k_cache, v_cache = unwritten(7, page, G, D, dtype=dtype), unwritten(7, page, G, D, dtype=dtype)
    where = [sequences, table] if by_block_table else [slots]
    tables = [cos, sin] if rotary_dim else []
    launch(rotary.rotary_cache_write(what), q, k, v, *tables, positions, *where, turned, k_cache, v_cache)

    close(turned, turned_by(what, q.reshape(tokens, H, D), cos, sin, positions), dtype)
    keys = turned_by(what, k.reshape(tokens, G, D), cos, sin, positions)
    written = torch.zeros(7 * page, dtype=torch.bool, device=DEVICE)
    for token in (0, 2):
        slot = int(slots[token])
        written[slot] = True
        close(k_cache.flatten(0, 1)[slot], keys[token], dtype)
        assert torch.equal(v_cache.flatten(0, 1)[slot].flatten(), v[token])
    for cache_ in (k_cache, v_cache):
        assert cache_.flatten(0, 1)[~written].isnan().all()  # nothing else was touched


def slopes_of(H: int) -> Tensor:
    return torch.tensor([2.0 ** -(1 + h / 2) for h in range(H)], dtype=torch.float32, device=DEVICE)


def sinks_of(H: int) -> Tensor:
    return torch.linspace(-2.0, 5.0, H, device=DEVICE)


def attended(what: paged.Attention, q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """One sequence in float64: q [S, H, D], keys and values [T, G, D]; the queries are its last tokens."""
    S, T = q.shape[0], keys.shape[0]
    distance = torch.arange(T, device=DEVICE)[None] - (torch.arange(S, device=DEVICE)[:, None] + T - S)
    allowed = distance <= 0
    if what.window:
        allowed &= distance > -what.window
    bias = torch.zeros(what.heads, S, T, dtype=torch.float64, device=DEVICE)
    if what.alibi:
        bias = slopes_of(what.heads).double()[:, None, None] * distance.double()
    bias = bias.masked_fill(~allowed, float("-inf"))
    rows = [x.double().transpose(0, 1)[None] for x in (q, keys, values)]
    heads = (what.heads, what.kv_heads)
    y = attention.reference(*rows, bias[None], heads=heads, scale=what.scale, softcap=what.softcap)
    if what.sinks:  # one more key of score sink and value 0: the others share what it leaves
        k = rows[1].repeat_interleave(what.group, 1)
        scores = (rows[0] @ k.transpose(-1, -2) * what.scale + bias)[0]
        sink = sinks_of(what.heads).double()[:, None, None].expand(-1, S, 1)
        y = y * (1.0 - torch.cat([scores, sink], -1).softmax(-1)[..., -1:])[None]
    return y[0].transpose(0, 1)


class Cache:
    """Sequences of given lengths in shuffled pages; what no sequence holds is NaN."""

    def __init__(self, what: paged.Attention, lengths: list[int]) -> None:
        self.lengths = torch.tensor(lengths, dtype=torch.int32, device=DEVICE)
        blocks = [-(-length // what.page) for length in lengths]
        order = torch.randperm(sum(blocks) + 2).tolist()
        shape = (len(order), what.page, what.kv_heads, what.head_dim)
        self.k, self.v = unwritten(*shape, dtype=what.dtype), unwritten(*shape, dtype=what.dtype)
        self.table = torch.full((len(lengths), max(*blocks, 1) + 1), -(10**6), dtype=torch.int32, device=DEVICE)
        self.sequences = []
        for row, length in enumerate(lengths):
            keys, values = (drawn(length, what.kv_heads, what.head_dim, dtype=what.dtype) for _ in range(2))
            self.sequences.append((keys, values))
            for block in range(blocks[row]):
                self.table[row, block] = page = order.pop()
                here = slice(block * what.page, min((block + 1) * what.page, length))
                self.k[page, : here.stop - here.start] = keys[here]
                self.v[page, : here.stop - here.start] = values[here]


EXTRAS = [
    {},
    {"window": 7},
    {"softcap": 2.0},
    {"alibi": True},
    {"sinks": True},
    {"sinks": True, "window": 9},
    {"window": 20, "softcap": 3.0, "alibi": True},
]
HEADS = [(2, 2, 64), (6, 2, 80), (5, 1, 128), (18, 1, 64), (2, 1, 256)]


def attention_of(dtype: str, heads: tuple[int, int, int], page: int, extras: dict[str, object]) -> paged.Attention:
    return paged.Attention(*heads, scale=heads[2] ** -0.5, page=page, dtype=dtype, **extras)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("dtype", "heads"), [(d, h) for d, h in product(DTYPES, HEADS) if d == "bf16" or h == HEADS[1]], ids=str
)
@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("extras", EXTRAS, ids=lambda extras: "+".join(extras) or "plain")
def test_paged_decode(dtype: str, splits: int, heads: tuple[int, int, int], extras: dict[str, object]) -> None:
    what = attention_of(dtype, heads, 16, extras)
    cached = Cache(what, [1, 0, 16, 77])
    q = drawn(4, what.heads, what.head_dim, dtype=dtype, scale=2.0)
    more = [slopes_of(what.heads)] * what.alibi + [sinks_of(what.heads)] * what.sinks
    kernel = paged.decode(what, splits=splits, BLOCK_T=16 if splits > 1 else 32)
    y = unwritten(4, what.heads, what.head_dim, dtype=dtype)
    launch(kernel, q, cached.k, cached.v, cached.table, cached.lengths, *more, y, sequences=4)
    assert (y[1] == 0).all()
    for row in (0, 2, 3):
        close(y[row], attended(what, q[row : row + 1], *cached.sequences[row])[0], dtype)


@pytest.mark.parametrize(
    ("dtype", "heads"), [(d, h) for d, h in product(DTYPES, HEADS[:4]) if d == "bf16" or h == HEADS[1]], ids=str
)
@pytest.mark.parametrize("extras", EXTRAS, ids=lambda extras: "+".join(extras) or "plain")
def test_paged_prefill(dtype: str, heads: tuple[int, int, int], extras: dict[str, object]) -> None:
    """A whole prompt, a chunk after 30 tokens, no token, and one token."""
    what = attention_of(dtype, heads, 8, extras)
    queries, lengths = [13, 19, 0, 1], [13, 49, 5, 24]
    cached = Cache(what, lengths)
    starts = torch.tensor([0, *torch.tensor(queries).cumsum(0).tolist()], dtype=torch.int32, device=DEVICE)
    q = drawn(sum(queries), what.heads, what.head_dim, dtype=dtype, scale=2.0)
    more = [slopes_of(what.heads)] * what.alibi + [sinks_of(what.heads)] * what.sinks
    y = unwritten(*q.shape, dtype=dtype)
    kernel = paged.prefill(what, BLOCK_M=16, BLOCK_T=16)
    given = [q, cached.k, cached.v, cached.table, cached.lengths, starts, max(queries), *more, y]
    launch(kernel, *given)
    for row, (keys, values) in enumerate(cached.sequences):
        here = slice(int(starts[row]), int(starts[row + 1]))
        if queries[row]:
            close(y[here], attended(what, q[here], keys, values), dtype)


def test_what_a_family_does_not_have_is_refused() -> None:
    with pytest.raises(UsageError, match="not fp64"):
        rows.elementwise(rows.norm("rms", 8, eps=1e-5, dtype="fp64"))
    with pytest.raises(UsageError, match="an activation is silu"):
        rows.elementwise(rows.gate(8, activation="relu"))
    with pytest.raises(UsageError, match="1 to 64"):
        linear.linear(linear.Linear(8, 8, tokens=65))
    with pytest.raises(UsageError, match="evenly"):
        paged.decode(paged.Attention(6, 4, 64, 1.0))
    with pytest.raises(UsageError, match="even"):
        rotary.rotary_cache_write(rotary.Rotary(2, 2, 64, 7))
    turning = rotary.Rotary(2, 1, 48, 48)
    with pytest.raises(UsageError, match="192 rows of W, not 200"):
        linear.linear(linear.Linear(200, 8, rotary=turning))
    with pytest.raises(UsageError, match="power of two, not 48"):
        linear.linear(linear.Linear(192, 8, rotary=turning, head_norm_eps=1e-5))
    with pytest.raises(UsageError, match="positive"):
        paged.decode(paged.Attention(4, 4, 64, 0.0))


def test_a_kernel_is_written_once_and_whole(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSER_CACHE_DIR", str(tmp_path))
    kernel = rows.elementwise(rows.norm("rms", 8, eps=1e-5))
    path = cache.write(kernel)
    stamp = path.stat().st_mtime_ns
    assert cache.write(kernel) == path and path.stat().st_mtime_ns == stamp
    assert path.read_text() == kernel.text and [path] == list(path.parent.iterdir())
    path.write_text(kernel.text[:20])  # what a crash of an older writer might have left
    assert cache.write(kernel).read_text() == kernel.text


def test_a_cache_that_cannot_be_written_says_so(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FUSER_CACHE_DIR", str(tmp_path / "file"))
    with pytest.raises(OutputError, match="cannot be written"):
        cache.write(rows.elementwise(rows.norm("rms", 8, eps=1e-5)))
