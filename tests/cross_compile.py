"""Compiles the kernels of the shapes that matter for GPUs that need not be there, and prints what each takes, as JSON lines.

Run as `python -m tests.cross_compile [sm_80 ...]`, in a process without Triton's interpreter.
"""

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource

from fuser import importer, patterns
from fuser.canonicalize import canonicalize
from fuser.codegen import attention, cache, embedding, matmul, quantized, rotary, rounding, sampling
from fuser.codegen.compose import compose
from fuser.codegen.elementwise import elementwise, gate, norm
from fuser.codegen.kernel import Kernel
from fuser.codegen.linear import Linear, linear
from fuser.codegen.shapes import SHAPES
from fuser.formats import format_of
from fuser.rewriting import rewrite

SHARED = {"sm_80": 166912, "sm_90": 232448, "sm_100": 232448}  # bytes of shared memory that a block may have


def linears(tokens: int) -> Iterator[tuple[str, Linear]]:
    """The products of both models, and each part of the family once."""
    for model, shape in SHAPES.items():
        yield from ((f"{model} {name}", what) for name, what in shape.linears(tokens))
        yield f"{model} lm_head", shape.vocabulary(tokens)
    norm: dict[str, Any] = {"tokens": tokens, "norm": "rms", "norm_eps": 1e-5}
    heads = rotary.Rotary(32, 8, 128, 128)
    yield "norm+qkv+head norms+rotary", Linear(6144, 4096, rotary=heads, head_norm_eps=1e-6, **norm)
    yield "[K, N] layer norm", Linear(4096, 4096, tokens, by_input=True, bias=True, norm="layer", norm_eps=1e-5)
    yield "fp16", Linear(22016, 4096, dtype="fp16", activation="silu", **norm)
    yield "fp32", Linear(4096, 4096, dtype="fp32", **norm)


def codes() -> Iterator[tuple[str, Kernel]]:
    """Products with quantized weights, and what goes before them."""
    shape = SHAPES["llama-2-7b"]
    for name in ("int4", "int4:32:asymmetric", "int8", "nf4"):
        format = format_of(name)
        for tokens in (1, 16, 64) if name == "int4" else (1, 64):
            for work, what in list(shape.linears(tokens, format=format))[: 4 if name == "int4" else 2]:
                kernel = quantized.quantized_linear(what)
                if "NATIVE" in kernel.constants:
                    kernel = replace(kernel, constants={**kernel.constants, "NATIVE": True})
                yield f"{work} {name} M{tokens}", kernel
        what = next(what for _, what in shape.linears(1, format=format))
        yield f"dequantize {name}", quantized.dequantize(quantized.Dequantize(what))
    for tokens in (16, 64):
        for work, what in shape.linears(tokens, format=format_of("w8a8")):
            yield f"{work} w8a8 M{tokens}", linear(what)
    gated = matmul.Matmul(22016, 4096, activation="silu", gated=True, kind="int8")
    yield "matmul w8a8 gated M256", matmul.matmul(gated, matmul.default_tiles(gated, 256))
    plain = matmul.Matmul(12288, 4096, kind="int8")
    yield "matmul w8a8 M4096", matmul.matmul(plain, matmul.default_tiles(plain, 4096))
    yield "rounding", rounding.rounding(rounding.Rounding(4096, "int8", norm="rms", norm_eps=1e-5, weight=True))


def demo() -> Iterator[tuple[str, Kernel]]:
    """The kernels of the demo model's programs, each number of tokens in one of two types."""
    graph = importer.load(Path(__file__).parents[1] / "models/demo/model.onnx")
    canonicalize(graph)
    rewrite(graph, patterns.ALL, verify=False)
    for tokens, dtype in ((1, "bf16"), (16, "fp32"), (64, "bf16"), (2048, "fp32")):
        for number, kernel in enumerate(compose(graph, dtype=dtype, tokens=tokens).kernels):
            yield f"demo M{tokens} {dtype} {number} {kernel.name}", kernel


def kernels() -> Iterator[tuple[str, Kernel]]:
    """What a layer of Llama-2-7B and of Llama-3-8B takes, and each part of each family once."""
    for dtype in ("bf16", "fp16", "fp32"):
        yield f"rms_norm 4096 {dtype}", elementwise(norm("rms", 4096, eps=1e-5, dtype=dtype))
        yield f"skip_rms_norm 4096 {dtype}", elementwise(norm("rms", 4096, eps=1e-5, dtype=dtype, skip=True))
    yield "layer_norm 14336", elementwise(norm("layer", 14336, eps=1e-5, bias=True))
    yield "skip_layer_norm 2560", elementwise(norm("layer", 2560, eps=1e-5, bias=True, skip=True))
    for activation in ("silu", "gelu", "gelu_tanh"):
        yield f"gate {activation} 11008", elementwise(gate(11008, activation=activation))
    yield from demo()
    yield from codes()
    yield "embedding", embedding.embedding(embedding.Embedding(4096, (128256,)))
    for k in (1, 50, 256):
        yield f"top {k}", sampling.top(sampling.Top(128256, k))
        yield f"draw {k}", sampling.draw(k)
    yield "top noise", sampling.top(sampling.Top(128256, 1, noise=True))
    for dtype in ("bf16", "fp16", "fp32"):
        gated = matmul.Matmul(28672, 4096, dtype, activation="silu", gated=True)
        yield f"matmul gate_up {dtype}", matmul.matmul(gated)
        yield f"matmul residual {dtype}", matmul.matmul(matmul.Matmul(4096, 14336, dtype, bias=True, residual=True))
    for tokens in (1, 16, 64):
        for name, what in linears(tokens):
            yield f"{name} M{tokens}", linear(what)
    for heads, kv_heads, D in ((32, 32, 128), (32, 8, 128), (71, 1, 64), (32, 32, 80), (16, 8, 256)):
        for page in (16, 64) if (heads, kv_heads) == (32, 8) else (16,):
            what = attention.Attention(heads, kv_heads, D, D**-0.5, page)
            for splits in (1, 8):
                yield f"decode {heads}/{kv_heads} {D} page {page} parts {splits}", attention.decode(what, splits=splits)
            kernel = attention.prefill(what)
            yield f"prefill {heads}/{kv_heads} {D} page {page}", kernel
    for heads, kv_heads, D, group, dtype in (
        (32, 32, 128, 128, "bf16"), (32, 8, 128, 64, "bf16"), (32, 8, 128, 64, "fp16"), (32, 8, 128, 64, "fp32"), (32, 8, 128, 32, "bf16"),
        (71, 1, 64, 64, "bf16"), (32, 32, 80, 80, "bf16"), (16, 8, 256, 64, "bf16"),
    ):  # fmt: skip
        what, name = attention.Attention(heads, kv_heads, D, D**-0.5, 16, dtype=dtype, kv_group=group), f"int8:{group}"
        for splits in (1, 8):
            yield f"decode {name} {heads}/{kv_heads} {D} {dtype} parts {splits}", attention.decode(what, splits=splits)
        yield f"prefill {name} {heads}/{kv_heads} {D} {dtype}", attention.prefill(what)
        what_r = rotary.Rotary(heads, kv_heads, D, D, dtype=dtype, kv_group=group)
        yield f"rotary {name} {heads}/{kv_heads} {D} {dtype}", rotary.rotary_cache_write(what_r)
    capped = attention.Attention(16, 8, 256, 0.0625, 16, window=4096, softcap=50.0, alibi=True)
    sunk = attention.Attention(64, 8, 64, 0.125, 16, window=128, sinks=True)
    yield "decode window sinks", attention.decode(sunk, splits=4)
    yield "prefill window sinks", attention.prefill(sunk)
    yield "decode window softcap alibi", attention.decode(capped, splits=4)
    yield "prefill window softcap alibi", attention.prefill(capped)
    for interleaved in (False, True):
        for by_table in (False, True):
            what_r = rotary.Rotary(32, 8, 128, 64 if interleaved else 128, 16, interleaved, by_table)
            yield f"rotary interleaved={interleaved} table={by_table}", rotary.rotary_cache_write(what_r)


def _capability(target: str) -> int:
    return int(target.removeprefix("sm_"))


def compiled(kernel: Kernel, target: str) -> dict[str, int]:
    """Registers, spills (bytes stored) and shared memory of a kernel."""
    function = cache.load(kernel).kernel
    names = list(kernel.signature) + list(kernel.constants)
    signature = {**kernel.signature, **dict.fromkeys(kernel.constants, "constexpr")}
    constants = {(names.index(name),): value for name, value in kernel.constants.items()}
    aligned = [
        i for i, (name, kind) in enumerate(kernel.signature.items()) if kind[0] == "*" or name.endswith("stride")
    ]
    attributes = {(i,): [["tt.divisibility", 16]] for i in aligned}
    source = ASTSource(function, signature, constants, attributes)
    result = triton.compile(source, target=GPUTarget("cuda", _capability(target), 32), options=dict(kernel.options))
    return {"shared": result.metadata.shared, **_resources(result.asm["ptx"], target)}


def _resources(ptx: str, target: str) -> dict[str, int]:
    """What ptxas reports: Triton keeps spills only where it loads the kernel, which takes a GPU."""
    architecture = re.search(r"\.target (sm_\w+)", ptx)
    assert architecture is not None
    tool = get_ptxas(_capability(target))
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "kernel.ptx")
        file.write_text(ptx)
        command = [tool.path, "-v", f"--gpu-name={architecture[1]}", str(file), "-o", str(file.with_suffix(".cubin"))]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    spills, registers = re.search(r"(\d+) bytes spill stores", said), re.search(r"Used (\d+) registers", said)
    assert spills is not None and registers is not None, said
    return {"spills": int(spills[1]), "registers": int(registers[1])}


def main(arguments: list[str]) -> None:
    """A table of what each kernel takes, for the targets that are named or for all; with --json a line of JSON each."""
    as_json = "--json" in arguments
    if not as_json:
        print(f"{'target':8} {'kernel':48} {'registers':>9} {'shared':>8} {'limit':>8} {'spills':>7}")
    for target in [argument for argument in arguments if argument != "--json"] or SHARED:
        for name, kernel in kernels():
            row: dict[str, Any] = {"target": target, "kernel": name, "limit": SHARED[target]}
            try:
                row |= compiled(kernel, target)
            except Exception as error:
                row["error"] = f"{type(error).__name__}: {error}"
            if as_json:
                print(json.dumps(row), flush=True)
            else:
                taken = [
                    f"{row.get(key, ''):>{width}}"
                    for key, width in (("registers", 9), ("shared", 8), ("limit", 8), ("spills", 7))
                ]
                print(f"{target:8} {name:48} {' '.join(taken)} {row.get('error', '')}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
