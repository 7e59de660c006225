"""Paged attention, decode: 32 query heads, 8 key heads of 128.

Grid: (sequences x key heads, 1 parts of the keys).
One program takes 4 query heads of one sequence through one part of its keys.
32 keys a step, pages of 16. Products by tensor cores, in float32.
"""

import torch
import triton
import triton.language as tl


@triton.jit
def codes_of(pairs, PACKED: tl.constexpr):
    """The even and the odd codes of pairs in float16: 0x6480 + code is 1152 + code there."""
    if PACKED:  # two pairs in a register, which compilers take apart
        return tl.inline_asm_elementwise(
            """{
            .reg .b32 biased, offset;
            xor.b32 biased, $2, 0x80808080;
            mov.b32 offset, 0x64806480;
            prmt.b32 $0, biased, 0x64646464, 0x4240;
            prmt.b32 $1, biased, 0x64646464, 0x4341;
            sub.f16x2 $0, $0, offset;
            sub.f16x2 $1, $1, offset;
            }""",
            "=r,=r,r",
            [pairs],
            dtype=(tl.float16, tl.float16),
            is_pure=True,
            pack=2,
        )
    even = ((pairs & 0xFF) ^ 0x6480).to(tl.float16, bitcast=True) - 1152.0
    odd = (((pairs >> 8) & 0xFF) ^ 0x6480).to(tl.float16, bitcast=True) - 1152.0
    return even, odd


@triton.jit
def kernel(
    q,
    k_cache,
    v_cache,
    k_scale,
    v_scale,
    block_table,
    context_lens,
    y,
    table_stride,
    H: tl.constexpr = 32,
    G: tl.constexpr = 8,
    GROUP: tl.constexpr = 4,
    D: tl.constexpr = 128,
    PAGE: tl.constexpr = 16,
    BLOCK_M: tl.constexpr = 16,
    BLOCK_T: tl.constexpr = 32,
    BLOCK_D: tl.constexpr = 128,
    SCALE: tl.constexpr = 0.12751743082459868,
    WIDE: tl.constexpr = False,
    GROUPS: tl.constexpr = 2,
    PAIRS: tl.constexpr = 32,
    BLOCK_PAIRS: tl.constexpr = 32,
    PACKED: tl.constexpr = True,
    SHIFT: tl.constexpr = 16.0,
    PDL: tl.constexpr = False,
):
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    sequence = tl.program_id(0) // G
    g = tl.program_id(0) % G
    # Rows: the query heads of one key head.
    m = tl.arange(0, BLOCK_M)
    head = g * GROUP + m
    row_inside = m < GROUP
    context = tl.load(context_lens + sequence)
    rows = (sequence.to(tl.int64) * H + head) * D
    first = 0
    last = context
    start = first // BLOCK_T * BLOCK_T
    pair = tl.arange(0, BLOCK_PAIRS)
    inside = row_inside[:, None]
    queries_even_0 = tl.load(q + rows[:, None] + (2 * pair)[None, :], mask=inside, other=0.0)
    queries_odd_0 = tl.load(q + rows[:, None] + (2 * pair + 1)[None, :], mask=inside, other=0.0)
    queries_even_1 = tl.load(q + rows[:, None] + (2 * PAIRS + 2 * pair)[None, :], mask=inside, other=0.0)
    queries_odd_1 = tl.load(q + rows[:, None] + (2 * PAIRS + 2 * pair + 1)[None, :], mask=inside, other=0.0)
    # Divided by a row's largest they fit float16.
    largest = tl.zeros([BLOCK_M], tl.float32)
    largest = tl.maximum(largest, tl.max(tl.abs(queries_even_0.to(tl.float32)), 1))
    largest = tl.maximum(largest, tl.max(tl.abs(queries_odd_0.to(tl.float32)), 1))
    largest = tl.maximum(largest, tl.max(tl.abs(queries_even_1.to(tl.float32)), 1))
    largest = tl.maximum(largest, tl.max(tl.abs(queries_odd_1.to(tl.float32)), 1))
    largest = tl.where(largest > 0.0, largest, 1.0)
    queries_even_0 = (queries_even_0.to(tl.float32) / largest[:, None]).to(tl.float16)
    queries_odd_0 = (queries_odd_0.to(tl.float32) / largest[:, None]).to(tl.float16)
    queries_even_1 = (queries_even_1.to(tl.float32) / largest[:, None]).to(tl.float16)
    queries_odd_1 = (queries_odd_1.to(tl.float32) / largest[:, None]).to(tl.float16)
    row_scale = largest * SCALE
    acc_even_0 = tl.zeros([BLOCK_M, BLOCK_PAIRS], tl.float32)
    acc_odd_0 = tl.zeros([BLOCK_M, BLOCK_PAIRS], tl.float32)
    acc_even_1 = tl.zeros([BLOCK_M, BLOCK_PAIRS], tl.float32)
    acc_odd_1 = tl.zeros([BLOCK_M, BLOCK_PAIRS], tl.float32)
    highest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    table = block_table + sequence.to(tl.int64) * table_stride
    # No copy engine takes as little as a scale: it is loaded one step before it is needed, and its page two.
    t = start + tl.arange(0, BLOCK_T)
    near = tl.load(table + t // PAGE, mask=t < last, other=0)
    scale_place = ((near.to(tl.int64) if WIDE else near) * G + g) * (GROUPS * PAGE) + t % PAGE
    key_near_0 = tl.load(k_scale + scale_place)
    key_near_1 = tl.load(k_scale + scale_place + 1 * PAGE)
    value_near_0 = tl.load(v_scale + scale_place)
    value_near_1 = tl.load(v_scale + scale_place + 1 * PAGE)
    near = tl.load(table + (t + BLOCK_T) // PAGE, mask=t + BLOCK_T < last, other=0)
    whole = start + tl.maximum(last - start, 0) // BLOCK_T * BLOCK_T
    for step in range(start, whole, BLOCK_T):
        t = step + tl.arange(0, BLOCK_T)
        block = tl.load(table + t // PAGE)
        block = block.to(tl.int64) if WIDE else block
        offset = t % PAGE
        place = ((block * PAGE + offset) * G + g)[:, None] * (GROUPS * PAIRS) + pair[None, :]
        keys_0 = tl.load(k_cache + place)
        keys_1 = tl.load(k_cache + place + 1 * PAIRS)
        values_0 = tl.load(v_cache + place)
        values_1 = tl.load(v_cache + place + 1 * PAIRS)
        key_scale_0 = key_near_0.to(tl.float32)
        key_scale_1 = key_near_1.to(tl.float32)
        value_scale_0 = value_near_0.to(tl.float32)
        value_scale_1 = value_near_1.to(tl.float32)
        scale_place = ((near.to(tl.int64) if WIDE else near) * G + g) * (GROUPS * PAGE) + (t + BLOCK_T) % PAGE
        key_near_0 = tl.load(k_scale + scale_place)
        key_near_1 = tl.load(k_scale + scale_place + 1 * PAGE)
        value_near_0 = tl.load(v_scale + scale_place)
        value_near_1 = tl.load(v_scale + scale_place + 1 * PAGE)
        near = tl.load(table + (t + 2 * BLOCK_T) // PAGE, mask=t + 2 * BLOCK_T < last, other=0)
        even, odd = codes_of(keys_0, PACKED)
        product = tl.dot(queries_even_0, tl.trans(even))
        product = tl.dot(queries_odd_0, tl.trans(odd), product)
        scores = product * key_scale_0[None, :]
        even, odd = codes_of(keys_1, PACKED)
        product = tl.dot(queries_even_1, tl.trans(even))
        product = tl.dot(queries_odd_1, tl.trans(odd), product)
        scores += product * key_scale_1[None, :]
        above = tl.maximum(highest, tl.max(scores, 1) * row_scale)
        weights = tl.exp2(scores * row_scale[:, None] - above[:, None])
        decay = tl.exp2(highest - above)
        total = total * decay + tl.sum(weights, 1)
        even, odd = codes_of(values_0, PACKED)
        shares = (weights * (value_scale_0 * SHIFT)[None, :]).to(tl.float16)
        acc_even_0 = tl.dot(shares, even, acc_even_0 * decay[:, None])
        acc_odd_0 = tl.dot(shares, odd, acc_odd_0 * decay[:, None])
        even, odd = codes_of(values_1, PACKED)
        shares = (weights * (value_scale_1 * SHIFT)[None, :]).to(tl.float16)
        acc_even_1 = tl.dot(shares, even, acc_even_1 * decay[:, None])
        acc_odd_1 = tl.dot(shares, odd, acc_odd_1 * decay[:, None])
        highest = above
    for step in range(whole, last, BLOCK_T):
        t = step + tl.arange(0, BLOCK_T)
        t_inside = t < last
        block = tl.load(table + t // PAGE, mask=t_inside, other=0)
        block = block.to(tl.int64) if WIDE else block
        offset = t % PAGE
        place = ((block * PAGE + offset) * G + g)[:, None] * (GROUPS * PAIRS) + pair[None, :]
        keys_0 = tl.load(k_cache + place, mask=t_inside[:, None], other=0)
        keys_1 = tl.load(k_cache + place + 1 * PAIRS, mask=t_inside[:, None], other=0)
        values_0 = tl.load(v_cache + place, mask=t_inside[:, None], other=0)
        values_1 = tl.load(v_cache + place + 1 * PAIRS, mask=t_inside[:, None], other=0)
        key_scale_0 = tl.where(t_inside, key_near_0.to(tl.float32), 0.0)
        key_scale_1 = tl.where(t_inside, key_near_1.to(tl.float32), 0.0)
        value_scale_0 = tl.where(t_inside, value_near_0.to(tl.float32), 0.0)
        value_scale_1 = tl.where(t_inside, value_near_1.to(tl.float32), 0.0)
        scale_place = ((near.to(tl.int64) if WIDE else near) * G + g) * (GROUPS * PAGE) + (t + BLOCK_T) % PAGE
        key_near_0 = tl.load(k_scale + scale_place)
        key_near_1 = tl.load(k_scale + scale_place + 1 * PAGE)
        value_near_0 = tl.load(v_scale + scale_place)
        value_near_1 = tl.load(v_scale + scale_place + 1 * PAGE)
        near = tl.load(table + (t + 2 * BLOCK_T) // PAGE, mask=t + 2 * BLOCK_T < last, other=0)
        even, odd = codes_of(keys_0, PACKED)
        product = tl.dot(queries_even_0, tl.trans(even))
        product = tl.dot(queries_odd_0, tl.trans(odd), product)
        scores = product * key_scale_0[None, :]
        even, odd = codes_of(keys_1, PACKED)
        product = tl.dot(queries_even_1, tl.trans(even))
        product = tl.dot(queries_odd_1, tl.trans(odd), product)
        scores += product * key_scale_1[None, :]
        scores = tl.where(t_inside[None, :], scores, float("-inf"))
        above = tl.maximum(highest, tl.max(scores, 1) * row_scale)
        safe = tl.where(above > float("-inf"), above, 0.0)  # of a row that has seen no key
        weights = tl.exp2(scores * row_scale[:, None] - safe[:, None])
        decay = tl.exp2(highest - safe)
        total = total * decay + tl.sum(weights, 1)
        even, odd = codes_of(values_0, PACKED)
        shares = (weights * (value_scale_0 * SHIFT)[None, :]).to(tl.float16)
        acc_even_0 = tl.dot(shares, even, acc_even_0 * decay[:, None])
        acc_odd_0 = tl.dot(shares, odd, acc_odd_0 * decay[:, None])
        even, odd = codes_of(values_1, PACKED)
        shares = (weights * (value_scale_1 * SHIFT)[None, :]).to(tl.float16)
        acc_even_1 = tl.dot(shares, even, acc_even_1 * decay[:, None])
        acc_odd_1 = tl.dot(shares, odd, acc_odd_1 * decay[:, None])
        highest = above
    acc_even_0 *= 1.0 / SHIFT
    acc_odd_0 *= 1.0 / SHIFT
    acc_even_1 *= 1.0 / SHIFT
    acc_odd_1 *= 1.0 / SHIFT
    # A row that sees no key gives 0.
    result = acc_even_0 / tl.where(total > 0.0, total, 1.0)[:, None]
    tl.store(y + rows[:, None] + (2 * pair)[None, :], result, mask=inside)
    result = acc_odd_0 / tl.where(total > 0.0, total, 1.0)[:, None]
    tl.store(y + rows[:, None] + (2 * pair + 1)[None, :], result, mask=inside)
    result = acc_even_1 / tl.where(total > 0.0, total, 1.0)[:, None]
    tl.store(y + rows[:, None] + (2 * PAIRS + 2 * pair)[None, :], result, mask=inside)
    result = acc_odd_1 / tl.where(total > 0.0, total, 1.0)[:, None]
    tl.store(y + rows[:, None] + (2 * PAIRS + 2 * pair + 1)[None, :], result, mask=inside)


OVERLAPPED = {"PDL": True, "launch_pdl": True}  # programmatic dependent launch


def launch(q, k_cache, v_cache, k_scale, v_scale, block_table, context_lens, y, pdl=False):
    """Fills y; all tensors are contiguous."""
    sequences = context_lens.shape[0]
    if sequences:
        kernel[(sequences * 8, 1)](
            q,
            k_cache.view(torch.int16),
            v_cache.view(torch.int16),
            k_scale,
            v_scale,
            block_table,
            context_lens,
            y,
            block_table.stride(0),
            WIDE=k_cache.numel() >= 2**31,
            PACKED=not triton.knobs.runtime.interpret,
            num_warps=1,
            num_stages=6,
            **(OVERLAPPED if pdl else {}),
        )
