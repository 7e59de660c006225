"""What fusing does to the time of a decode step in ONNX Runtime on the CPU: fuser's and its peers', as ratios.

    python -m tests.benchmarks.decode            Llama of 1024 x 8 layers, 512 tokens of past: ten minutes, 12 GB of memory
    python -m tests.benchmarks.decode --quick    two tiny layers: seconds, and ratios that say nothing

A step is one token of one sequence. Ratios are to the graph as its exporter wrote it, taken within rounds in which every
graph runs once, in random order, so that what else the machine does meets them all. Rounds are spread over several loads
of the graphs: memory is faster at one time than at another, and a graph that copies more feels it more. A result is
timed only if it equals the original in every case of `zoo.cases` and on the whole past.
"""

import argparse
import contextlib
import dataclasses
import gc
import importlib.metadata
import io
import json
import os
import platform
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch

import fuser
from tests import architectures, zoo

TOLERANCE = 2e-5  # relative, norm-wise, float32
THREADS = 2
WARMUP_ROUNDS = 3
BASELINE = "as exported"
PACKAGES = ("torch", "transformers", "onnxscript", "onnx", "numpy")


@dataclass(frozen=True)
class Setup:
    """The Llama that is measured, on `past` tokens: `loads` times `rounds` rounds. `quick`: it is the zoo's."""

    D: int = 1024
    F: int = 2816
    H: int = 16
    G: int = 4
    V: int = 32000
    layers: int = 8
    past: int = 512
    loads: int = 5
    rounds: int = 20
    quick: bool = False

    def model(self) -> torch.nn.Module:
        from transformers import AutoConfig, AutoModelForCausalLM

        if self.quick:
            return zoo.model("llama", layers=self.layers)
        config = AutoConfig.for_model(
            "llama",
            hidden_size=self.D,
            intermediate_size=self.F,
            num_attention_heads=self.H,
            num_key_value_heads=self.G,
            vocab_size=self.V,
            num_hidden_layers=self.layers,
            max_position_embeddings=self.past + 64,
            rms_norm_eps=1e-5,
        )
        made: torch.nn.Module = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
        architectures.draw_weights(made)
        return made.eval()


QUICK = Setup(D=zoo.D, F=zoo.F, H=zoo.H, G=zoo.G, V=zoo.V, layers=2, past=16, loads=2, rounds=5, quick=True)


@dataclass(frozen=True)
class Source:
    """How the model becomes a file; `one_token`: whether that is meant for one new token only."""

    name: str
    write: Callable[[torch.nn.Module, Setup, Path], None]
    one_token: bool = False


def dynamic(exporter: str) -> Callable[[torch.nn.Module, Setup, Path], None]:
    """Batch, new tokens and past are dynamic, as one of the zoo's exporters writes it."""

    def write(model: torch.nn.Module, setup: Setup, path: Path) -> None:
        if setup.quick:
            shutil.copy(zoo.exported("llama", exporter, layers=setup.layers), path)
        else:
            zoo.export(zoo.Decoder(model), zoo.EXPORTERS[exporter], path)

    return write


def decode_stage(model: torch.nn.Module, setup: Setup, path: Path) -> None:
    """The decode graph of transformers' own exporter: one new token; batch and past are dynamic."""
    zoo.export_for_generation(model, zoo.EXPORTERS["transformers-decode"], path)


SOURCES = (
    Source("dynamo", dynamic("dynamo")),
    Source("dynamo, opset 23", dynamic("dynamo23")),
    Source("torchscript", dynamic("torchscript")),
    Source("transformers, one token", decode_stage, one_token=True),
)


@dataclass(frozen=True)
class Engine:
    """What fuses a file into another: `write(original, fused, source, setup)`.

    Of engines that share a name the fastest counts.
    """

    name: str
    write: Callable[[Path, Path, Source, Setup], None]
    variant: str = ""


def by_fuser(original: Path, fused: Path, source: Source, setup: Setup) -> None:
    dims = {}
    if source.one_token:
        graph = onnx.load(original, load_external_data=False).graph
        (tokens,) = (value.type.tensor_type.shape.dim[1] for value in graph.input if value.name == "input_ids")
        dims = {tokens.dim_param: 1} if tokens.dim_param else {}
    fuser.fuse(original, dims=dims).save(fused)


def by_transformers(original: Path, fused: Path, source: Source, setup: Setup) -> None:
    import onnx_ir
    from transformers.exporters.onnxruntime_fusions import fuse_for_onnxruntime

    model = onnx_ir.load(original)
    fuse_for_onnxruntime(model, "cpu")
    onnx_ir.save(model, fused)


def by_onnxscript(original: Path, fused: Path, source: Source, setup: Setup) -> None:
    import onnx_ir
    from onnxscript.rewriter.ort_fusions import optimize_for_ort

    model, _ = optimize_for_ort(onnx_ir.load(original))
    onnx_ir.save(model, fused)


def by_onnxruntime(model_type: str) -> Callable[[Path, Path, Source, Setup], None]:
    def write(original: Path, fused: Path, source: Source, setup: Setup) -> None:
        from onnxruntime.transformers.optimizer import optimize_model

        model = optimize_model(str(original), model_type, num_heads=setup.H, hidden_size=setup.D)
        model.save_model_to_file(str(fused))

    return write


ENGINES = (
    Engine("fuser", by_fuser),
    Engine("transformers", by_transformers),
    Engine("onnxscript", by_onnxscript),
    # Those made for text; the types for images fuse nothing of a Llama that these do not.
    *(Engine("onnxruntime", by_onnxruntime(kind), kind) for kind in ("bart", "bert", "gpt2", "phi", "qwen3", "t5")),
)


@dataclass(frozen=True)
class Row:
    """One engine on one source: how long a step takes, or why that was not measured."""

    source: str
    engine: str
    variant: str = ""
    nodes: int | None = None
    error: float | None = None  # the largest of all cases, relative
    median_ms: float | None = None
    ratio: float | None = None  # of this step's time to the original's, the median over rounds
    quartiles: tuple[float, float] | None = None  # of the same
    reason: str = ""


class Step:
    """A decode step whose inputs and outputs stay where they are in memory."""

    def __init__(self, session: onnxruntime.InferenceSession, feeds: zoo.Feeds) -> None:
        self._session, self._binding = session, session.io_binding()
        self._values: list[onnxruntime.OrtValue] = []  # the binding does not keep them
        for name, array in feeds.items():
            self._bind(self._binding.bind_ortvalue_input, name, array)
        for name, array in outputs(session, feeds).items():
            self._bind(self._binding.bind_ortvalue_output, name, array)

    def _bind(self, bind: Callable[[str, Any], None], name: str, array: zoo.Array) -> None:
        self._values.append(onnxruntime.OrtValue.ortvalue_from_numpy(array))
        bind(name, self._values[-1])

    def __call__(self) -> float:
        """Takes the step; returns its time in seconds."""
        start = perf_counter()
        self._session.run_with_iobinding(self._binding)
        return perf_counter() - start


def loaded(path: Path) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = THREADS
    options.log_severity_level = 4
    # Threads of a session that ran spin on for a while, and would take the cores from the one that is timed next.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    # Weights outside the arena, or a session would keep twice their size.
    options.add_session_config_entry("session.use_device_allocator_for_initializers", "1")
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def outputs(session: onnxruntime.InferenceSession, feeds: zoo.Feeds) -> dict[str, zoo.Array]:
    names = [entry.name for entry in session.get_outputs()]
    return dict(zip(names, session.run(names, feeds), strict=True))


def largest_error(
    session: onnxruntime.InferenceSession,
    cases: Mapping[str, zoo.Feeds],
    expected: Mapping[str, Mapping[str, zoo.Array]],
) -> float:
    """Of all cases.

    Raises:
        ValueError: in one of them it fails, or differs by more than `TOLERANCE`.
    """
    worst = 0.0
    for name, feeds in cases.items():
        try:
            error = zoo.relative_error(outputs(session, feeds), expected[name])
        except Exception as failure:  # onnxruntime's exceptions share no base but Exception
            raise ValueError(f"{name}: {said(failure)}") from failure
        if error > TOLERANCE:
            raise ValueError(f"{name}: differs by {error:.1e}")
        worst = max(worst, error)
    return worst


def said(failure: Exception) -> str:
    """The line of an exception that tells most."""
    return (str(failure).split("Status Message:")[-1].strip() or type(failure).__name__).splitlines()[0]


def operators(path: Path) -> Counter[tuple[str, str]]:
    return Counter((node.domain, node.op_type) for node in onnx.load(path, load_external_data=False).graph.node)


@contextlib.contextmanager
def silent() -> Iterator[None]:
    """What exporters and peers say of themselves is dropped; errors still raise."""
    with zoo.quiet(), contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


def measure(source: Source, model: torch.nn.Module, setup: Setup, folder: Path) -> list[Row]:
    """A row for the original and one for each engine."""
    original = folder / "original.onnx"
    with silent():
        source.write(model, setup, original)
    baseline = loaded(original)
    cases = {**zoo.cases(baseline), "past": zoo.feeds(baseline, 1, 1, setup.past)}
    expected = {name: outputs(baseline, feeds) for name, feeds in cases.items()}
    del baseline
    rows, paths = [Row(source.name, BASELINE, nodes=operators(original).total())], [original]
    failed, seen = [], set()
    for engine in ENGINES:
        gc.collect()  # a peer's graph is full of cycles, and of weights
        row = Row(source.name, engine.name, engine.variant)
        fused = folder / f"{engine.name}-{engine.variant}.onnx"
        try:
            with silent():
                engine.write(original, fused, source, setup)
            found = operators(fused)
            graph = (engine.name, frozenset(found.items()))
            if graph in seen:  # another variant wrote the same
                continue
            seen.add(graph)
            row = dataclasses.replace(row, nodes=found.total(), error=largest_error(loaded(fused), cases, expected))
        except Exception as failure:  # whatever a peer raises is what is to be reported
            failed.append(dataclasses.replace(row, reason=said(failure)))
        else:
            rows.append(row)
            paths.append(fused)
    return best(timed(rows, paths, cases["past"], setup) + failed)


def timed(rows: Sequence[Row], paths: Sequence[Path], feeds: zoo.Feeds, setup: Setup) -> list[Row]:
    """The rows with times and with ratios to the first."""
    order = np.random.RandomState(0)
    times: zoo.Array = np.zeros((len(paths), setup.loads, WARMUP_ROUNDS + setup.rounds))
    for load in range(setup.loads):
        steps = {i: Step(loaded(paths[i]), feeds) for i in order.permutation(len(paths))}
        for turn in range(times.shape[2]):
            for i in order.permutation(len(paths)):
                times[i, load, turn] = steps[i]()
        del steps
    times = times[:, :, WARMUP_ROUNDS:].reshape(len(paths), -1)
    medians_ms = 1e3 * np.median(times, axis=1)
    low, ratios, high = np.percentile(times / times[0], (25, 50, 75), axis=1)
    return [
        dataclasses.replace(row, median_ms=float(m), ratio=float(r), quartiles=(float(a), float(b)))
        for row, m, r, a, b in zip(rows, medians_ms, ratios, low, high, strict=True)
    ]


def best(rows: Sequence[Row]) -> list[Row]:
    """Of each engine the fastest variant; if none was timed, the first."""
    names = [BASELINE, *dict.fromkeys(engine.name for engine in ENGINES)]
    return [
        min((row for row in rows if row.engine == name), key=lambda row: np.inf if row.ratio is None else row.ratio)
        for name in names
    ]


HEADER = f"{'':26}{'nodes':>6}{'error':>10}{'step ms':>9}{'ratio':>7}   quartiles"


def section(source: Source, rows: Sequence[Row]) -> str:
    lines = ["", source.name]
    for row in rows:
        name = f"  {row.engine} ({row.variant})" if row.variant else f"  {row.engine}"
        if row.ratio is None or row.quartiles is None:
            lines.append(f"{name:26}{row.nodes or '':>6}  {row.reason}")
            continue
        error = "" if row.error is None else f"{row.error:.1e}"
        low, high = row.quartiles
        lines.append(
            f"{name:26}{row.nodes:>6}{error:>10}{row.median_ms:>9.2f}{row.ratio:>7.3f}   {low:.3f} to {high:.3f}"
        )
    return "\n".join(lines)


def hardware() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        name = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    return f"{name}, {os.cpu_count()} CPUs, {THREADS} threads"


def versions() -> dict[str, str]:
    found = {"fuser": fuser.__version__, "onnxruntime": onnxruntime.__version__}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Decode-step time after fusing, relative to the graph as exported.")
    parser.add_argument("--quick", action="store_true", help="a tiny model: whether it works, not how fast it is")
    parser.add_argument("--loads", type=int, help="how often each graph is loaded")
    parser.add_argument("--rounds", type=int, help="how often each step is timed after a load")
    parser.add_argument("--past", type=int, help="tokens of past")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there too")
    options = parser.parse_args(arguments)
    given = {name: getattr(options, name) for name in ("loads", "rounds", "past") if getattr(options, name)}
    setup = dataclasses.replace(QUICK if options.quick else Setup(), **given)

    about = {"hardware": hardware(), "versions": versions(), "setup": dataclasses.asdict(setup)}
    print(about["hardware"])
    print(", ".join(f"{name} {version}" for name, version in versions().items()))
    print(f"Llama, float32, batch 1, one new token: {setup}")
    print(f"\n{HEADER}")
    model = setup.model()
    rows: list[Row] = []
    for source in SOURCES:
        with tempfile.TemporaryDirectory() as folder:
            measured = measure(source, model, setup, Path(folder))
        print(section(source, measured), flush=True)
        rows += measured
    if options.json:
        document = {**about, "rows": [dataclasses.asdict(row) for row in rows]}
        options.json.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
