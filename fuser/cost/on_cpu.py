"""The operator table of an ONNX file in ONNX Runtime on the CPU, original and fused, by its profiler.

Each event of a node is counted for what the node is for: the fused node that stands for it, or that it came from. ONNX Runtime
does no fusions of its own meanwhile, whose nodes could not be told apart.
"""

import json
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import onnx

from fuser import api, importer
from fuser.canonicalize import canonicalize
from fuser.codegen.plan import NORMS, POSITIONAL, WRITES, Launch, at, plan
from fuser.cost.analysis import roles
from fuser.cost.profile import Measure, Profile, cpu_ceilings
from fuser.errors import InputError
from fuser.graph import FUSER, Graph, Node
from fuser.pipeline import Progress
from fuser.shapes import infer
from fuser.verification import Case, feeds
from fuser.verification import roles as inputs_of

SOURCES = "fuser.sources"  # metadata of exported nodes: the names of those that they stand for
OTHER = "other"
RUNS, WARM = 8, 2


def profile(path: Path, *, batch: int, context: int = 512, threads: int = 1, note: Progress | None = None) -> Profile:
    """The operator table of a decode step.

    Args:
        batch: sequences, a new token each, of `context` tokens with it.
        threads: of ONNX Runtime.

    Raises:
        InputError: the file cannot be read or fused, or is no model whose inputs can be made at these sizes.
    """
    note = note or (lambda stage: None)
    fused = api.fuse(path, verify=False, progress=note)
    graph = importer.load(path, None)
    infer(graph)
    canonical = importer.load(path, None)
    canonicalize(canonical)
    inputs = inputs_of(canonical)
    given = feeds(inputs, Case("decode", batch, 1, context - 1))
    by_source = source_roles(fused.graph)
    note("measure")
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "fused.onnx"
        fused.save(target)
        before = _events(path, given, threads, Path(folder))
        after = _events(target, given, threads, Path(folder))
        stands_for = _sources(target)
    sizes = _sizes(graph, given)
    own = {node.name: node for node in graph.nodes}
    rows_before = _rows(before, {name: by_source.get(name, OTHER) for name in own}, own, sizes)
    standing = {name: _joined(by_source.get(s, OTHER) for s in sources) for name, sources in stands_for.items()}
    rows_after = _rows(after, standing, {}, sizes)
    rows_after = [_counted(row, fused.graph, by_source, _sizes(fused.graph, given)) for row in rows_after]
    layers = sum(node.is_a("attention", FUSER) for node in fused.graph.nodes)
    rows_before, rows_after = ([_averaged(row, layers) for row in rows] for rows in (rows_before, rows_after))
    copy, product = cpu_ceilings(threads)
    dtype = next((str(v.dtype) for v in graph.constants() if v.rank == 2 and v.dtype is not None), "float32")
    device = f"CPU, ONNX Runtime, {threads} thread{'s' * (threads > 1)}"
    return Profile(str(path), device, dtype, batch, context, copy, product, rows_before, rows_after)


def source_roles(graph: Graph) -> dict[str, str]:
    """What each source node of a fused graph is for, by its name."""
    found: dict[str, str] = {}
    launches = plan(graph, "prefill")
    said = [
        (node, _role(node, role))
        for launch, role in zip(launches, roles(launches), strict=True)
        for node in launch.nodes
    ]
    said += [(node, "mask, positions") for node in graph.nodes if node.domain == FUSER and node.op in POSITIONAL]
    # A residual add has the origin of the norm that it was split from.
    for node, role in sorted(said, key=lambda one: one[0].op not in NORMS):
        for source in node.origin.sources or (node.name,):
            found.setdefault(source, role)
    return found


def _role(node: Node, launch: str) -> str:
    if node.domain == FUSER and node.op in WRITES:
        return "rotary, cache write"
    if node.domain == FUSER and node.op in POSITIONAL:
        return "mask, positions"
    if node.domain == FUSER and node.op in ("gated_mlp", "silu", "gelu", "gelu_tanh"):
        return "gate"
    return launch


def _joined(names: Iterable[str]) -> str:
    return " + ".join(sorted(set(names)))


def _sources(path: Path) -> dict[str, tuple[str, ...]]:
    """The nodes of a file by name, with the source nodes that each stands for."""
    model = onnx.load(str(path), load_external_data=False)
    found = {}
    for node in model.graph.node:
        said = [entry.value for entry in node.metadata_props if entry.key == SOURCES]
        found[node.name] = tuple(said[0].split(", ")) if said else (node.name,)
    return found


def _events(path: Path, given: Mapping[str, np.ndarray], threads: int, folder: Path) -> dict[str, float]:
    """Microseconds of each node, by name: medians over runs.

    Raises:
        InputError: ONNX Runtime does not run it.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = threads
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.enable_profiling = True
    options.profile_file_prefix = str(folder / path.stem)
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        for _ in range(WARM + RUNS):
            session.run(None, dict(given))
    except Exception as error:  # it raises what its parts raise
        raise InputError(f"ONNX Runtime does not run '{path}': {str(error).splitlines()[0][:300]}") from None
    events: list[dict[str, Any]] = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    times: dict[str, list[float]] = defaultdict(list)
    for event in events:
        name = str(event.get("name", ""))
        if event.get("cat") == "Node" and name.endswith("_kernel_time"):
            times[name.removesuffix("_kernel_time")].append(float(event["dur"]))
    return {name: median(found[WARM:]) for name, found in times.items() if len(found) == WARM + RUNS}


def _sizes(graph: Graph, given: Mapping[str, np.ndarray]) -> dict[str, int]:
    """What the named dims of a graph's inputs are."""
    return {
        str(dim): size
        for value in graph.inputs
        if value.name in given
        for dim, size in zip(value.shape or (), given[value.name].shape, strict=False)
        if not isinstance(dim, int)
    }


def _rows(
    times: Mapping[str, float], said: Mapping[str, str], nodes: Mapping[str, Node], sizes: Mapping[str, int]
) -> list[Measure]:
    """A row for each thing that nodes are for, all layers together as one; nodes of which nothing is said are `other`."""
    grouped: dict[str, list[str]] = defaultdict(list)
    for name in times:
        grouped[said.get(name, OTHER)].append(name)
    found = []
    for role, names in grouped.items():
        moved = [_amounts(nodes[name], sizes) for name in names if name in nodes]
        took = sum(times[name] for name in names)
        found.append(Measure(role, 1, took, sum(b for b, _ in moved), sum(f for _, f in moved), len(names)))
    return found


def _counted(row: Measure, graph: Graph, by_source: Mapping[str, str], sizes: Mapping[str, int]) -> Measure:
    """A row of the fused file with the bytes and FLOPs of the fused nodes that it holds."""
    wanted = set(row.name.split(" + ")) - {OTHER}
    moved = [
        _amounts(node, sizes)
        for node in graph.nodes
        if wanted and {by_source.get(s, OTHER) for s in node.origin.sources or (node.name,)} & wanted
    ]
    return Measure(row.name, 1, row.us, sum(b for b, _ in moved), sum(f for _, f in moved), row.launches)


def _averaged(row: Measure, layers: int) -> Measure:
    """A row of one layer, where each has as many nodes of it."""
    if row.name == OTHER or not layers or row.launches % layers:
        return row
    us, moved, flops = (x / layers for x in (row.us, row.bytes, row.flops))
    return Measure(row.name, layers, us, moved, flops, row.launches // layers)


def _amounts(node: Node, sizes: Mapping[str, int]) -> tuple[int, int]:
    """Bytes and FLOPs of a node by itself; what has no known shape counts as nothing."""
    alone = Launch("", [("main", node)])
    return at(alone.bytes, sizes) or 0, at(alone.flops, sizes) or 0
