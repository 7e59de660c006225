"""The diff of a graph and what was fused in it: by the record exactly; and of two files, with and without one."""

import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import ModelProto, numpy_helper

import fuser
from fuser import api
from fuser.diff import comparison
from fuser.diff.alignment import Alignment, compared
from fuser.diff.document import Document
from fuser.diff.structure import Structure, Table
from fuser.fused import REGISTRY
from fuser.graph import FUSER
from fuser.importer import from_proto, read_model
from tests import models, zoo

DEMO = Path(__file__).parent.parent / "models" / "demo" / "model.onnx"
OPTIMUM = sorted(zoo.OPTIMUM.glob("*.onnx"))
ALIGNED = 0.95  # of the untouched nodes


def labels(path: Path) -> list[str]:
    """What a record calls the nodes of a file, in order; constants are no nodes."""
    nodes = [node for node in read_model(path).graph.node if node.op_type != "Constant"]
    return [node.name or node.output[0] for node in nodes]


# By the record.


@pytest.mark.parametrize("path", [DEMO, *OPTIMUM], ids=lambda path: path.stem)
def test_regions_are_the_rewrites_own_record(path: Path) -> None:
    fused = fuser.fuse(path, verify=False)
    document = fused.diff().document
    names = labels(path)
    nodes = list(fused.graph.nodes)
    found: Counter[tuple[str, frozenset[str]]] = Counter()
    for number, node in enumerate(nodes):
        regions = [region for region in document.regions if number in region.after]
        if node.domain != FUSER or node.op not in REGISTRY:
            continue
        (region,) = regions
        sources = frozenset(names[source] for source in region.before)
        assert sources == {*node.origin.sources}
        found[document.patterns[region.pattern].name, sources] += 1
    assert report_of(fused) == found and found


def report_of(fused: api.FusedModel) -> Counter[tuple[str, frozenset[str]]]:
    """What rewriting recorded of the fused nodes."""
    assert fused.report.explanation is not None
    return Counter((c.kind, frozenset(c.sources)) for c in fused.report.explanation.constructs if c.reason is None)


def test_every_node_is_somewhere() -> None:
    """A source node is in a region, has a counterpart or is removed; one of the result is in a region, has one or is new."""
    document = fuser.fuse(DEMO, verify=False).diff().document
    inside = {number for region in document.regions for number in region.after}
    kept = {change.after for change in document.kept()}
    assert inside | kept == set(range(len(document.after.nodes))) and not inside & kept
    same = [(document.before.nodes[a], document.after.nodes[b]) for a, b in document.pairs]
    assert same and all(a.op == b.op and a.attributes == b.attributes for a, b in same)


def test_the_record_of_a_file(tmp_path: Path) -> None:
    """A file that fuser wrote says of its nodes what they stand for; the diff of the two files shows just that."""
    for target in ("ort", "functions"):
        fused = fuser.fuse(DEMO, verify=False, target=target)
        fused.save(tmp_path / "fused.onnx")
        document = comparison.of_files(DEMO, tmp_path / "fused.onnx").document
        after = {node.name: node for node in read_model(tmp_path / "fused.onnx").graph.node}
        names = labels(DEMO)
        recorded = [frozenset(node.origin.sources) for node in fused.graph.nodes if node.domain == FUSER]
        for region in document.regions:
            said = {
                source
                for number in region.after
                for entry in after[document.after.nodes[number].name].metadata_props
                if entry.key == "fuser.sources"
                for source in entry.value.split(", ")
            }
            assert {names[source] for source in region.before} == said
        found = [frozenset(names[source] for source in region.before) for region in document.regions]
        norms = [sources for sources in recorded if any("pow" in source for source in sources)]
        assert len(norms) >= 11 and all(sources in found for sources in norms)
        assert {"Pow", "Softmax", "Sigmoid"} <= {
            document.before.nodes[source].op for region in document.regions for source in region.before
        }


def test_a_file_that_fuser_wrote_and_itself(tmp_path: Path) -> None:
    for target in ("ort", "functions"):
        fuser.fuse(DEMO, verify=False, target=target).save(tmp_path / "fused.onnx")
        document = comparison.of_files(tmp_path / "fused.onnx", tmp_path / "fused.onnx").document
        assert document.pairs == [(n, n) for n in range(len(document.before.nodes))]
        assert not document.regions and not document.changed


def test_notes_and_savings() -> None:
    fused = fuser.fuse(DEMO)
    document = fused.diff().document
    kinds = {document.patterns[region.pattern].name: region for region in document.regions}
    assert kinds["skip_rms_norm"].note.startswith("checked, error ")
    assert 0 < float(kinds["attention"].note.split()[-1]) < 1e-5
    assert kinds["attention_mask"].note == "recognised by what it holds"
    # Add, Pow, mean, Add, Sqrt, 1/x and two Mul of 192 float32: seven of eight launches less. The norm's five interior values
    # are 192, 1, 1, 1, 1, 192 wide: written once and read once.
    assert kinds["skip_rms_norm"].saved.endswith("7 launches")
    assert kinds["qkv_linear"].saved == "2 launches"
    rows = {row.label: row for row in document.summary}
    assert (rows["operators"].before, rows["operators"].after) == ("420", str(len(fused.graph.nodes)))
    assert rows["launches a layer"].after == "5"
    assert rows["verified error"].after == f"{fused.report.verification.max_relative_error:.1e}"
    assert [row.after for row in fuser.fuse(DEMO, verify=False).diff().document.summary][-1] == "not compared"


def test_bytes_that_a_norm_saves() -> None:
    """Pow, mean, + eps, sqrt, /: of a row of 24 float32 the square and the quotient are 96 B, the rest 4 B; each is written
    once and read once."""
    document = fuser.fuse(models.norms(), verify=False).diff().document
    (region,) = (r for r in document.regions if document.patterns[r.pattern].name == "rms_norm")
    assert [document.before.nodes[n].op for n in region.before] == ["Pow", "ReduceMean", "Add", "Sqrt", "Div", "Mul"]
    # batch and sequence have no integers to say what a token is: 1024 of each
    assert region.saved == f"{2 * (2 * 96 + 3 * 4) * 1024 * 1024 / 1e6:.1f} MB a token, 5 launches"


def test_bytes_of_codes() -> None:
    """What quantized weights take less is what a token reads less of them."""
    plain, quantized = (fuser.fuse(DEMO, verify=False, quantize=format) for format in (None, "int4"))
    rows = [{row.label: row for row in fused.diff().document.summary} for fused in (plain, quantized)]
    read, taken = (
        [float(row[label].after.removesuffix(" MB")) for row in rows] for label in ("bytes a token", "weights")
    )
    assert taken[0] - taken[1] > 4
    assert read[0] - read[1] == pytest.approx(taken[0] - taken[1], abs=0.3)
    assert rows[0]["bytes a token"].before == rows[1]["bytes a token"].before


def test_near_misses_are_marked() -> None:
    from tests import breaks

    model, broken = breaks.planted("softmax over the queries", range(breaks.LAYERS))
    document = fuser.fuse(model, verify=False).diff().document
    miss = next(miss for miss in document.misses if document.patterns[miss.pattern].name == "attention")
    assert len(miss.also) == breaks.LAYERS - 1 and miss.line.startswith("patterns/attention.py:")
    marked = {document.before.nodes[number].name for number in (miss.before, *miss.also)}
    assert marked <= broken and len(marked) == breaks.LAYERS
    assert "@@ near misses @@" in fuser.fuse(model, verify=False).diff().text()


def test_compiled_modules() -> None:
    class Gated(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.gate = torch.nn.RMSNorm(16), torch.nn.Linear(16, 16)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.silu(self.gate(self.norm(x)))

    diff = fuser.compile(Gated(), torch.randn(2, 3, 16)).diff()  # type: ignore[attr-defined]
    names = {diff.document.patterns[region.pattern].name for region in diff.document.regions}
    assert names == {"rms_norm", "silu"}


def test_names_that_two_nodes_have() -> None:
    """Names of nodes need not differ: origins call the second by what it makes."""
    model = models.norms()
    expected = fuser.fuse(model, verify=False).diff().document
    for node in model.graph.node:
        node.name = "node"
    found = fuser.fuse(model, verify=False).diff().document
    assert found.regions == expected.regions and found.pairs == expected.pairs
    assert len(expected.regions) == 3


# Without a record.


def structure(model: ModelProto, table: Table) -> Structure:
    copy = ModelProto()
    copy.CopyFrom(model)
    return Structure(from_proto(copy, Path()), table)


def alignment(before: ModelProto, after: ModelProto) -> tuple[Structure, Structure, Alignment]:
    table = Table()
    first, second = structure(before, table), structure(after, table)
    return first, second, compared(first, second)


def renamed(model: ModelProto) -> ModelProto:
    """The same with all names changed and no metadata."""
    copy, names = ModelProto(), dict[str, str]()
    copy.CopyFrom(model)

    def new(name: str) -> str:
        return names.setdefault(name, f"x{7919 * len(names) % 100_003}") if name else name

    for node in copy.graph.node:
        node.name = new(f"node {node.name or node.output[0]}")
        node.input[:], node.output[:] = [new(name) for name in node.input], [new(name) for name in node.output]
        del node.metadata_props[:]
    for entry in (*copy.graph.initializer, *copy.graph.input, *copy.graph.output, *copy.graph.value_info):
        entry.name = new(entry.name)
    return copy


FILES = {
    "demo": lambda: DEMO,
    "llama": lambda: zoo.exported("llama", "torchscript"),
    "gemma2": lambda: zoo.OPTIMUM / "gemma2.onnx",
    "bert": lambda: zoo.exported("bert", "torchscript"),
}


@pytest.mark.parametrize("name", FILES)
def test_all_names_changed(name: str) -> None:
    model = read_model(FILES[name]())
    first, _, found = alignment(model, renamed(model))
    right = sum(before == after for before, after in found.pairs)
    assert right >= ALIGNED * len(first.nodes)
    assert len(found.pairs) == len(first.nodes) and not found.changed and not found.regions


def shuffled(model: ModelProto, seed: int) -> tuple[ModelProto, list[int]]:
    """Another order of the nodes in which they can run, and the old place of each node."""
    draw, nodes = random.Random(seed), list(model.graph.node)
    made = {"", *(entry.name for entry in (*model.graph.input, *model.graph.initializer))}
    order: list[int] = []
    while len(order) < len(nodes):
        ready = [n for n, node in enumerate(nodes) if n not in set(order) and made.issuperset(node.input)]
        order.append(draw.choice(ready))
        made.update(nodes[order[-1]].output)
    copy = ModelProto()
    copy.CopyFrom(model)
    del copy.graph.node[:]
    copy.graph.node.extend(nodes[n] for n in order)
    return copy, order


@pytest.mark.parametrize("change", [lambda model: model, renamed], ids=["named", "renamed"])
def test_nodes_in_another_order(change: Callable[[ModelProto], ModelProto]) -> None:
    model = models.decoder(4)
    moved, order = shuffled(model, seed=1)
    first, _, found = alignment(model, change(moved))
    assert order != sorted(order)
    right = sum(order[after] == before for before, after in found.pairs)
    assert right >= ALIGNED * len(first.nodes) and not found.regions


def outputs(structure: Structure) -> dict[str, int]:
    return {value.name: number for number, node in enumerate(structure.nodes) for value in node.outputs}


@pytest.mark.parametrize("name", FILES)
def test_what_another_optimizer_leaves_is_found(name: str, tmp_path: Path) -> None:
    path = FILES[name]()
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.optimized_model_filepath, options.log_severity_level = str(tmp_path / "basic.onnx"), 4
    onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    model, optimized = read_model(path), read_model(tmp_path / "basic.onnx")
    first, second, found = alignment(model, optimized)
    there = outputs(second)
    # Untouched is what makes the value of the same name by the same operator.
    truth = {
        here: there[value]
        for value, here in outputs(first).items()
        if value in there and first.operators[here] == second.operators[there[value]]
    }
    pairs = {change.before: change.after for change in found.kept()}
    assert len(truth) > 0.7 * len(second.nodes)
    assert sum(pairs.get(before) == after for before, after in truth.items()) >= ALIGNED * len(truth)
    # And with all names changed, most of it still is.
    _, _, blind = alignment(model, renamed(optimized))
    pairs = {change.before: change.after for change in blind.kept()}
    assert sum(pairs.get(before) == after for before, after in truth.items()) >= 0.85 * len(truth)


def edited(model: ModelProto, layer: int) -> tuple[ModelProto, set[str]]:
    """One layer with a Gelu in place of Sigmoid and Mul, another scale and other elements in a weight; what was touched."""
    copy = ModelProto()
    copy.CopyFrom(model)
    sigmoid = [n for n, node in enumerate(copy.graph.node) if node.op_type == "Sigmoid"][layer]
    gate, product = copy.graph.node[sigmoid], copy.graph.node[sigmoid + 1]
    touched = {gate.name, product.name}
    copy.graph.node.insert(
        sigmoid, onnx.helper.make_node("Gelu", [gate.input[0]], [product.output[0]], "new", domain="com.microsoft")
    )
    del copy.graph.node[sigmoid + 1 : sigmoid + 3]
    copy.opset_import.add(domain="com.microsoft", version=1)
    softmax = [node for node in copy.graph.node if node.op_type == "Softmax"][layer]
    softmax.attribute[0].i = -2
    name = f"layers.{layer}.down"
    weight = next(tensor for tensor in copy.graph.initializer if tensor.name == name)
    weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight) * np.float32(2), name))
    return copy, touched


@pytest.mark.parametrize("change", [lambda model: model, renamed], ids=["named", "renamed"])
def test_one_layer_edited(change: Callable[[ModelProto], ModelProto]) -> None:
    model = models.decoder(6)
    other, touched = edited(model, 3)
    first, second, found = alignment(model, change(other))
    untouched = [n for n, node in enumerate(first.nodes) if node.name not in touched]
    places = {node.name: n for n, node in enumerate(structure(other, Table()).nodes)}
    pairs = {c.before: c.after for c in found.kept()}
    right = sum(pairs.get(n) == places[first.nodes[n].name] for n in untouched)
    assert right >= ALIGNED * len(untouched)
    texts = {second.operators[c.after]: c.text for c in found.changed}
    assert texts["Softmax"] == "axis: -1 -> -2"
    assert "other elements" in texts["MatMul"]
    (region,) = found.regions
    assert {first.nodes[n].name for n in region.before} == touched and region.kind == "Gelu" and not region.recorded


@pytest.mark.parametrize("name", ["then", "tensor"])
def test_what_a_node_holds_is_compared(name: str) -> None:
    def model(op: str, number: float) -> ModelProto:
        given = models.tensor("x", ["n", 3])
        body = onnx.helper.make_graph([onnx.helper.make_node(op, ["x"], ["o"])], "body", [], [models.tensor("o", None)])
        filled = numpy_helper.from_array(np.array([number], np.float32))
        nodes = [
            onnx.helper.make_node("If", ["c"], ["y"], then_branch=body, else_branch=body),
            onnx.helper.make_node("Shape", ["y"], ["s"]),
            onnx.helper.make_node("ConstantOfShape", ["s"], ["z"], value=filled),
            onnx.helper.make_node("Add", ["y", "z"], ["sum"]),
        ]
        inputs = [given, models.tensor("c", [], onnx.TensorProto.BOOL)]
        graph = onnx.helper.make_graph(nodes, "g", inputs, [models.tensor("sum", None)])
        return onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)])

    other = model("Neg", 1) if name == "then" else model("Relu", 2)
    first, _, found = alignment(model("Relu", 1), other)
    texts = {first.operators[change.before]: change.text for change in found.changed}
    assert texts == ({"If": "other contents"} if name == "then" else {"ConstantOfShape": "value: (1) -> (2)"})
    assert len(found.pairs) == 3


# Folding.


def test_layers_are_folded() -> None:
    document = fuser.fuse(zoo.exported("llama", "torchscript", layers=32), verify=False).diff().document
    for side in (document.before, document.after):
        assert [fold.layers for fold in side.folds] == [
            (0,),
            tuple(range(1, 32)),
        ]  # the first norm has no sum before it
        assert side.folds[1].label.endswith("layers.1-31")
        for fold in side.folds:
            columns = [[side.nodes[n] for n in side.members[layer]] for layer in fold.layers]
            assert len({len(column) for column in columns}) == 1
            for alike in zip(*columns, strict=True):
                assert len({(item.op, item.attributes) for item in alike}) == 1
    assert len(document.before.members[1]) > 100 and len(document.after.members[1]) == 9
    # The same fusion stands at the same place of each layer.
    pattern = {number: region.pattern for region in document.regions for number in region.after}
    for alike in zip(*(document.after.members[layer] for layer in range(1, 32)), strict=True):
        assert len({document.patterns[pattern[n]].name if n in pattern else "" for n in alike}) == 1


def in_modules(model: ModelProto, layers: int) -> ModelProto:
    """A decoder whose nodes are called as TorchScript calls them, by the module of their layer."""
    each = (len(model.graph.node) - 1 - 7) // layers  # before them the embedding, behind them a norm and a product
    for number, node in enumerate(model.graph.node[1:]):
        module = f"layers.{number // each}" if number < each * layers else "head"
        node.name = f"/model/{module}/{node.op_type}_{number % each}"
    return model


def test_unlike_layers_are_apart() -> None:
    model = in_modules(models.decoder(6), 6)
    other, _ = edited(model, 3)
    document = document_of(model, other)
    for side in (document.before, document.after):
        assert [fold.layers for fold in side.folds] == [(0, 1, 2), (3,), (4, 5)]


def document_of(before: ModelProto, after: ModelProto) -> Document:
    """The diff of two models in memory."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / name for name in ("before.onnx", "after.onnx")]
        for path, model in zip(paths, (before, after), strict=True):
            onnx.save(model, path)
        return comparison.of_files(*paths).document


def test_layers_that_take_turns_are_folded_in_pairs() -> None:
    """Every other layer of gemma2 has another mask."""
    document = fuser.fuse(zoo.exported("gemma2", "torchscript", layers=6), verify=False).diff().document
    folds = [(fold.label.rpartition(".")[2], len(fold.layers)) for fold in document.after.folds]
    assert folds == [("0", 1), ("1-4", 2), ("5", 1)]


def test_unnamed_layers_are_found() -> None:
    """A file without modules is cut where it repeats, the first and the last part aside; the other file follows it."""
    document = document_of(models.decoder(5), renamed(models.decoder(5)))
    assert [len(fold.layers) for fold in document.before.folds] == [1, 3, 1]
    assert [len(fold.layers) for fold in document.after.folds] == [1, 3, 1]
    assert "the same @@" in comparison.Diff(document).text()
