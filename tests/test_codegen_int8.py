"""Keys and values as int8: written by kernels as by torch's definition, and read as what the codes stand for, in float64."""

from tests.interpreter import DEVICE  # isort: skip

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fuser.codegen import attention as paged
from fuser.codegen import linear, rotary
from fuser.codegen.kv_groups import group_of
from fuser.errors import UsageError
from fuser.runtime.kv_groups import dequantized, quantized
from tests.test_codegen_kernels import (
    Cache,
    attended,
    attention_of,
    close,
    drawn,
    launch,
    sinks_of,
    slopes_of,
    turned_by,
    unwritten,
)

PAGE = 4
UNWRITTEN = -128  # no code
INTEGERS: dict[str, Any] = {"dtype": torch.int32, "device": DEVICE}


@pytest.fixture(autouse=True)
def _cache_folder(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSER_CACHE_DIR", str(tmp_path_factory.getbasetemp() / "kernels"))
    torch.manual_seed(0)


def pages_of(what: rotary.Rotary, count: int = 7) -> dict[str, Tensor]:
    """Pages that nothing was written to."""
    shape = count, what.page, what.kv_heads, what.head_dim
    groups = count, what.kv_heads, what.head_dim // what.kv_group, what.page
    made = {name: torch.full(shape, UNWRITTEN, dtype=torch.int8, device=DEVICE) for name in ("k_cache", "v_cache")}
    return made | {name: unwritten(*groups, dtype="fp16") for name in ("k_scale", "v_scale")}


def check_rows(
    what: rotary.Rotary, found: dict[str, Tensor], slots: list[int], k: Tensor, v: Tensor, exact: bool
) -> None:
    """Whether the slots hold keys and values [tokens, G, Dh], and nothing else was touched.

    Not `exact`, what is between two codes, or two scales, may fall to either side.
    """
    for name, rows in (("k", k), ("v", v)):
        codes, scales = quantized(rows, what.kv_group)
        cached = found[f"{name}_cache"].flatten(0, 1)
        scaled = found[f"{name}_scale"].permute(0, 3, 1, 2).flatten(0, 1)
        for token, slot in enumerate(slots):
            if slot < 0:
                continue
            off = (cached[slot].int() - codes[token].int()).abs()
            assert int(off.max()) <= (not exact) and float(off.float().mean()) < 0.02
            ratio = (scaled[slot].float() / scales[token].float()).nan_to_num(1.0)
            assert float((ratio - 1.0).abs().max()) <= (0.0 if exact else 1e-3)
        others = [i for i in range(len(cached)) if i not in slots]
        assert (cached[others] == UNWRITTEN).all() and scaled[others].isnan().all()


@pytest.mark.parametrize("group", [32, 64, 128])
def test_a_row_is_within_half_a_step_of_its_codes(group: int) -> None:
    """At every scale that float16 has, subnormal ones included; nothing clips, zeros are zeros."""
    rows = torch.randn(1, 40, 3, 128) * torch.logspace(-9, 5, 40)[:, None, None]
    rows[0, 7] = 0.0
    codes, scales = quantized(rows, group)
    steps = scales.float().repeat_interleave(group, -1)
    found = dequantized(codes, scales.permute(0, 2, 3, 1))
    assert ((found - rows).abs() <= steps * 0.501).all()
    assert (codes.int().abs() <= 127).all() and (codes[0, 7] == 0).all() and (scales[0, 7] == 0).all()
    largest = rows.abs().unflatten(-1, (-1, group)).amax(-1)
    assert (scales.double() * 127 >= largest * (1 - 1e-6)).all()
    assert (scales.double() * 127 <= largest * (1 + 2**-10) + 127 * 2**-24).all()


def test_ties_go_to_even() -> None:
    row = torch.tensor([127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -126.5, 3.0]).repeat(4)
    codes, scales = quantized(row, 32)
    assert scales.tolist() == [1.0] and codes[:8].tolist() == [127, 0, 2, 2, 0, -2, -126, 3]


@pytest.mark.parametrize(
    ("dtype", "by_block_table", "interleaved"),
    [("bf16", False, True), ("fp32", True, True), ("bf16", True, False), ("fp32", False, False)],
)  # any two of them meet
@pytest.mark.parametrize(
    ("H", "G", "D", "rotary_dim", "group"),
    [(6, 2, 64, 64, 32), (3, 3, 80, 32, 80), (5, 1, 96, 64, 32), (2, 1, 20, 0, 20), (2, 2, 128, 128, 64)],
)
def test_rotary_cache_write(
    dtype: str, by_block_table: bool, interleaved: bool, H: int, G: int, D: int, rotary_dim: int, group: int
) -> None:
    what = rotary.Rotary(H, G, D, rotary_dim, PAGE, interleaved, by_block_table, dtype, kv_group=group)
    packed = drawn(3, (H + 2 * G) * D, dtype=dtype)
    packed[2, -D:] = 0.0
    q, k, v = packed.split([H * D, G * D, G * D], -1)
    angles = torch.randn(9, rotary_dim // 2, device=DEVICE)
    positions = torch.tensor([5, 0, 8], **INTEGERS)
    table, sequences = torch.tensor([[3, 1, 6], [2, 0, 5]], **INTEGERS), torch.tensor([0, -1, 1], **INTEGERS)
    slots = [1 * PAGE + 1, -1, 5 * PAGE + 0]
    where = [sequences, table] if by_block_table else [torch.tensor(slots, **INTEGERS)]
    tables = [angles.cos(), angles.sin()] if rotary_dim else []
    turned, found = unwritten(3, H, D, dtype=dtype), pages_of(what)
    launch(rotary.rotary_cache_write(what), q, k, v, *tables, positions, *where, turned, *found.values())
    keys = turned_by(what, k.reshape(3, G, D), angles.cos(), angles.sin(), positions)
    close(turned, turned_by(what, q.reshape(3, H, D), angles.cos(), angles.sin(), positions), dtype)
    check_rows(what, found, slots, keys, v.reshape(3, G, D), exact=not rotary_dim)


@pytest.mark.parametrize("number", [float("inf"), float("-inf"), float("nan"), 1e9])
def test_what_is_not_finite_has_no_scale(number: float) -> None:
    """Nor what is too large for one: attention gives NaN then, and no number."""
    what = rotary.Rotary(1, 1, 64, 0, PAGE, dtype="fp32", kv_group=32)
    q, k, v = (drawn(1, 64, dtype="fp32") for _ in range(3))
    k[0, 3] = v[0, 40] = number
    found, turned, place = pages_of(what, 1), unwritten(1, 64, dtype="fp32"), torch.zeros(1, **INTEGERS)
    launch(rotary.rotary_cache_write(what), q, k, v, place, place, turned, *found.values())
    assert found["k_scale"][0, 0, :, 0].isnan().tolist() == [True, False]
    assert found["v_scale"][0, 0, :, 0].isnan().tolist() == [False, True]
    for name, row in (("k", k), ("v", v)):
        assert quantized(row, 32)[1].isnan().tolist() == [found[f"{name}_scale"][0, 0, :, 0].isnan().tolist()]
    attend = paged.Attention(1, 1, 64, 0.125, PAGE, dtype="fp32", kv_group=32)
    y, table = unwritten(1, 1, 64, dtype="fp32"), torch.zeros(1, 1, **INTEGERS)
    launch(paged.decode(attend), q, *found.values(), table, torch.ones(1, **INTEGERS), y)
    assert y.isnan().all()


def stored(what: paged.Attention, lengths: list[int]) -> tuple[Cache, list[Tensor], list[tuple[Tensor, Tensor]]]:
    """Sequences in pages of int8: the tensors of the cache, and what each sequence's keys and values stand for."""
    cached = Cache(replace(what, kv_group=0), lengths)
    codes, scales = zip(*(quantized(x, what.kv_group) for x in (cached.k, cached.v)), strict=True)
    by_page = [scale.permute(0, 2, 3, 1).contiguous() for scale in scales]
    whole = [dequantized(*pair) for pair in zip(codes, by_page, strict=True)]
    held = []
    for row, length in enumerate(lengths):
        pages = cached.table[row, : -(-length // what.page)].long()
        keys, values = (x[pages].flatten(0, 1)[:length] for x in whole)
        held.append((keys, values))
    return cached, [*codes, *by_page], held


INT8 = [((2, 2, 64), 64), ((2, 2, 64), 32), ((6, 2, 80), 80), ((5, 1, 128), 64), ((3, 1, 96), 32), ((18, 1, 20), 20)]
CASES = [("bf16", *case) for case in INT8] + [(dtype, *INT8[i]) for dtype in ("fp16", "fp32") for i in (1, 2)]
EXTRAS = [{}, {"sinks": True, "window": 9}, {"window": 20, "softcap": 3.0, "alibi": True}]


@pytest.mark.parametrize(("dtype", "heads", "group"), CASES, ids=str)
@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("extras", EXTRAS, ids=lambda extras: "+".join(extras) or "plain")
def test_decode(dtype: str, heads: tuple[int, int, int], group: int, splits: int, extras: dict[str, Any]) -> None:
    what = replace(attention_of(dtype, heads, 16, extras), kv_group=group)
    cached, tensors, held = stored(what, [1, 0, 16, 77])
    q = drawn(4, what.heads, what.head_dim, dtype=dtype, scale=2.0)
    more = [slopes_of(what.heads)] * what.alibi + [sinks_of(what.heads)] * what.sinks
    y = unwritten(*q.shape, dtype=dtype)
    kernel = paged.decode(what, splits=splits, BLOCK_T=16 if splits > 1 else 32)
    launch(kernel, q, *tensors, cached.table, cached.lengths, *more, y, sequences=4)
    assert (y[1] == 0).all()
    for row in (0, 2, 3):
        close(y[row], attended(what, q[row : row + 1], *held[row])[0], dtype)


@pytest.mark.parametrize(("dtype", "heads", "group"), CASES, ids=str)
@pytest.mark.parametrize("extras", EXTRAS, ids=lambda extras: "+".join(extras) or "plain")
def test_prefill(dtype: str, heads: tuple[int, int, int], group: int, extras: dict[str, Any]) -> None:
    """A whole prompt, a chunk after 30 tokens, no token, and one token."""
    what = replace(attention_of(dtype, heads, 8, extras), kv_group=group)
    queries, lengths = [13, 19, 0, 1], [13, 49, 5, 24]
    cached, tensors, held = stored(what, lengths)
    starts = torch.tensor([0, *torch.tensor(queries).cumsum(0).tolist()], **INTEGERS)
    q = drawn(sum(queries), what.heads, what.head_dim, dtype=dtype, scale=2.0)
    more = [slopes_of(what.heads)] * what.alibi + [sinks_of(what.heads)] * what.sinks
    y = unwritten(*q.shape, dtype=dtype)
    kernel = paged.prefill(what, BLOCK_M=16, BLOCK_T=16)
    launch(kernel, q, *tensors, cached.table, cached.lengths, starts, max(queries), *more, y)
    for row, kept in enumerate(held):
        here = slice(int(starts[row]), int(starts[row + 1]))
        if queries[row]:
            close(y[here], attended(what, q[here], *kept), dtype)


@pytest.mark.parametrize(("dtype", "scale"), [("bf16", 1e-5), ("bf16", 1e5), ("fp16", 2e-4), ("fp16", 1e4)])
def test_queries_and_values_far_from_one(dtype: str, scale: float) -> None:
    """What products in float16 must bear."""
    what = replace(attention_of(dtype, (2, 1, 64), 16, {}), kv_group=64)
    cached, tensors, held = stored(what, [33])
    tensors[3] = (tensors[3].float() * min(scale, 1e4)).half()
    pages = cached.table[0, :3].long()
    values = dequantized(tensors[1], tensors[3])[pages].flatten(0, 1)[:33]
    q = drawn(1, 2, 64, dtype=dtype, scale=scale)
    y = unwritten(1, 2, 64, dtype=dtype)
    launch(paged.decode(what), q, *tensors, cached.table, cached.lengths, y)
    close(y, attended(what, q, held[0][0], values), dtype)


def test_what_a_cache_of_int8_does_not_have_is_refused() -> None:
    with pytest.raises(UsageError, match="groups of 32, 64 or 128 channels that divide a head"):
        paged.decode(paged.Attention(2, 2, 96, 1.0, kv_group=64))
    with pytest.raises(UsageError, match="or of all 128, an even number, not of 16"):
        rotary.rotary_cache_write(rotary.Rotary(2, 2, 128, 128, kv_group=16))
    with pytest.raises(UsageError, match="an even number, not of 21"):
        paged.prefill(paged.Attention(2, 2, 21, 1.0, kv_group=21))
    with pytest.raises(UsageError, match="not of 64"):
        group_of(64, 80)
    assert [group_of(128, width) for width in (16, 80, 128, 256)] == [16, 80, 128, 128]
    turning = rotary.Rotary(2, 1, 128, 128, kv_group=64)
    with pytest.raises(UsageError, match="written by a kernel of their own"):
        linear.linear(linear.Linear(512, 64, rotary=turning))
