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
from fuser.codegen import cache, linear, rotary, rowwise
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


def launch(kernel: Kernel, *tensors: object) -> None:
    cache.load(kernel).launch(*tensors)


def close(found: Tensor, expected: Tensor, dtype: str) -> None:
    error = (found.double() - expected).norm() / expected.norm()
    assert error < TOLERANCE[dtype], f"relative error {error:.2e}"  # NaN is not below


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "D"), [(1, 64), (3, 33), (5, 416), (2, 1)])
@pytest.mark.parametrize(
    ("kind", "skip", "weight", "bias"),
    [c for c in product(("rms", "layer"), (0, 1), (0, 1), (0, 1)) if not (c[0] == "rms" and c[3])],
)
def test_norm(dtype: str, rows: int, D: int, kind: str, skip: int, weight: int, bias: int) -> None:
    x, other = drawn(rows, D, dtype=dtype) + 2.0, drawn(rows, D, dtype=dtype)
    w, b = drawn(D, dtype=dtype), drawn(D, dtype=dtype)
    y, total = unwritten(rows, D, dtype=dtype), unwritten(rows, D, dtype=dtype)
    kernel = rowwise.norm(kind, D, eps=1e-5, dtype=dtype, skip=bool(skip), weight=bool(weight), bias=bool(bias))
    launch(kernel, x, *[other] * skip, *[w] * weight, *[b] * bias, y, *[total] * skip)
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
@pytest.mark.parametrize(("rows", "F"), [(1, 64), (3, 1100)])
def test_gate(dtype: str, activation: str, rows: int, F: int) -> None:
    packed = drawn(rows, 2 * F, dtype=dtype, scale=3.0)
    gate, up = packed.chunk(2, -1)
    y = unwritten(rows, F, dtype=dtype)
    launch(rowwise.gate(F, activation=activation, dtype=dtype), gate, up, y)
    close(y, gated_mlp.reference(gate.double(), up.double(), activation=activation), dtype)


def check_linear(what: linear.Linear, tiling: linear.Tiling | None, M: int) -> None:
    dtype = what.dtype
    W = drawn(what.N, what.K, dtype=dtype, scale=what.K**-0.5)
    tensors = {
        "x": drawn(M, what.K, dtype=dtype, scale=3.0),
        "norm_weight": drawn(what.K, dtype=dtype),
        "weight": W.T.contiguous() if what.by_input else W,
        "bias": drawn(what.N, dtype=dtype),
        "residual": drawn(M, what.width, dtype=dtype),
        "y": unwritten(M, what.width, dtype=dtype),
    }
    kernel = linear.linear(what, tiling)
    expected = tensors["x"].double()
    if what.norm_eps is not None:
        scale = tensors["norm_weight"].double() if what.norm_weight else None
        expected = rms_norm.reference(expected, scale, eps=what.norm_eps)
    expected = expected @ W.double().T
    if what.bias:
        expected = expected + tensors["bias"].double()
    if what.activation:
        expected = gated_mlp.reference(*expected.chunk(2, -1), activation=what.activation)
    if what.residual:
        expected = expected + tensors["residual"].double()
    for _ in range(2):  # the second launch finds the scratch of the first
        tensors["y"].fill_(float("nan"))
        launch(kernel, *(tensors[name] for name in what.tensors))
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
        {"norm_eps": 1e-5, "activation": "silu"},
        {"norm_eps": 1e-5, "norm_weight": False, "residual": True, "bias": True},
        {"activation": "gelu_tanh", "bias": True, "residual": True},
    ],
    ids=lambda parts: "+".join(parts) or "plain",
)
def test_linear(dtype: str, tokens: int, splits: int, by_input: bool, parts: dict[str, object]) -> None:
    what = linear.Linear(50, 90, tokens=tokens, dtype=dtype, by_input=by_input, **parts)  # type: ignore[arg-type]
    check_linear(what, linear.Tiling(16, 16 if splits > 1 else 32, splits, num_stages=2), tokens)


@pytest.mark.parametrize("M", [1, 7, 33])
def test_linear_takes_fewer_tokens_than_it_was_made_for(M: int) -> None:
    check_linear(linear.Linear(48, 128, tokens=33, norm_eps=1e-6, residual=True), None, M)


@pytest.mark.parametrize("by_input", [False, True])
@pytest.mark.parametrize("tokens", [1, 2])
def test_linear_by_its_default_tiling(by_input: bool, tokens: int) -> None:
    check_linear(linear.Linear(72, 1280, tokens=tokens, by_input=by_input), None, tokens)


def test_linear_in_float16_normalizes_before_it_scales() -> None:
    """x times the norm's weight is past the largest float16."""
    what = linear.Linear(16, 64, tokens=2, dtype="fp16", norm_eps=1e-5)
    x, scale = drawn(2, 64, dtype="fp16", scale=9000.0), torch.full((64,), 20.0, dtype=torch.float16, device=DEVICE)
    W, y = drawn(16, 64, dtype="fp16", scale=0.1), unwritten(2, 16, dtype="fp16")
    launch(linear.linear(what), x, scale, W, y)
    close(y, rms_norm.reference(x.double(), scale.double(), eps=1e-5) @ W.double().T, "fp16")


def test_split_sums_repeat_bit_by_bit() -> None:
    what = linear.Linear(40, 256, tokens=4)
    kernel = linear.linear(what, linear.Tiling(16, 32, 4))
    x, W = drawn(4, 256), drawn(40, 256)
    first, second = unwritten(4, 40), unwritten(4, 40)
    launch(kernel, x, W, first)
    launch(kernel, x, W, second)
    assert torch.equal(first, second)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("by_block_table", [False, True])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("H", "G", "D", "rotary_dim"), [(6, 2, 64, 64), (3, 3, 80, 32), (5, 1, 20, 12)])
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
    launch(rotary.rotary_cache_write(what), q, k, v, cos, sin, positions, *where, turned, k_cache, v_cache)

    def reference(x: Tensor, heads: int) -> Tensor:
        by_head = x.double().reshape(tokens, heads, D).transpose(0, 1)[None]
        tables = (t.double()[positions.long()][None, None] for t in (cos, sin))
        return rotary_op.reference(by_head, *tables, rotary_dim=rotary_dim, interleaved=interleaved)[0].transpose(0, 1)

    close(turned, reference(q, H), dtype)
    keys = reference(k, G)
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


EXTRAS = [{}, {"window": 7}, {"softcap": 2.0}, {"alibi": True}, {"window": 20, "softcap": 3.0, "alibi": True}]
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
    q, slopes = drawn(4, what.heads, what.head_dim, dtype=dtype, scale=2.0), slopes_of(what.heads)
    kernel = paged.decode(what, splits=splits, BLOCK_T=16 if splits > 1 else 32)
    for _ in range(2):  # the second launch finds the scratch of the first
        y = unwritten(4, what.heads, what.head_dim, dtype=dtype)
        launch(kernel, q, cached.k, cached.v, cached.table, cached.lengths, *[slopes] * what.alibi, y)
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
    q, slopes = drawn(sum(queries), what.heads, what.head_dim, dtype=dtype, scale=2.0), slopes_of(what.heads)
    y = unwritten(*q.shape, dtype=dtype)
    kernel = paged.prefill(what, BLOCK_M=16, BLOCK_T=16)
    given = [q, cached.k, cached.v, cached.table, cached.lengths, starts, max(queries), *[slopes] * what.alibi, y]
    launch(kernel, *given)
    for row, (keys, values) in enumerate(cached.sequences):
        here = slice(int(starts[row]), int(starts[row + 1]))
        if queries[row]:
            close(y[here], attended(what, q[here], keys, values), dtype)


def test_what_a_family_does_not_have_is_refused() -> None:
    with pytest.raises(UsageError, match="not fp64"):
        rowwise.norm("rms", 8, eps=1e-5, dtype="fp64")
    with pytest.raises(UsageError, match="not relu"):
        rowwise.gate(8, activation="relu")
    with pytest.raises(UsageError, match="1 to 64"):
        linear.linear(linear.Linear(8, 8, tokens=65))
    with pytest.raises(UsageError, match="evenly"):
        paged.decode(paged.Attention(6, 4, 64, 1.0))
    with pytest.raises(UsageError, match="even"):
        rotary.rotary_cache_write(rotary.Rotary(2, 2, 64, 7))


def test_a_kernel_is_written_once_and_whole(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSER_CACHE_DIR", str(tmp_path))
    kernel = rowwise.norm("rms", 8, eps=1e-5)
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
        cache.write(rowwise.norm("rms", 8, eps=1e-5))
