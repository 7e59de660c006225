"""Does the numeric check of rewrites notice what it is there for? One node of a correct region is changed at a time."""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import onnx
import pytest
import torch

import fuser
from fuser import checking, patterns
from fuser.canonicalize import canonicalize
from fuser.checking import Checker, Rewrite
from fuser.constants import Array
from fuser.dtypes import DType
from fuser.fused import FusedOp
from fuser.graph import FUSER, MICROSOFT, Graph, Node, Value
from fuser.matching import CHECK, Matcher, operator_counts
from fuser.patterns.rms_norm import rms_norm
from fuser.rewriting import rewrite
from tests import instances, text_graphs, zoo

DETECTED = 0.95


@cache
def _sound() -> list[instances.Instance]:
    return [instance for operator in patterns.ALL for instance in instances.instances(operator)]


def _proposal(instance: instances.Instance) -> Rewrite:
    """The rewrite of an instance, in a graph of its own."""
    graph = instance.graph.clone()
    canonicalize(graph)
    for source in (instance.source, *instance.operator.sources):
        matcher = Matcher(graph, source, operator_counts(graph))
        for anchor in matcher.candidates():
            match = matcher.match(anchor)
            if match is not None:
                inputs, attributes = source.read(match)
                return Rewrite(match.region, match.outputs, instance.operator, inputs, attributes, match.context)
    raise AssertionError(f"{instance} does not match")


@pytest.mark.parametrize("instance", _sound(), ids=str)
def test_a_sound_rewrite_passes(instance: instances.Instance) -> None:
    assert Checker(instance.graph.opset).check(_proposal(instance)) is None


# Changes to one node: what each does to it; each gives one name for every way it can be made.

OTHER_OPERATOR = {
    "Add": ("Sub", ""),
    "Sub": ("Add", ""),
    "Mul": ("Div", ""),
    "Div": ("Mul", ""),
    "ReduceMean": ("ReduceSum", ""),
    "Rsqrt": ("Reciprocal", ""),
    "Reciprocal": ("Rsqrt", FUSER),
    "Sigmoid": ("Tanh", ""),
    "Tanh": ("Sigmoid", ""),
    "Erf": ("Tanh", ""),
    "Exp": ("Softplus", ""),
    "Neg": ("Abs", ""),
    "LayerNormalization": ("RMSNormalization", ""),
    "rms_norm": ("layer_norm", FUSER),
    "layer_norm": ("rms_norm", FUSER),
    "silu": ("gelu", FUSER),
    "gelu": ("gelu_tanh", FUSER),
    "gelu_tanh": ("gelu", FUSER),
    "QuickGelu": ("Gelu", MICROSOFT),
    "FastGelu": ("Gelu", MICROSOFT),
}
Mutation = tuple[str, Callable[[Node, Rewrite], None]]


def _replaced(number: int, make: Callable[[Value], Value]) -> Callable[[Node, Rewrite], None]:
    def mutate(node: Node, rewrite: Rewrite) -> None:
        value = node.inputs[number]
        assert value is not None
        node.inputs[number] = make(value)

    return mutate


def _constant(value: Value, change: Callable[[np.ndarray], np.ndarray]) -> Value:
    assert value.constant is not None and value.dtype is not None
    changed = Array.of(change(value.constant.numpy().astype(np.float64)), value.dtype)
    return Value(f"{value.name}_changed", value.dtype, value.shape, constant=changed)


def _attribute(name: str, value: Any) -> Callable[[Node, Rewrite], None]:
    def mutate(node: Node, rewrite: Rewrite) -> None:
        node.attributes[name] = value

    return mutate


def _operator(node: Node, rewrite: Rewrite) -> None:
    node.op, node.domain = OTHER_OPERATOR[node.op]
    if node.op in ("Gelu", "RMSNormalization"):
        node.attributes.pop("alpha", None)
        del node.inputs[2:]
    if node.op == "rms_norm":
        del node.inputs[2:]


def _swap_outputs(node: Node, rewrite: Rewrite) -> None:
    node.outputs[-2:] = node.outputs[:-3:-1]


def _swap_weights(node: Node, rewrite: Rewrite) -> None:
    """This linear reads the next one's weight, which reads this one's."""
    others = [other for other in rewrite.region if other.op == "MatMul" and other is not node]
    other = next(o for o in others if o.inputs[1].shape == node.inputs[1].shape)  # type: ignore[union-attr]
    node.inputs[1], other.inputs[1] = other.inputs[1], node.inputs[1]


def _mutations(node: Node, rewrite: Rewrite) -> Iterator[Mutation]:
    given = {id(v) for v in rewrite.inputs if isinstance(v, Value)}
    leaves = {id(leaf) for c in rewrite.inputs if (d := getattr(c, "constant", c)) is not None for leaf in d.leaves()}
    if node.op in OTHER_OPERATOR:
        yield "another operator", _operator
    for number, value in enumerate(node.inputs):
        if value is None:
            continue
        if value.constant is None:
            # Not what a node of the region makes: another tensor like it.
            twin = Value(f"{value.name}_twin", value.dtype, value.shape)
            yield f"input {number} is another tensor", _replaced(number, lambda _, twin=twin: twin)  # type: ignore[misc]
        elif id(value) in given or id(value.constant) in leaves or set(map(id, value.constant.leaves())) <= leaves:
            neutral = np.zeros_like if node.op == "Add" or number > 1 else np.ones_like
            yield f"weight {number} is dropped", _replaced(number, lambda v, n=neutral: _constant(v, n))  # type: ignore[misc]
        else:
            if value.scalar is not None and (value.scalar == 0 or np.isinf(value.scalar)):
                yield f"number {number} is one", _replaced(number, lambda v: _constant(v, np.ones_like))
                continue
            factor = 2.0 if abs(value.scalar or 1.0) < 1e-1 and node.op == "Add" else 1.01
            change = lambda v, f=factor: _constant(v, lambda a: a * f)  # type: ignore[misc]  # noqa: E731
            yield f"number {number} times {factor}", _replaced(number, change)
    if node.op in ("Sub", "Div"):
        yield "inputs swapped", lambda node, _: node.inputs.reverse()
    for name, value in node.attributes.items():
        if name in ("eps", "epsilon"):
            yield f"{name} doubled", _attribute(name, 2 * value)
        elif name in ("axis", "axes") and node.outputs[0].rank != 1 and node.op != "Split":
            yield f"{name} one less", _attribute(name, value - 1 if name == "axis" else (value[0] - 1,))
        elif name == "keepdims":
            yield "keepdims flipped", _attribute(name, 1 - value)
        elif name == "alpha":
            yield "alpha 1.702", _attribute(name, 1.702)
        elif name == "approximate":
            yield "approximate flipped", _attribute(name, "none" if value == "tanh" else "tanh")
        elif name == "split" and len(set(value)) > 1:
            yield "sizes permuted", _attribute(name, (*value[1:], value[0]))
            yield "sizes off by one", _attribute(name, (value[0] - 1, value[1] + 1, *value[2:]))
    if node.op == "Split":
        yield "outputs permuted", _swap_outputs
    shapes = Counter(other.inputs[1].shape for other in rewrite.region if other.op == "MatMul" and other.inputs[1])
    if node.op == "MatMul" and node.inputs[1] is not None and shapes[node.inputs[1].shape] > 1:
        yield "weights of two linears swapped", _swap_weights


@dataclass
class Trial:
    instance: str
    node: str
    mutation: str
    verdict: str | None


def _trials(operator: FusedOp) -> Iterator[Trial]:
    for instance in _sound():
        if instance.operator is not operator:
            continue
        count = [len(list(_mutations(node, p))) for p in [_proposal(instance)] for node in p.region]
        for place, mutations in enumerate(count):
            for which in range(mutations):
                proposal = _proposal(instance)
                node = proposal.region[place]
                text = repr(node)
                name, mutate = list(_mutations(node, proposal))[which]
                mutate(node, proposal)
                yield Trial(str(instance), text, name, Checker(instance.graph.opset).check(proposal))


@pytest.mark.parametrize("operator", [op for op in patterns.ALL if op.sources], ids=lambda operator: operator.name)
def test_a_changed_region_is_refused(operator: FusedOp) -> None:
    trials = list(_trials(operator))
    survivors = [trial for trial in trials if trial.verdict is None]
    print(f"\n{operator.name}: {len(trials) - len(survivors)} of {len(trials)} refused")
    for trial in survivors:
        print(f"  {trial.instance}: {trial.mutation} in {trial.node}")
    assert len(trials) - len(survivors) >= DETECTED * len(trials) and trials


WIDE: dict[str, dict[str, Any]] = {
    "rms_norm": {"B": (2, 3), "D": 640, "eps": 1e-5},
    "layer_norm": {"B": (2, 3), "D": 640, "eps": 1e-5},
    "skip_rms_norm": {"B": (2, 3), "D": 640, "eps": 1e-5},
    "gated_mlp": {"B": (2, 3), "F": 640, "activation": "silu"},
    "packed_linear": {"B": (2, 3), "D": 384, "N": 640, "sizes": (320, 160, 160), "role": "qkv"},
}


@pytest.mark.parametrize("name", WIDE)
def test_shrinking_does_not_change_a_verdict(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    operator = next(op for op in patterns.ALL if op.name == name)
    instance = next(instances.variants(operator, operator.sources[0], WIDE[name]))
    assert checking._shrinkable(_proposal(instance)), "nothing shrinks: this test shows nothing"
    makers: list[Callable[[], Rewrite]] = [lambda: _proposal(instance)]
    for place, node in enumerate(_proposal(instance).region):
        for which in range(len(list(_mutations(node, _proposal(instance))))):

            def make(place: int = place, which: int = which) -> Rewrite:
                proposal = _proposal(instance)
                node = proposal.region[place]
                list(_mutations(node, proposal))[which][1](node, proposal)
                return proposal

            makers.append(make)
    shrunk = [Checker(23).check(make()) is None for make in makers]
    monkeypatch.setattr(checking, "_shrinkable", lambda rewrite: {})
    whole = [Checker(23).check(make()) is None for make in makers]
    assert shrunk == whole
    assert shrunk[0] and len(shrunk) > 3


@pytest.mark.parametrize(("divisor", "sound"), [(640, True), (639, False)])
def test_a_number_that_depends_on_a_size_is_checked_at_that_size(divisor: int, sound: bool) -> None:
    made = instances.variants(rms_norm, rms_norm.sources[0], WIDE["rms_norm"])
    proposal = _proposal(next(instance for instance in made if instance.dtype is DType.FLOAT32))
    mean = next(node for node in proposal.region if node.op == "ReduceMean")
    part = Graph(opset=23)
    total = part.add("ReduceSum", mean.inputs, {"axes": (-1,), "keepdims": 1})
    assert mean.output.shape is not None
    total.output.dtype, total.output.shape = DType.FLOAT32, mean.output.shape
    share = part.constant(Array.of(1.0 / divisor, DType.FLOAT32))
    scaled = Node("Mul", [total.output, share], mean.outputs)
    at = proposal.region.index(mean)
    region = [*proposal.region[:at], total, scaled, *proposal.region[at + 1 :]]
    verdict = Checker(23).check(Rewrite(region, proposal.outputs, rms_norm, proposal.inputs, proposal.attributes))
    assert (verdict is None) is sound


def _stack(epsilons: list[float]) -> onnx.ModelProto:
    """One block after another: norm, linear, residual."""
    constants, nodes = [], []
    x = "x"
    for i, eps in enumerate(epsilons):
        constants.append(f"float[16] w{i}, float[16, 16] m{i}, float eps{i} = {{{eps}}}")
        nodes.append(f"""
            a{i} = Mul({x}, {x})  b{i} = ReduceMean(a{i}, last)  c{i} = Add(b{i}, eps{i})  d{i} = Sqrt(c{i})
            e{i} = Div({x}, d{i})  f{i} = Mul(e{i}, w{i})  g{i} = MatMul(f{i}, m{i})  x{i} = Add({x}, g{i})""")
        x = f"x{i}"
    return text_graphs.parse(f"""<ir_version: 10, opset_import: ["" : 20]>
        g (float[batch, seq, 16] x) => (float[batch, seq, 16] {x})
        <int64[1] last = {{-1}}, {", ".join(constants)}> {{ {"".join(nodes)} }}""")


@pytest.mark.parametrize(
    ("epsilons", "structures"),
    [([1e-5] * 32, 2), ([1e-5] * 16 + [1e-6] * 16, 4)],  # the first norm and those with a residual: two of each kind
)
def test_each_structure_is_evaluated_once(
    epsilons: list[float], structures: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    compared = []
    compare = Checker._compare
    monkeypatch.setattr(Checker, "_compare", lambda *args: compared.append(args) or compare(*args))
    outcome = rewrite(text_graphs.canonical(_stack(epsilons)), patterns.ALL)
    assert outcome.fused == {"rms_norm": 1, "skip_rms_norm": 31}
    assert len(compared) == outcome.checked == structures
    assert outcome.checked + outcome.reused == 32 + 31


def test_weights_are_no_part_of_a_structure_and_numbers_are() -> None:
    def key(seed: int, eps: float) -> Any:
        model = _stack([eps])
        weight = next(t for t in model.graph.initializer if t.name == "w0")
        drawn = np.random.RandomState(seed).standard_normal(16).astype(np.float32)
        weight.CopyFrom(onnx.numpy_helper.from_array(drawn, "w0"))
        graph = text_graphs.canonical(model)
        matcher = Matcher(graph, rms_norm.sources[0], operator_counts(graph))
        match = next(m for anchor in matcher.candidates() if (m := matcher.match(anchor)) is not None)
        inputs, attributes = rms_norm.sources[0].read(match)
        return checking.structure(Rewrite(match.region, match.outputs, rms_norm, inputs, attributes))

    assert key(0, 1e-5) == key(1, 1e-5) != key(0, 1e-6)


def _wrong(x: torch.Tensor, weight: torch.Tensor | None = None, *, eps: float) -> torch.Tensor:
    """rms_norm that adds the epsilon after the root."""
    wide = x if x.dtype == torch.float64 else x.float()
    y = wide / (wide.square().mean(-1, keepdim=True).sqrt() + eps)
    return (y if weight is None else y * weight.to(y.dtype)).to(x.dtype)


def test_a_disagreement_drops_the_rewrite_and_is_reported(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    path = zoo.exported("llama", "torchscript")
    monkeypatch.setattr(rms_norm, "reference", _wrong)
    made = fuser.fuse(path)
    made.save(tmp_path / "fused.onnx")
    assert made.report.fused == {
        "qkv_linear": 2, "gate_up_linear": 2, "gated_mlp": 2, "attention_mask": 1, "rotary_table": 1, "rotary_cache_write": 2,
        "attention": 2,
    }  # fmt: skip
    (miss,) = made.report.misses
    assert (miss.fusion, miss.rank, miss.count) == ("rms_norm", CHECK, 5)
    assert miss.module == "model.model.layers.0.input_layernorm"
    assert miss.expected.startswith("the fused node must compute the same as the")
    assert "differs by" in miss.found and "float64" in miss.found
    explained = " ".join(made.explain().split())
    assert "rms_norm missed: see 1" in explained and "and 4 more places" in explained and miss.found in explained
    written = {node.op_type for node in onnx.load(tmp_path / "fused.onnx").graph.node}
    assert not written & {"SimplifiedLayerNormalization", "SkipSimplifiedLayerNormalization"}
    feeds = zoo.cases(path)["padded"]
    assert zoo.relative_error(zoo.run(tmp_path / "fused.onnx", feeds), zoo.run(path, feeds, optimize=False)) <= 2e-5


def test_a_less_precise_fused_node_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Right in float64, but rounding to float16 on the way where the region keeps float32."""
    instance = next(i for i in _sound() if i.operator is rms_norm and i.dtype is DType.FLOAT16)
    exact = rms_norm.reference

    def coarse(x: torch.Tensor, weight: torch.Tensor | None = None, *, eps: float) -> torch.Tensor:
        if x.dtype == torch.float64:
            return exact(x, weight, eps=eps)
        return exact((x * 100).to(torch.float8_e4m3fn).to(x.dtype) / 100, weight, eps=eps)

    monkeypatch.setattr(rms_norm, "reference", coarse)
    verdict = Checker(23).check(_proposal(instance))
    assert verdict is not None and "less precise" in verdict


def test_without_verification_nothing_is_evaluated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rms_norm, "reference", _wrong)
    graph = text_graphs.canonical(_stack([1e-5]))
    outcome = rewrite(graph, patterns.ALL, verify=False)
    assert outcome.fused == {"rms_norm": 1}
    assert outcome.checked == 0
