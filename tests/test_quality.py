"""What quantization costs the demo model, on held-out text: the targets, and docs/quantization.md against what is measured.

`pytest tests/test_quality.py --update-golden` measures every row of the page's table and writes it, in some ten minutes.
"""

import random
import re
from collections.abc import Iterator
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor
from transformers import AutoTokenizer

import fuser
from fuser import evaluating
from fuser.evaluating import Trial
from fuser.models.train_demo import END, standard_library
from fuser.quality import Quality
from fuser.quantizing import METHODS, choices

pytestmark = pytest.mark.slow
DEMO = Path(__file__).parents[1] / "models/demo"
DOCUMENT = Path(__file__).parents[1] / "docs" / "quantization.md"
TOKENS = 8193
CALIBRATION_TOKENS = 16384
FORMATS = (
    "int8:128", "int8:channel", "int4:128", "int4:64", "int4:32", "int4:128:asymmetric", "int4:64:asymmetric",
    "int4:32:asymmetric", "nf4:128", "nf4:64", "nf4:64:double", "nf4:32", "w8a8", "fp8",
)  # fmt: skip
WAYS = ("nearest", "clip", *METHODS)
HEADER = """\
| format | rounding | weights | perplexity | mean KL | 99.9% KL | top-1 |
|---|---|---|---|---|---|---|
"""


@cache
def tokens() -> tuple[list[int], list[int]]:
    """Those to measure with, which the demo was not trained on, and those to calibrate with, which it was."""
    tokenizer = AutoTokenizer.from_pretrained(DEMO, model_max_length=1 << 30)
    sources, _ = standard_library()
    training = [source for source in sources if not source.held_out]
    random.Random(0).shuffle(training)
    found = []
    for part, count in (([s for s in sources if s.held_out], TOKENS), (training, CALIBRATION_TOKENS)):
        ids: list[int] = []
        for source in part:
            if len(ids) < count:
                ids += tokenizer.encode(END + source.text)
        found.append(ids[:count])
    return found[0], found[1]


@cache
def trial() -> Trial:
    return Trial(DEMO / "model.onnx", tokens()[0], device="cpu", verify=False)


@pytest.fixture(scope="module", autouse=True)
def _remembered() -> Iterator[None]:
    """The original says the same of a window each time."""
    known: dict[bytes, Tensor] = {}
    original = evaluating._logits

    def logits(llm: fuser.LLM, window: Any) -> Tensor:
        if llm is not trial()._reference:
            return original(llm, window)
        key = window.tobytes()
        if key not in known:
            known[key] = original(llm, window).clone()  # the next window takes its place
        return known[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluating, "_logits", logits)
        yield


@cache
def measured(format: str, way: str = "nearest") -> Quality:
    if way in METHODS:
        return trial().compared(choices(format, calibration=tokens()[1], method=way))
    return trial().compared(choices(format, clip="mse" if way == "clip" else None))


def kl(format: str, way: str = "nearest") -> float:
    found = measured(format, way).kl_mean
    assert found is not None
    return found


def test_int8_is_as_good_as_the_original() -> None:
    assert kl("int8:128") <= 3e-4
    top1 = measured("int8:128").top1
    assert top1 is not None and top1 >= 0.99


def test_clipping_is_better_than_rounding_and_calibration_better_than_clipping() -> None:
    assert kl("int4:128", "gptq") < kl("int4:128", "awq") < kl("int4:128", "clip") < kl("int4:128")


@pytest.mark.parametrize("group", [32, 64, 128])
def test_nf4_is_better_than_int4_of_the_same_group(group: int) -> None:
    assert kl(f"nf4:{group}") < kl(f"int4:{group}")


# The page


def _digest() -> str:
    """Of the texts: those of another Python's library differ, and so do their numbers."""
    return sha256(repr(tokens()).encode()).hexdigest()[:12]


def _kilobytes(quality: Quality) -> str:
    return f"{quality.weights_bytes / 1000:.0f} kB"


def _line(format: str, way: str, quality: Quality) -> str:
    first = f"| {format} | {way} | {_kilobytes(quality)} | {quality.perplexity:.3f} |"
    if quality.kl_mean is None or quality.kl_p999 is None or quality.top1 is None:
        return f"{first} | | |\n"
    return f"{first} {quality.kl_mean:.2e} | {quality.kl_p999:.2e} | {quality.top1:.2%} |\n"


def _written() -> dict[tuple[str, str], list[str]]:
    rows = re.findall(r"^\| (\w[\w:]*) \| (\w+) \| (.*) \|$", DOCUMENT.read_text(encoding="utf-8"), re.MULTILINE)
    return {(format, way): rest.split(" | ") for format, way, rest in rows if way in WAYS}


def test_the_page(update_golden: bool) -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    if update_golden:
        lines = [_line("original", "", trial().original())]
        lines += [_line(format, way, measured(format, way)) for format in FORMATS for way in WAYS]
        before, after = text[: text.index(HEADER)], text[text.index("\n\n", text.index(HEADER)) :]
        before = re.sub(r"`[0-9a-f]{12}`", f"`{_digest()}`", before)
        DOCUMENT.write_text(before + HEADER + "".join(lines).rstrip("\n") + after, encoding="utf-8")
        return
    written = _written()
    assert [*written] == [(format, way) for format in FORMATS for way in WAYS]
    if f"`{_digest()}`" not in text:
        pytest.skip("the page's numbers are of the library of another Python")
    for format, way in (("int8:128", "nearest"), *(("int4:128", way) for way in WAYS), ("nf4:64:double", "nearest")):
        found = measured(format, way)
        weights, *numbers = written[format, way]
        assert weights == _kilobytes(found)
        wanted = [float(number.rstrip("%")) for number in numbers]
        assert found.kl_p999 is not None and found.top1 is not None
        assert [found.perplexity, kl(format, way), found.kl_p999, 100 * found.top1] == pytest.approx(wanted, rel=0.01)
