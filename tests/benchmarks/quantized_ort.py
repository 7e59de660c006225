"""What quantized weights do to the time of a decode step in ONNX Runtime on the CPU, as ratios to float32.

    python -m tests.benchmarks.quantized_ort            Llama of 1024 x 8 layers, 512 tokens of past: minutes, 8 GB of memory
    python -m tests.benchmarks.quantized_ort --quick    two tiny layers: seconds, and ratios that say nothing

All files are fused; a step is one token of one sequence, and ratios are taken within rounds, as in `decode`. What the
weights mean differs from format to format, so results are not compared with each other: that is the end-to-end check's.
"""

import argparse
import dataclasses
import tempfile
from collections.abc import Sequence
from pathlib import Path

import fuser
from tests import zoo
from tests.benchmarks.decode import QUICK, SOURCES, Row, Setup, hardware, loaded, operators, silent, timed, versions

FORMATS = ("int4", "int4+head", "int4@4", "int8", "int8@4", "nf4", "w8a8")
BASELINE = "float32"


def measure(setup: Setup, formats: Sequence[str], folder: Path) -> list[tuple[Row, int]]:
    """A row for float32 and one for each format, with the bytes of its weights; `+head` quantizes the logits' product
    too, `@4` is of that accuracy level."""
    original = folder / "original.onnx"
    with silent():
        SOURCES[0].write(setup.model(), setup, original)
    rows, paths, sizes = [], [], []
    for name in (BASELINE, *formats):
        path = folder / f"{name.replace(':', '-')}.onnx"
        format, _, level = name.removesuffix("+head").partition("@")
        fused = fuser.fuse(
            original,
            quantize=None if name == BASELINE else format,
            head=name.endswith("+head"),
            accuracy_level=int(level or 0),
        )
        fused.save(path)
        rows.append(Row("", name, nodes=operators(path).total()))
        paths.append(path)
        sizes.append(fused.report.weights_bytes_after)
        del fused
    feeds = zoo.feeds(loaded(paths[0]), 1, 1, setup.past)
    return list(zip(timed(rows, paths, feeds, setup), sizes, strict=True))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Decode-step time with quantized weights, relative to float32.")
    parser.add_argument("--quick", action="store_true", help="a tiny model: whether it works, not how fast it is")
    parser.add_argument("--loads", type=int, help="how often each file is loaded")
    parser.add_argument("--rounds", type=int, help="how often each step is timed after a load")
    parser.add_argument("--formats", default=",".join(FORMATS), help="with commas between")
    options = parser.parse_args(arguments)
    given = {name: getattr(options, name) for name in ("loads", "rounds") if getattr(options, name)}
    setup = dataclasses.replace(QUICK if options.quick else Setup(), **given)
    print(hardware())
    print(", ".join(f"{name} {version}" for name, version in versions().items()))
    print(f"Llama, batch 1, one new token: {setup}")
    print(f"\n{'':12}{'nodes':>6}{'MB':>8}{'step ms':>9}{'ratio':>7}   quartiles           float32 / it")
    with tempfile.TemporaryDirectory() as folder:
        for row, size in measure(setup, options.formats.split(","), Path(folder)):
            assert row.ratio is not None and row.quartiles is not None
            low, high = row.quartiles
            print(
                f"{row.engine:12}{row.nodes:>6}{size / 1e6:>8.1f}{row.median_ms:>9.2f}{row.ratio:>7.3f}"
                f"   {low:.3f} to {high:.3f}      {1 / row.ratio:.2f}x"
            )


if __name__ == "__main__":
    main()
