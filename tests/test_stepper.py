"""Decoders over paged caches, by emitted kernels: ragged prompts and steps of all sequences, against torch on each alone."""

from tests.interpreter import DEVICE  # isort: skip

from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoTokenizer

from fuser import importer, patterns
from fuser.canonicalize import canonicalize
from fuser.codegen.compose import compose
from fuser.codegen.linear import Linear
from fuser.codegen.matmul import Matmul
from fuser.codegen.rounding import Rounding
from fuser.constants import Array
from fuser.dtypes import DType
from fuser.errors import UnsupportedOperator, UsageError
from fuser.graph import Graph, Node, Value
from fuser.models import train_demo
from fuser.quantizing import quantize
from fuser.rewriting import rewrite
from fuser.runtime.executor import Executor
from fuser.shapes import infer
from fuser.stepping import Stepper
from tests import zoo

PAGE = 4
PROMPTS = (5, 1, 14)  # of three sequences; the longest is past every window
STEPS = 3
DEMO = Path(__file__).parents[1] / "models/demo/model.onnx"


@cache
def fused(name: str) -> Graph:
    graph = importer.load(DEMO if name == "demo" else zoo.exported(name, "dynamo"))
    canonicalize(graph)
    rewrite(graph, patterns.ALL)
    return graph


def reference(graph: Graph, ids: Tensor) -> Tensor:
    """Logits [S, V] of one sequence from its beginning."""
    given = []
    for value in graph.inputs:
        if value.name == "input_ids":
            given.append(ids[None])
        elif value.name == "attention_mask":
            given.append(torch.ones(1, len(ids), dtype=torch.int64))
        elif value.name == "position_ids":
            given.append(torch.arange(len(ids))[None])
        else:
            assert value.shape is not None and value.dtype is not None
            _, heads, _, width = value.shape
            given.append(torch.zeros(1, int(heads), 0, int(width), dtype=value.dtype.torch))
    return Executor(graph)(*given)[0][0]


class Sequences:
    """Three sequences in shuffled pages."""

    def __init__(self, vocabulary: int) -> None:
        torch.manual_seed(0)
        self.ids = [torch.randint(vocabulary, (length + STEPS,)) for length in PROMPTS]
        pages = [-(-len(ids) // PAGE) for ids in self.ids]
        self.pages = sum(pages) + 2
        order = torch.randperm(self.pages, dtype=torch.int32)
        self.table = torch.full((3, max(pages)), -(10**6), dtype=torch.int32)
        for row, count in enumerate(pages):
            self.table[row, :count] = order[sum(pages[:row]) : sum(pages[:row]) + count]

    def inputs(self, spans: list[tuple[int, int]]) -> dict[str, object]:
        """What a step takes for the tokens start .. stop of every sequence."""
        positions = torch.cat([torch.arange(*span) for span in spans]).int()
        rows = torch.cat([torch.full((stop - start,), row) for row, (start, stop) in enumerate(spans)])
        slots = self.table[rows, positions // PAGE] * PAGE + positions % PAGE
        lengths = [stop - start for start, stop in spans]
        given = {
            "tokens": torch.cat([ids[slice(*span)] for ids, span in zip(self.ids, spans, strict=True)]).int(),
            "positions": positions,
            "slot_mapping": slots[None],
            "block_table": self.table[None],
            "context_lens": torch.tensor([stop for _, stop in spans], dtype=torch.int32),
            "query_starts": torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32),
        }
        return {name: tensor.to(DEVICE) for name, tensor in given.items()} | {"longest": max(lengths)}


def check(
    graph: Graph, spans: list[list[tuple[int, int]]], tolerance: float = 2e-5, kv_group: int = 0, dtype: str = "fp32"
) -> None:
    """Runs the spans of tokens one after another, and compares every token's logits."""
    logits_of = graph.outputs[0]
    sequences = Sequences(int((logits_of.shape or ())[-1]))
    stepper = Stepper(graph, dtype=dtype, device=DEVICE, pages=sequences.pages, page=PAGE, positions=64,
                      kv_group=kv_group)  # fmt: skip
    found: list[list[Tensor]] = [[], [], []]
    for step in spans:
        lengths = [stop - start for start, stop in step]
        bound = stepper.bound(sum(lengths), decode=max(lengths) == 1)
        if not found[0]:
            for cached in stepper.caches.values():
                for tensor in cached.values():
                    tensor.fill_(float("nan") if tensor.is_floating_point() else -128)
        for memory in bound.memory.values():
            memory.fill_(77 if memory.dtype is torch.int8 else float("nan"))
        logits = bound(**sequences.inputs(step))[logits_of.name].cpu().float()
        for row, part in enumerate(logits.clone().split(lengths)):
            found[row].append(part)
    for row, ids in enumerate(sequences.ids):
        whole = torch.cat(found[row])
        expected = reference(graph, ids[: len(whole)])
        error = float((whole - expected).norm() / expected.norm())
        assert error < tolerance, f"sequence {row}: relative error {error:.1e}"


PREFILL = [(0, length) for length in PROMPTS]
DECODE = [[(length + i, length + i + 1) for length in PROMPTS] for i in range(STEPS)]
MIXED = [[(0, 2), (0, 1), (0, 7)], [(2, 5), (1, 2), (7, 14)], [(5, 8), (2, 4), (14, 15)], [(8, 8), (4, 4), (15, 17)]]


@pytest.mark.parametrize("name", ["demo", "llama", "mistral", "qwen2", "qwen3", "gemma2", "gpt2", "phi", "phi3"])
def test_prompts_then_steps(name: str) -> None:
    check(fused(name), [PREFILL, *DECODE])


@pytest.mark.parametrize("name", ["mistral", "qwen3", "phi"])
def test_pages_of_int8(name: str) -> None:
    """As near as 8 bits are."""
    check(fused(name), [PREFILL, *DECODE], 2e-2, kv_group=32)


def test_pages_of_int8_are_written_by_a_kernel_of_their_own() -> None:
    plain, int8 = (compose(fused("demo"), dtype="bf16", tokens=1, kv_group=group) for group in (0, 64))
    writes = [
        [step.kernel.name for step in made.steps if step.kernel].count("rotary_cache_write") for made in (plain, int8)
    ]
    assert writes == [0, 5]


def test_quality_of_int8_keys_and_values() -> None:
    """The KL divergence of the demo model's next tokens, over held-out text: at most a thousandth of a nat."""
    tokenizer = AutoTokenizer.from_pretrained(DEMO.parent)
    texts = [source.text for source in train_demo.standard_library()[0] if source.held_out and len(source.text) > 9000]
    graph, positions = fused("demo"), torch.arange(512, dtype=torch.int32)
    table = torch.randperm(32, dtype=torch.int32)
    found: list[Tensor] = []
    for group in (0, 64):
        stepper = Stepper(
            graph, dtype="fp32", device="cpu", pages=32, positions=512, kernels="reference", kv_group=group
        )
        logits = []
        for text in texts[:2]:
            made = stepper.bound(512, decode=False)(
                tokens=torch.tensor(tokenizer.encode(text)[:512], dtype=torch.int32), positions=positions,
                slot_mapping=(table[positions // 16] * 16 + positions % 16)[None], block_table=table[None, None],
                context_lens=torch.tensor([512], dtype=torch.int32), longest=512,
                query_starts=torch.tensor([0, 512], dtype=torch.int32),
            )  # fmt: skip
            logits.append(made[graph.outputs[0].name].clone())
        found.append(torch.cat(logits).double().log_softmax(-1))
    plain, int8 = found
    divergence = (plain.exp() * (plain - int8)).sum(-1)
    assert float(divergence.mean()) <= 1e-3
    assert float((plain.argmax(-1) == int8.argmax(-1)).double().mean()) >= 0.98


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_chunks_beside_steps(name: str) -> None:
    check(fused(name), MIXED)


@pytest.mark.parametrize(
    ("name", "layers"), [("demo", 5), ("llama", 2), ("qwen2", 2), ("qwen3", 2), ("mistral", 2), ("phi3", 2)]
)
def test_a_step_is_five_kernels_a_layer(name: str, layers: int) -> None:
    program = compose(fused(name), dtype="bf16", tokens=1)
    assert [step.kernel.name for step in program.steps[1:6] if step.kernel] == [
        "linear", "paged_decode", "linear", "linear", "linear"
    ]  # fmt: skip
    tied = name == "demo"  # its last product's weight is the embedding too, and takes no scale in
    assert len(program.steps) == 1 + 5 * layers + 1 + tied  # the embedding before, the vocabulary after
    assert all(step.kernel is not None for step in program.steps)


def test_layers_share_kernels_and_memory() -> None:
    program = compose(fused("demo"), dtype="bf16", tokens=1)
    assert len(program.kernels) == 8  # five of a layer; the embedding, the last norm and the last product
    places = {getattr(a, "place", None) for step in program.steps for a in step.arguments} - {None}
    assert len(places) == 5


def _first(graph: Graph, op: str) -> Node:
    return next(node for node in graph.nodes if node.op == op)


def _constant(graph: Graph, *shape: int, fill: float = 0.5) -> Value:
    return graph.constant(Array.of(np.full(shape, fill, np.float32), DType.FLOAT32))


def _after_embedding(graph: Graph, build: Callable[[Value], Value]) -> None:
    """Puts nodes between the embedding and what reads it."""
    value = _first(graph, "Gather").output
    readers = list(value.uses)
    made = build(value)
    for node, index in readers:
        graph.set_input(node, index, made)


def _swapped_cache(graph: Graph) -> None:
    attention = _first(graph, "attention")
    k, v = attention.inputs[1:3]
    graph.set_input(attention, 1, v)
    graph.set_input(attention, 2, k)


def _number_in_mask(graph: Graph) -> None:
    graph.set_input(_first(graph, "Where"), 1, _constant(graph, 1, 4, 1, 1))


def _weak_mask(graph: Graph) -> None:
    graph.set_input(_first(graph, "Where"), 2, _constant(graph, fill=-1.0))


def _mixed_tokens(graph: Graph) -> None:
    def build(value: Value) -> Value:
        assert value.shape is not None
        B, S, D = value.shape
        turned = graph.add("Reshape", [value], {"shape": (B, 4, S, int(D) // 4)}).output
        return graph.add("Reshape", [turned], {"shape": (B, S, D)}).output

    _after_embedding(graph, build)


def _reversed_tokens(graph: Graph) -> None:
    bounds = {"starts": (-1,), "ends": (-(2**31),), "axes": (-2,), "steps": (-1,)}
    _after_embedding(graph, lambda value: graph.add("Slice", [value], bounds).output)


def _summed_tokens(graph: Graph) -> None:
    _after_embedding(graph, lambda value: graph.add("Softmax", [value], {"axis": -2}).output)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (_swapped_cache, "attention .* not those of one cache"),
        (_number_in_mask, "attention .* adds other numbers"),
        (_weak_mask, "attention .* adds other numbers"),
        (_mixed_tokens, "Reshape .* each token by itself"),
        (_reversed_tokens, "Slice .* along the tokens"),
        (_summed_tokens, "Softmax .* along the tokens"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
@pytest.mark.parametrize("tokens", [1, 100])
def test_what_is_not_done_to_each_token_is_refused(change: Callable[[Graph], None], reason: str, tokens: int) -> None:
    graph = fused("mistral" if change in (_number_in_mask, _weak_mask) else "llama").clone()
    change(graph)
    graph.sort()
    infer(graph)
    graph.validate()
    with pytest.raises(UnsupportedOperator, match=reason):
        compose(graph, dtype="bf16", tokens=tokens)


def test_an_encoder_is_refused_by_name() -> None:
    with pytest.raises(UnsupportedOperator, match="no step over pages"):
        compose(fused("bert"), dtype="bf16", tokens=1)


def test_a_step_has_a_token_or_more() -> None:
    with pytest.raises(UsageError, match="1 or more tokens, not 0"):
        compose(fused("llama"), dtype="bf16", tokens=0)


@pytest.mark.parametrize("name", ["w8a8", "fp8"])
def test_quantized_inputs_are_multiplied_in_eight_bits(name: str) -> None:
    graph = importer.load(DEMO)
    canonicalize(graph)
    graph = quantize(graph, name)
    rewrite(graph, patterns.ALL)
    check(graph, [PREFILL, *DECODE[:2]], tolerance=0.1, dtype="bf16")  # what is rounded may fall to the other side
    for tokens, family in ((3, Linear), (100, Matmul)):
        steps = compose(graph, dtype="bf16", tokens=tokens, page=PAGE, decode=tokens == 3).steps
        eights = [step for step in steps if getattr(step.what, "kind", "") or getattr(step.what, "rounds", False)]
        assert sum(isinstance(step.what, family) for step in eights) == 4 * 5
        assert sum(isinstance(step.what, Rounding) for step in eights) == 4 * 5
        assert sum(isinstance(step.what, Rounding) and step.what.norm == "rms" for step in eights) == 2 * 5


@pytest.mark.parametrize("name", ["int4", "int8:32", "int4:64:asymmetric", "nf4"])
def test_quantized_weights_are_read_as_codes(name: str) -> None:
    """Prompts by products with the weights that codes stand for, steps by kernels that read codes."""
    graph = importer.load(DEMO)
    canonicalize(graph)
    graph = quantize(graph, name)
    rewrite(graph, patterns.ALL)
    check(graph, [PREFILL, *DECODE[:2]], tolerance=3e-2, dtype="bf16")
    kernels = compose(graph, dtype="bf16", tokens=3, page=PAGE).steps
    assert sum(step.what.format is not None for step in kernels if isinstance(step.what, Linear)) == 4 * 5
    plain = compose(graph, dtype="bf16", tokens=3, page=PAGE, codes=False).steps
    assert not any(step.what.format for step in plain if isinstance(step.what, Linear))
