"""What a composed step must not get wrong: decoders that are changed in one place are refused there, or computed rightly."""

from tests.interpreter import DEVICE  # isort: skip

from collections.abc import Callable, Iterable

import numpy as np
import pytest
import torch

import fuser
from fuser.codegen.compose import compose
from fuser.constants import Array
from fuser.dims import Shape
from fuser.dtypes import DType
from fuser.errors import UnsupportedOperator, UsageError
from fuser.graph import FUSER, Graph, Node, Value
from fuser.shapes import infer
from fuser.stepping import Stepper
from tests import architectures
from tests.test_stepper import DECODE, PREFILL, Sequences, check, fused

Change = Callable[[Graph], None]


def first(graph: Graph, op: str) -> Node:
    return next(node for node in graph.nodes if node.op == op)


def constant(graph: Graph, *shape: int) -> Value:
    drawn = np.random.RandomState(0).standard_normal(shape).astype(np.float32) * 0.3
    return graph.constant(Array.of(drawn, DType.FLOAT32))


def then(op: str, *inputs: tuple[int, ...], node: str = "Gather", **attributes: object) -> Change:
    """An operator after a node, by default after the embedding, with weights of the given shapes as further inputs."""

    def change(graph: Graph) -> None:
        value = first(graph, node).output
        insert(graph, value, [(op, attributes, [constant(graph, *shape) for shape in inputs])])

    return change


def insert(graph: Graph, value: Value, steps: Iterable[tuple[str, dict[str, object], list[Value]]]) -> None:
    """Puts operators one after another between a value and those who read it."""
    readers, made = list(value.uses), value
    for op, attributes, others in steps:
        made = graph.add(op, [made, *others], attributes).output
    for reader, index in readers:
        graph.set_input(reader, index, made)


def by_head(*steps: tuple[str, dict[str, object], tuple[int, ...]], first_heads: bool = False) -> Change:
    """Operators on the embedding as four heads of 16, [B, S, 4, 16] or [B, 4, S, 16]."""

    def change(graph: Graph) -> None:
        value = first(graph, "Gather").output
        B, S, D = shape_of(value)
        swapped: list[tuple[str, dict[str, object], list[Value]]] = [("Transpose", {"perm": (0, 2, 1, 3)}, [])]
        inner = [(op, attributes, [constant(graph, *shape)] if shape else []) for op, attributes, shape in steps]
        swap = swapped if first_heads else []
        whole = ("Reshape", {"shape": (B, S, D)}, list[Value]())
        insert(graph, value, [("Reshape", {"shape": (B, S, 4, 16)}, []), *swap, *inner, *swap, whole])

    return change


def shape_of(value: Value) -> Shape:
    assert value.shape is not None
    return value.shape


def inverted(graph: Graph) -> None:
    """Lets through what the mask hides."""
    where = first(graph, "Where")
    for index, held in ((1, -1e9), (2, 0.0)):
        graph.set_input(where, index, graph.constant(Array.of(np.float32(held), DType.FLOAT32)))


def transposed_norm(graph: Graph) -> None:
    """A norm over the tokens."""
    value = first(graph, "Gather").output
    readers = list(value.uses)
    turned = graph.add("Transpose", [value], {"perm": (0, 2, 1)}).output
    normed = graph.add("layer_norm", [turned], {"eps": 1e-5}, domain=FUSER).output
    back = graph.add("Transpose", [normed], {"perm": (0, 2, 1)}).output
    for reader, index in readers:
        graph.set_input(reader, index, back)


def restarted(graph: Graph) -> None:
    """Counts positions from the first of the new tokens, whatever is before."""
    start = first(graph, "position_ids").inputs[1]
    assert start is not None and start.producer is not None
    start.producer.attributes["dims"], start.content = 0, 0


def told(graph: Graph) -> None:
    mask = first(graph, "attention_mask").output
    mask.is_output = True
    graph.outputs.append(mask)


def changed(change: Change, name: str = "llama") -> Graph:
    graph = fused(name).clone()
    change(graph)
    graph.sort()
    infer(graph)
    graph.validate()
    return graph


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        pytest.param(inverted, "attention .*: its mask adds other numbers than 0 and the lowest", id="inverted mask"),
        pytest.param(then("CumSum", axis=1), "CumSum .*: what it does is not known", id="sums"),
        pytest.param(then("ReduceMean", axes=(1,), keepdims=1), "ReduceMean .*: what it does", id="mean"),
        pytest.param(transposed_norm, "layer_norm .*: it works along the tokens", id="norm"),
        pytest.param(told, "attention_mask .* is no row for each token", id="mask told"),
    ],
)
def test_what_is_not_done_token_by_token_is_refused(change: Change, reason: str) -> None:
    graph = changed(change)
    for decode in (True, False):
        with pytest.raises(UnsupportedOperator, match=f"no step over pages: {reason}"):
            compose(graph, dtype="fp32", tokens=3, decode=decode)


def test_positions_that_start_anew_are_refused() -> None:
    graph = changed(restarted, "llama_counting")
    with pytest.raises(UnsupportedOperator, match="does not hold the positions of tokens"):
        compose(graph, dtype="fp32", tokens=3)


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(by_head(("MatMul", {}, (16, 16))), id="one matrix for every head"),
        pytest.param(by_head(("MatMul", {}, (4, 16, 16)), first_heads=True), id="a matrix for each head"),
        pytest.param(by_head(("Mul", {}, (4, 1))), id="a number for each head"),
        pytest.param(by_head(("Softmax", {"axis": -1}, ()), first_heads=True), id="softmax of heads"),
        pytest.param(then("Add", (64,), node="MatMul"), id="bias"),
        pytest.param(then("Add", (112,), node="gated_mlp"), id="bias after the gate"),
    ],
)
def test_what_kernels_do_not_have_is_computed_beside_them(change: Change) -> None:
    check(changed(change), [PREFILL, DECODE[0]])


def test_biases_add_up() -> None:
    graph = fused("llama").clone()
    insert(graph, first(graph, "MatMul").output, [("Add", {}, [constant(graph, 64)]) for _ in range(2)])
    graph.sort()
    infer(graph)
    check(graph, [PREFILL, DECODE[0]])


@pytest.mark.parametrize("name", [pytest.param("llama", marks=pytest.mark.slow), "opt", "gemma3"])
def test_captured_modules(name: str) -> None:
    check(fuser.compile(architectures.model(name)).graph, [PREFILL, DECODE[0]])


def test_layers_that_share_a_cache() -> None:
    """A cache is looked back in as far as the one looks who looks furthest."""
    graph = fused("gemma2").clone()
    one, other = (node for node in graph.nodes if node.is_a("attention", FUSER))
    for index in (1, 2):
        graph.set_input(other, index, one.inputs[index])
    program = compose(graph, dtype="fp32", tokens=1)
    windows = [step.what.window for step in program.steps if step.kernel and step.kernel.name == "paged_decode"]
    assert windows == [architectures.WINDOW, None]
    assert program.states[0].window is None


def test_inputs_that_do_not_fit_are_refused() -> None:
    sequences = Sequences(architectures.V)
    stepper = Stepper(fused("llama"), dtype="fp32", device=DEVICE, pages=sequences.pages, page=4, positions=64)
    given = sequences.inputs(DECODE[0])
    with pytest.raises(UsageError, match="1 to 2 tokens, not 3"):
        stepper.bound(2, decode=True)(**given)
    bound = stepper.bound(4, decode=True)
    for name, wrong, reason in (
        ("positions", torch.zeros(2, dtype=torch.int32), r"positions must be \[3\], got \[2\]"),
        (
            "positions",
            torch.zeros(3, dtype=torch.int64),
            "positions must be a contiguous int32 tensor, got torch.int64",
        ),
        ("slot_mapping", None, "slot_mapping must be a contiguous int32 tensor, got None"),
        ("block_table", torch.zeros(1, 2, 5, dtype=torch.int32), r"block_table must be \[1, 3, 5\], got \[1, 2, 5\]"),
        ("context_lens", torch.zeros(2, dtype=torch.int32), "3 tokens of 2 sequences"),
    ):
        with pytest.raises(UsageError, match=reason):
            bound(**(given | {name: wrong.to(DEVICE) if wrong is not None else None}))
    with pytest.raises(UsageError, match="longest must be a number"):
        stepper.bound(20, decode=False)(**(sequences.inputs(PREFILL) | {"longest": None}))


def test_more_positions_than_are_embedded_are_refused() -> None:
    with pytest.raises(UsageError, match="80 positions, not 81"):
        Stepper(fused("gpt2"), dtype="fp32", device=DEVICE, pages=2, positions=architectures.MAX_POSITIONS + 1)
