"""A test for an emitted kernel, as text: random inputs, the kernel, and what it computes written out in plain torch."""

from typing import Any

from fuser.codegen.attention import Attention
from fuser.codegen.elementwise import NORMS, Column, Elementwise, Operand
from fuser.codegen.embedding import Embedding
from fuser.codegen.kernel import Kernel
from fuser.codegen.linear import Linear
from fuser.codegen.rotary import Rotary

DTYPES = {"bf16": "torch.bfloat16", "fp16": "torch.float16", "fp32": "torch.float32"}
TOLERANCES = {"bf16": 1.2e-2, "fp16": 1.5e-3, "fp32": 2e-6}
ACTIVATIONS = {
    "silu": "functional.silu({})",
    "gelu": "functional.gelu({})",
    "gelu_tanh": 'functional.gelu({}, approximate="tanh")',
}
OPERATORS = {
    "Add": "{} + {}", "Sub": "{} - {}", "Mul": "{} * {}", "Div": "{} / {}", "Neg": "-{}", "Abs": "{}.abs()",
    "Sqrt": "{}.sqrt()", "Rsqrt": "{}.rsqrt()", "Reciprocal": "1 / {}", "Exp": "{}.exp()", "Log": "{}.log()",
    "Sigmoid": "{}.sigmoid()", "Tanh": "{}.tanh()", "Erf": "{}.erf()", "Relu": "{}.relu()",
    "Max": "torch.maximum({}, {})", "Min": "torch.minimum({}, {})", "Clip": "{}.clamp({}, {})", "Cast": "{}",
    "Identity": "{}", **ACTIVATIONS,
}  # fmt: skip

# Triton's interpreter multiplies the bit patterns of bfloat16 operands of `tl.dot`; every stub imports this first.
INTERPRETER = '''"""Chooses Triton's interpreter where there is no CUDA device, and widens bfloat16 operands of its products."""

import os

import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    create_dot = interpreter.InterpreterBuilder.create_dot

    def widened(handle):
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        wide = (handle.data.astype(np.uint32) << 16).view(np.float32)
        return interpreter.TensorHandle(wide, tl.float32)

    def exact_dot(self, a, b, d, *options):
        return create_dot(self, widened(a), widened(b), d, *options)

    interpreter.InterpreterBuilder.create_dot = exact_dot
'''


def stub(name: str, kernel: Kernel, what: Any) -> str:
    """The test of the kernel in the file `name`.py, which stands beside it; `what` describes the kernel."""
    if isinstance(what, Linear):
        body = _linear(what)
    elif isinstance(what, Attention):
        body = _attention(what, kernel)
    elif isinstance(what, Rotary):
        body = _rotary(what)
    elif isinstance(what, Embedding):
        body = _embedding(what)
    else:
        body = _elementwise(what)
    floats, counters = kernel.workspace
    scratch = []
    if floats:
        times = "2 * " if isinstance(what, Attention) else ""
        scratch = [
            f"workspace = [torch.full(({times}{floats!r},), NAN, device=DEVICE)]",
            f"workspace += [torch.zeros({times}{counters!r}, dtype=torch.int32, device=DEVICE)]",
        ]
    out = [
        f'"""Runs {name} on random numbers, beside what it computes, in torch: python test_{name}.py, or pytest."""',
        "",
        "from interpreter import DEVICE  # isort: skip",
        "",
        "import torch",
        *["import torch.nn.functional as functional"] * any("functional." in line for line in body),
        f"from {name} import launch",
        "",
        f"DTYPE = {DTYPES[what.dtype]}",
        'NAN = float("nan")',
        "",
        "",
        "def drawn(*shape, scale=1.0):",
        "    return (torch.randn(*shape, device=DEVICE) * scale).to(DTYPE)",
        "",
        "",
        "def close(found, expected):",
        "    error = float((found.double() - expected).norm() / expected.norm())",
        f"    assert error < {TOLERANCES[what.dtype]!r}, error  # NaN is not below",
        "",
        "",
        f"def test_{name}():",
        "    torch.manual_seed(0)",
        *(f"    {line}" if line else "" for line in scratch + body),
        "",
        "",
        'if __name__ == "__main__":',
        f"    test_{name}()",
        '    print("the kernel computes what it should")',
        "",
    ]
    text = "\n".join(out)
    return text.replace("*WORKSPACE)", "*workspace)" if floats else ")").replace(", )", ")")


def _norm(of: str, kind: str | None, eps: float) -> str:
    if kind is None:
        return of
    name = "rms_norm" if kind == "rms" else "layer_norm"
    return f"functional.{name}({of}, {of}.shape[-1:], eps={eps!r})"


def _linear(what: Linear) -> list[str]:
    tokens = what.tokens
    lines = [
        f"x = drawn({tokens}, {what.K}, scale=2.0)",
        f"W = drawn({what.N}, {what.K}, scale={what.K**-0.5!r})",
        f"weight = {'W.T.contiguous()' if what.by_input else 'W'}",
    ]
    if what.norm == "layer":
        lines.append("column_sums = W.float().sum(1)")
    if what.bias:
        lines.append(f"bias = drawn({what.N})")
    if what.residual:
        lines.append(f"residual = drawn({tokens}, {what.width})")
    lines += [f"y = torch.full(({tokens}, {what.width}), NAN, dtype=DTYPE, device=DEVICE)"]
    lines += ["h = x.double()", f"h = {_norm('h', what.norm, what.norm_eps)} @ W.double().T"]
    if what.bias:
        lines.append("h = h + bias.double()")
    if what.pairs:
        lines += ["gate, up = h.chunk(2, -1)", f"h = {ACTIVATIONS[str(what.activation)].format('gate')} * up"]
    elif what.activation:
        lines.append(f"h = {ACTIVATIONS[what.activation].format('h')}")
    if what.residual:
        lines.append("h = h + residual.double()")
    if what.rotary is not None:
        return _projection(what, what.rotary, lines)
    return [*lines, f"launch({', '.join(what.tensors)}, *WORKSPACE)", "close(y, h)"]


def _tables(rotary: Rotary, tokens: int) -> list[str]:
    return [
        f"angles = torch.randn(64, {rotary.rotary_dim // 2}, device=DEVICE)",
        "cos, sin = angles.cos(), angles.sin()",
        f"positions = torch.randint(64, ({tokens},), dtype=torch.int32, device=DEVICE)",
    ]


def _turned(rotary: Rotary) -> list[str]:
    """A function that turns heads x [tokens, heads, Dh]."""
    if not rotary.rotary_dim:
        return ["def turned(x):", "    return x", ""]
    R = rotary.rotary_dim // 2
    halves = "part[..., ::2], part[..., 1::2]" if rotary.interleaved else f"part[..., :{R}], part[..., {R}:]"
    joined = "torch.stack([c, d], -1).flatten(-2)" if rotary.interleaved else "torch.cat([c, d], -1)"
    return [
        "def turned(x):",
        f"    part, rest = x[..., :{rotary.rotary_dim}], x[..., {rotary.rotary_dim}:]",
        "    cosine, sine = (t.double()[positions.long()][:, None] for t in (cos, sin))",
        f"    a, b = {halves}",
        "    c, d = a * cosine - b * sine, b * cosine + a * sine",
        f"    return torch.cat([{joined}, rest], -1)",
        "",
    ]


def _slots(rotary: Rotary, tokens: int) -> list[str]:
    G, D = rotary.kv_heads, rotary.head_dim
    pages = -(-tokens // rotary.page) + 1
    return [
        f"slot_mapping = torch.randperm({pages * rotary.page}, device=DEVICE)[:{tokens}].int()",
        f"k_cache = torch.full(({pages}, {rotary.page}, {G}, {D}), NAN, dtype=DTYPE, device=DEVICE)",
        "v_cache = k_cache.clone()",
    ]


def _stored(k: str, v: str) -> list[str]:
    return [
        f"close(k_cache.flatten(0, 1)[slot_mapping.long()], {k})",
        f"close(v_cache.flatten(0, 1)[slot_mapping.long()], {v})",
    ]


def _projection(what: Linear, rotary: Rotary, lines: list[str]) -> list[str]:
    H, G, D = rotary.heads, rotary.kv_heads, rotary.head_dim
    lines += _tables(rotary, what.tokens) if rotary.rotary_dim else []
    lines += _slots(rotary, what.tokens)
    lines.append(f"q, k, v = (x.unflatten(-1, (-1, {D})) for x in h.split([{H * D}, {G * D}, {G * D}], -1))")
    if what.head_norm_eps is not None:
        lines.append(f"q_norm_weight, k_norm_weight = drawn({D}), drawn({D})")
        lines += [f"{x} = {_norm(x, 'rms', what.head_norm_eps)} * {x}_norm_weight.double()" for x in "qk"]
    lines += ["", *_turned(rotary), f"launch({', '.join(what.tensors)}, *WORKSPACE)"]
    return [*lines, "close(y, turned(q).flatten(1))", *_stored("turned(k)", "v")]


def _rotary(what: Rotary) -> list[str]:
    H, G, D = what.heads, what.kv_heads, what.head_dim
    lines = [f"q, k, v = drawn(3, {(H + 2 * G) * D}).split([{H * D}, {G * D}, {G * D}], -1)"]
    lines += _tables(what, 3) if what.rotary_dim else ["positions = torch.zeros(3, dtype=torch.int32, device=DEVICE)"]
    lines += [*_slots(what, 3), f"turned_q = torch.full((3, {H}, {D}), NAN, dtype=DTYPE, device=DEVICE)", ""]
    lines += _turned(what)
    given = ["turned_q" if name == "turned" else name for name in what.tensors]
    heads = [f"turned(q.double().unflatten(-1, (-1, {D})))", f"turned(k.double().unflatten(-1, (-1, {D})))"]
    lines += [f"launch({', '.join(given)}, *WORKSPACE)", f"close(turned_q, {heads[0]})"]
    return [*lines, *_stored(heads[1], f"v.double().unflatten(-1, (-1, {D}))")]


def _attention(what: Attention, kernel: Kernel) -> list[str]:
    H, G, D, page = what.heads, what.kv_heads, what.head_dim, what.page
    decode = kernel.name == "paged_decode"
    queries = (1, 1) if decode else (5, 3)
    lengths = (37, 70)
    blocks = [-(-length // page) for length in lengths]
    lines = [
        f"lengths, queries = {lengths!r}, {queries!r}",
        "context_lens = torch.tensor(lengths, dtype=torch.int32, device=DEVICE)",
        f"block_table = torch.zeros(2, {max(blocks)}, dtype=torch.int32, device=DEVICE)",
        f"order = torch.randperm({sum(blocks)}, device=DEVICE).int()",
        f"block_table[0, :{blocks[0]}], block_table[1, :{blocks[1]}] = order[:{blocks[0]}], order[{blocks[0]}:]",
        f"k_cache, v_cache = drawn({sum(blocks)}, {page}, {G}, {D}), drawn({sum(blocks)}, {page}, {G}, {D})",
        f"q = drawn({sum(queries)}, {H}, {D}, scale=2.0)",
        "y = torch.full_like(q, NAN)",
    ]
    given = ["q", "k_cache", "v_cache", "block_table", "context_lens"]
    if not decode:
        lines.append(
            f"query_starts = torch.tensor([0, {queries[0]}, {sum(queries)}], dtype=torch.int32, device=DEVICE)"
        )
        given += ["query_starts", repr(max(queries))]
    if what.alibi:
        lines.append(f"slopes = torch.rand({H}, device=DEVICE)")
        given.append("slopes")
    if what.sinks:
        lines.append(f"sinks = torch.randn({H}, device=DEVICE)")
        given.append("sinks")
    lines += [
        f"launch({', '.join([*given, 'y'])}, *WORKSPACE)",
        "start = 0",
        "for i, (T, S) in enumerate(zip(lengths, queries)):",
        "    rows = q[start : start + S].double().transpose(0, 1)",
        "    keys, values = (",
        f"        c[block_table[i].long()].flatten(0, 1)[:T].double().transpose(0, 1).repeat_interleave({what.group}, 0)",
        "        for c in (k_cache, v_cache)",
        "    )",
        f"    scores = rows @ keys.transpose(1, 2) * {what.scale!r}",
    ]
    if what.softcap:
        lines.append(f"    scores = {what.softcap!r} * torch.tanh(scores / {what.softcap!r})")
    lines.append("    distance = torch.arange(T, device=DEVICE) - torch.arange(T - S, T, device=DEVICE)[:, None]")
    if what.alibi:
        lines.append("    scores = scores + slopes.double()[:, None, None] * distance")
    hidden = "distance > 0" + (f" | (distance <= -{what.window})" if what.window else "")
    hidden = f"({hidden.replace('distance > 0 |', '(distance > 0) |')})" if what.window else hidden
    lines.append(f'    scores = scores.masked_fill({hidden}, float("-inf"))')
    if what.sinks:
        lines.append("    sink = sinks.double()[:, None, None].expand(-1, S, 1)")
        lines.append("    weights = torch.cat([scores, sink], -1).softmax(-1)[..., :-1]")
    else:
        lines.append("    weights = scores.softmax(-1)")
    return [*lines, "    close(y[start : start + S], (weights @ values).transpose(0, 1))", "    start += S"]


def _embedding(what: Embedding) -> list[str]:
    lines, total, given = [], [], []
    for i, rows in enumerate(what.rows):
        lines.append(f"ids{i}, table{i} = torch.randint({rows}, (3,), device=DEVICE).int(), drawn({rows}, {what.D})")
        total.append(f"table{i}.double()[ids{i}.long()]")
        given += [f"ids{i}", f"table{i}"]
    lines.append(f"y = torch.full((3, {what.D}), NAN, dtype=DTYPE, device=DEVICE)")
    scale = f" * {what.scale!r}" if what.scale != 1.0 else ""
    return [*lines, f"launch({', '.join(given)}, y, *WORKSPACE)", f"close(y, ({' + '.join(total)}){scale})"]


def _elementwise(what: Elementwise) -> list[str]:
    width = what.groups * what.D
    lines = []
    for i, kind in enumerate(what.inputs):
        lines.append(f"x{i} = drawn({what.D})" if isinstance(kind, Column) else f"x{i} = drawn(3, {width})")
    lines += [f"y{i} = torch.full((3, {width}), NAN, dtype=DTYPE, device=DEVICE)" for i in range(len(what.outputs))]
    names = [f"x{i}" for i in range(len(what.inputs))] + [f"y{i}" for i in range(len(what.outputs))]
    lines.append(f"launch({', '.join(names)}, *WORKSPACE)")
    for i, kind in enumerate(what.inputs):
        spread = "" if isinstance(kind, Column) else f".unflatten(-1, ({what.groups}, {what.D}))"
        lines.append(f"a{i} = x{i}.double(){spread}")
    for j, step in enumerate(what.steps):
        operands = [_operand(operand) for operand in step.operands]
        if step.op in NORMS:
            kind_of = "rms" if step.op == "rms_norm" else "layer"
            value = _norm(operands[0], kind_of, step.eps)
            value += "".join(f" {sign} {vector}" for sign, vector in zip("*+", operands[1:], strict=False))
        elif step.op == "gated":
            value = f"{ACTIVATIONS[step.activation].format(operands[0])} * {operands[1]}"
        else:
            value = OPERATORS[step.op].format(*operands)
        lines.append(f"s{j} = {value}")
    return lines + [f"close(y{i}, s{j}.flatten(1))" for i, j in enumerate(what.outputs)]


def _operand(operand: Operand) -> str:
    if isinstance(operand, tuple):
        return f"{'a' if operand[0] == 'input' else 's'}{operand[1]}"
    return f"({operand!r})" if operand < 0 else repr(operand)
