"""Device functions that make numbers of the codes in a word, in registers.

A half, its other codes masked out, is a subnormal number of the element type, code * 2^-133 (float16: 2^-24); one fused
multiply-add makes (code - zero) * 2^-6 (2^-9) of it, without rounding. Codes of NF4 that are neighbours in a word are
neighbours in K, and are looked up together.
"""

import struct

from fuser.codegen.kernel import Emitter
from fuser.formats import NF4, Format

# What a number of two bytes that is all mantissa is multiplied by: an exponent, and what remains of it.
EXPONENTS = {"bf16": (127, -6), "fp16": (15, -9)}
HALVES = {4: 0x000F000F, 8: 0x00FF00FF}  # the lowest code of each half of a word


def columns(format: Format) -> int:
    """Columns of K of one step."""
    return 512 // format.bits


def parts(format: Format) -> int:
    """Parts of a step that have scales of their own."""
    return columns(format) // format.group if format.group and format.group < columns(format) else 1


def values(e: Emitter, format: Format, dtype: str) -> None:
    """Gives the kernel the device function `values`."""
    if parts(format) > 1:
        e.part(HALVED)
    if format.kind == "nf4":
        _levels(e, dtype)
        return
    shift, remains = EXPONENTS[dtype]
    name = {"bf16": "tl.bfloat16", "fp16": "tl.float16"}[dtype]
    zero = "zero[:, None]" if not format.symmetric else repr(-float(format.middle) * 2.0**remains)
    given = ", zero" if not format.symmetric else ""
    e.part(
        f'''
@triton.jit
def halves(v, FACTOR: tl.constexpr{given}):
    """Both halves of words as numbers: (code - zero) * 2^{remains}."""
    low = (v & 0xFFFF).to(tl.int16).to({name}, bitcast=True) * FACTOR + {zero}
    high = (v >> 16).to(tl.int16).to({name}, bitcast=True) * FACTOR + {zero}
    return tl.join(low, high)
'''
    )
    by = ", zero" if not format.symmetric else ""
    whole, sixteenth = (repr(2.0**power).replace("e+", "e") for power in (shift, shift - 4))
    if format.bits == 4:
        e.part(
            f'''
@triton.jit
def values(words, lowest{given}):
    """Words [rows, 4 J] as (code - zero) * 2^{remains} [rows, 32 J], rows and columns in their order."""
    ROWS: tl.constexpr = words.shape[0]
    J: tl.constexpr = words.shape[1] // 4
    second = lowest << 4  # in their place, 16 times as much
    a, b = halves(words & lowest, {whole}{by}), halves(words & second, {sixteenth}{by})
    words >>= 8
    c, d = halves(words & lowest, {whole}{by}), halves(words & second, {sixteenth}{by})
    all = tl.join(tl.join(a, c), tl.join(b, d)).reshape(2, ROWS // 16, 8, 4, J, 2, 2, 2)
    return all.permute(1, 0, 2, 4, 6, 7, 3, 5).reshape(ROWS, 32 * J)
'''
        )
    else:
        e.part(
            f'''
@triton.jit
def values(words, lowest{given}):
    """Words [rows, 4 J] as (code - zero) * 2^{remains} [rows, 16 J], rows and columns in their order."""
    ROWS: tl.constexpr = words.shape[0]
    J: tl.constexpr = words.shape[1] // 4
    a = halves(words & lowest, {whole}{by})
    b = halves((words >> 8) & lowest, {whole}{by})
    all = tl.join(a, b).reshape(2, ROWS // 16, 8, 4, J, 2, 2)
    return all.permute(1, 0, 2, 4, 6, 3, 5).reshape(ROWS, 16 * J)
'''
        )


HALVED = '''
@triton.jit
def halved(words):
    """Words [rows, 4 J] of the first and of the second half of the columns."""
    ROWS: tl.constexpr = words.shape[0]
    J: tl.constexpr = words.shape[1] // 4
    first, second = tl.split(words.reshape(ROWS, 4, 2, J // 2).permute(0, 1, 3, 2))
    return first.reshape(ROWS, 2 * J), second.reshape(ROWS, 2 * J)
'''


TABLE_BYTES = 32 << 10  # a pair of levels for each of 256 bytes of codes, for each of 32 lanes


def _levels(e: Emitter, dtype: str) -> None:
    """Gives the kernel `values` of NF4: two codes are looked up at once, in a table of which each lane has a bank."""
    name = {"bf16": "tl.bfloat16", "fp16": "tl.float16"}[dtype]
    bits = [_bits(level, dtype) for level in NF4]
    e.constant(NATIVE=False)
    fill = [
        "{ .reg .b32 place, pair;",
        "add.u32 place, $1, $3;",
        *(
            f"or.b32 pair, $2, 0x{high << 16:08x}; st.shared.v4.b32 [place + {2048 * i}], {{pair, pair, pair, pair}};"
            for i, high in enumerate(bits)
        ),
        "mov.b32 $0, 0; }",
    ]
    shifts = ("shl.b32 a, $4, 7;", "shr.u32 a, $4, 1;", "shr.u32 a, $4, 9;", "shr.u32 a, $4, 17;")
    look_up = [
        "{ .reg .b32 a;",
        *(
            f"{shift} lop3.b32 a, a, 0x7f80, $5, 0xea; add.u32 a, a, $6; ld.shared.b32 ${i}, [a];"
            for i, shift in enumerate(shifts)
        ),
        "}",
    ]
    for constant, lines in (("FILL", fill), ("LOOK_UP", look_up)):
        e.part(f'{constant} = tl.constexpr("""\n{chr(10).join(lines)}\n""")')
    *others, last = [f"tl.where(code == {i}, {value}, found)" for i, value in enumerate(bits) if value]
    plain = "\n".join([*(f"    found = {choice}" for choice in others), f"    return {last}"])
    e.part(
        f'''
@triton.jit
def level(words, PLACE: tl.constexpr):
    """The bits of the levels of one code of each word."""
    code = (words >> (4 * PLACE)) & 15
    found = tl.zeros(words.shape, tl.int32)
{plain}
'''
    )
    e.part(
        f'''
@triton.jit
def table():
    """Where shared memory holds the pairs of levels of all bytes of codes, and a lane's place in each of them."""
    DECLARED: tl.constexpr = "{{ .shared .align 128 .b8 levels[{TABLE_BYTES}]; mov.u32 $0, levels; }}"
    start = tl.inline_asm_elementwise(DECLARED, "=r", [], tl.int32, is_pure=False, pack=1)
    i = tl.arange(0, 128)  # eight threads a byte, 16 bytes at once
    tl.inline_asm_elementwise(FILL, "=r,r,r,r", [i * 16, level(i // 8, 0), start], tl.int32, is_pure=False, pack=1)
    tl.debug_barrier()
    lane = tl.inline_asm_elementwise("mov.u32 $0, %laneid;", "=r", [], tl.int32, is_pure=True, pack=1)
    return start, lane * 4
'''
    )
    e.part(
        f'''
@triton.jit
def pair(v):
    """Both halves of words as numbers."""
    low = (v & 0xFFFF).to(tl.int16).to({name}, bitcast=True)
    return tl.join(low, (v >> 16).to(tl.int16).to({name}, bitcast=True))
'''
    )
    e.part(
        '''
@triton.jit
def values(words, start, lane, NATIVE: tl.constexpr):
    """Words [rows, 4 J] as levels [rows, 32 J], rows and columns in their order."""
    ROWS: tl.constexpr = words.shape[0]
    J: tl.constexpr = words.shape[1] // 4
    if NATIVE:
        a, b, c, d = tl.inline_asm_elementwise(
            LOOK_UP,
            "=r,=r,=r,=r,r,r,r",
            [words, lane, start],
            (tl.int32, tl.int32, tl.int32, tl.int32),
            is_pure=True,
            pack=1,
        )
    else:
        a = level(words, 0) | level(words, 1) << 16
        b = level(words, 2) | level(words, 3) << 16
        c = level(words, 4) | level(words, 5) << 16
        d = level(words, 6) | level(words, 7) << 16
    all = tl.join(tl.join(pair(a), pair(c)), tl.join(pair(b), pair(d))).reshape(2, ROWS // 16, 8, 4, J, 2, 2, 2)
    return all.permute(1, 0, 2, 4, 6, 7, 3, 5).reshape(ROWS, 32 * J)
'''
    )
    e.host += [
        "def admit(module, function, *about):",
        '    """The table is not in the sum for which Triton asks for more shared memory than 48 KB: it is asked for here."""',
        '    driver, size, of = ctypes.CDLL("libcuda.so.1"), ctypes.c_int(), ctypes.c_void_p(function)',
        "    driver.cuFuncGetAttribute(ctypes.byref(size), 1, of)  # what a kernel declares itself",
        f"    if size.value >= {TABLE_BYTES}:",
        "        driver.cuFuncGetAttribute(ctypes.byref(size), 8, of)  # what a launch may ask for",
        "        driver.cuFuncSetAttribute(of, 8, max(size.value, 48 << 10))",
        "",
        "",
        "triton.knobs.runtime.kernel_load_end_hook.add(admit)",
        "",
        "",
    ]


def _bits(number: float, dtype: str) -> int:
    """The bits of a number in an element type, rounded to the nearest."""
    if dtype == "fp16":
        return int.from_bytes(struct.pack("<e", number), "little")
    wide = int.from_bytes(struct.pack("<f", number), "little")
    return (wide + 0x7FFF + (wide >> 16 & 1)) >> 16
