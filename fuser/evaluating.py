"""`fuser.evaluate(model, text)` and `fuse eval MODEL --text FILE`: a model's predictions of a text, beside the original's."""

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fuser.api import FusedModel
from fuser.calibrating import windows_of
from fuser.errors import InputError, UsageError
from fuser.formats import Format
from fuser.graph import Graph
from fuser.llm import LLM, Prompt
from fuser.pipeline import Progress
from fuser.quality import Measured, Measurement, Quality
from fuser.quantizing import Choices, choices
from fuser.report import size
from fuser.runtime.engine import Ints, Step
from fuser.sources import Source, source_of, tokenizer_of
from fuser.verification import too_large

MEASURED = 4096  # tokens that a report's quality is measured on, at most
CONTEXT = 2048  # tokens of a window, where the model and the text have so many


def evaluate(
    model: Any, text: Prompt, *, against: Any = None, quantization: "str | Format | Choices | None" = None,
    kv_cache: str = "auto", tokens: int | None = None, context: int | None = None, dtype: str | None = None,
    device: torch.device | str | None = None, tokenizer: Any = None, verify: bool = True, progress: Progress | None = None,
) -> Quality:  # fmt: skip
    """Measures how a model predicts each token of a text from those before it in its window.

    Args:
        model: what LLM takes.
        text: or token ids, two or more.
        against: the original that the model is compared with, likewise; by default the model itself, as it is.
        quantization: of the model, as of LLM.
        kv_cache: of the model, as of LLM.
        tokens: of the text, how many are used at most.
        context: of a window; the text is cut into such, one after another. By default as many as the models take, at most 2048.
        dtype: bf16, fp16 or fp32, in which both are run; by default the model's own, on the CPU fp32.
        device: where both are run, as of LLM.
        tokenizer: as of LLM.
        verify: prove rewrites numerically.
        progress: called with the name of each stage as it begins.

    Raises:
        InputError: a model cannot be read or captured.
        UnsupportedOperator: it cannot be run, or is no decoder.
        UsageError: an argument cannot be; the models have not the same vocabulary.
    """
    trial = Trial(
        model, text, against=against, tokens=tokens, context=context, dtype=dtype, device=device, tokenizer=tokenizer,
        verify=verify, progress=progress,
    )  # fmt: skip
    if against is None and quantization is None and kv_cache == "auto":
        return trial.original()
    return trial.compared(quantization, kv_cache)


class Trial:
    """A text in windows, an original that predicts it, and the model that is compared with that.

    Attributes:
        ids: of the text's tokens [n].
        context: tokens of a window.
    """

    def __init__(
        self, model: Any, text: Prompt, *, against: Any = None, tokens: int | None = None, context: int | None = None,
        dtype: str | None = None, device: torch.device | str | None = None, tokenizer: Any = None, verify: bool = True,
        progress: Progress | None = None,
    ) -> None:  # fmt: skip
        """As `evaluate`; without `against` the original is the model as it is."""
        self._note = progress or (lambda stage: None)
        for name, value, least in (("tokens", tokens, 2), ("context", context, 1)):
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < least):
                raise UsageError(f"{name} must be a whole number of {least} or more, got {value!r}")
        self._model = source_of(model, verify=verify, note=self._note)
        self._original = self._model if against is None else source_of(against, verify=verify, note=self._note)
        self.ids = _encoded(text, list({id(s): s for s in (self._model, self._original)}.values()), tokenizer)[:tokens]
        if len(self.ids) < 2:
            raise UsageError(f"nothing to predict: the text has {_count(len(self.ids), 'token')}, it takes two")
        known = [length for source in (self._model, self._original) if (length := source.max_length) is not None]
        if context is not None and context > min(known, default=context):
            raise UsageError(f"a window of {context} tokens is longer than the {min(known)} that the model takes")
        self._longest = context or min([*known, CONTEXT])
        self.context = min(self._longest, len(self.ids) - 1)
        self._dtype, self._device, self._tokenizer = dtype, device, tokenizer
        self._first: LLM | None = None

    @property
    def _reference(self) -> LLM:
        if self._first is None:
            self._first = self._made(self._original)
        return self._first

    def ways(
        self,
        formats: Sequence[str],
        *,
        clip: bool = False,
        calibration: Prompt | None = None,
        tokens: int | None = None,
        method: str = "gptq",
    ) -> list[Choices]:
        """How to quantize, for each format: with clipped scales, or calibrated with so many tokens of a text at most."""
        windows = None
        if calibration is not None:
            windows = windows_of(_encoded(calibration, [self._model], self._tokenizer)[:tokens], length=self._longest)
        return [
            choices(name.strip(), clip="mse" if clip else None, calibration=windows, method=method) for name in formats
        ]

    def original(self) -> Quality:
        """How the original predicts."""
        return self._measured(self._reference, None, stored_bytes(self._original.graph))

    def compared(self, quantization: "str | Format | Choices | None" = None, kv_cache: str = "auto") -> Quality:
        """How the model predicts, beside the original."""
        source = self._model
        if quantization is not None:
            self._note("quantize")
            chosen = quantization if isinstance(quantization, Choices) else choices(quantization)
            source = source_of(source, verify=False, note=self._note, choices=chosen)
        return self._measured(self._made(source, kv_cache), self._reference, stored_bytes(source.graph))

    def _made(self, source: Source, kv_cache: str = "auto") -> LLM:
        """A model that computes a window in one step, and logits of all its tokens."""
        return LLM(
            source, dtype=self._dtype, device=self._device, kv_cache=kv_cache, max_length=self.context,
            max_sequences=self.context, max_step_tokens=self.context, max_tokens_in_flight=self.context,
            prefix_caching=False, progress=self._note,
        )  # fmt: skip

    def _measured(self, llm: LLM, original: LLM | None, weights_bytes: int) -> Quality:
        self._note("measure")
        measurement = Measurement()
        for start in range(0, len(self.ids) - 1, self.context):
            stop = min(start + self.context, len(self.ids) - 1)
            window, targets = self.ids[start:stop], torch.from_numpy(self.ids[start + 1 : stop + 1])
            logits = _logits(llm, window)
            wanted = None if original is None else _logits(original, window)
            if wanted is not None and logits.shape != wanted.shape:
                raise UsageError(f"the model has {logits.shape[1]} tokens, the original has {wanted.shape[1]}")
            measurement.add(targets, logits, wanted)
        return measurement.quality(weights_bytes)


@dataclass(frozen=True)
class Texts:
    """Tokens that a file is calibrated with, if any, and that its quality is measured on; what those are, for people."""

    calibration: list[int] | None
    measured: list[int]
    told: str


def texts(
    folder: Path, *, calibrate: Path | None, text: Path | None, tokenizer: Path | None, tokens: int
) -> Texts:  # fmt: skip
    """What files of text come to; without a text to measure on, it is what of the other is left, or that one itself.

    Args:
        folder: where a tokenizer is, if none is given.
        tokens: to calibrate with, at most.

    Raises:
        InputError: a file or the tokenizer cannot be read.
        UsageError: there is no tokenizer.
    """
    cuts = tokenizer_of(folder, tokenizer)
    if cuts is None:
        raise UsageError(f"a text needs a tokenizer, and '{folder}' has none: give --tokenizer DIR")
    given, asked = ([*cuts.encode(read(file))] if file is not None else [] for file in (calibrate, text))
    calibration = given[:tokens]
    measured, told = asked, f"'{text}'"
    if text is None:
        left = given[tokens:]
        measured, told = (left, "what follows the calibration") if len(left) > 1 else (given, "the calibration itself")
    return Texts(calibration if calibrate is not None else None, measured[:MEASURED], told)


def measured(fused: FusedModel, model: Path, found: Texts, progress: Progress | None = None) -> Measured | None:
    """What quantizing costs a file that was fused, beside the file it came from; None: it is too large to run here."""
    if reason := too_large(fused.report.weights_bytes_before):
        fused.report.notes.append(f"quality was not measured: {reason.split(';')[0]}; fuse eval measures it")
        return None
    original = source_of(model, verify=False, note=progress or (lambda stage: None))
    trial = Trial(replace(original, graph=fused.graph), found.measured, against=original, progress=progress)
    return Measured(found.told, trial.original(), trial.compared())


def _encoded(text: Prompt, sources: Sequence[Source], given: Any) -> Ints:
    """The tokens of a text, in which all models agree."""
    if not isinstance(text, str):
        found = list(text)
        if strange := [token for token in found if type(token) is not int or not 0 <= token < 1 << 31]:
            raise UsageError(f"token ids must be whole numbers of 0 or more, got {strange[0]!r}")
        return np.asarray(found, np.int32)
    tokenizers = [found for source in sources if (found := source.tokenizer(given)) is not None]
    if not tokenizers:
        raise UsageError("a text needs a tokenizer, and the model has none: give token ids, or a tokenizer")
    ids, *others = [np.asarray(tokenizer.encode(text), np.int32) for tokenizer in tokenizers[: 1 if given else None]]
    if any(not np.array_equal(ids, other) for other in others):
        raise UsageError("the model has not the original's tokens: their tokenizers cut the text differently")
    return ids


def _logits(llm: LLM, window: Ints) -> Tensor:
    """Of every token [n, V], each from those before it in the window."""
    n, page, groups = len(window), llm.engine.pool.page, len(llm.engine.pool.groups)
    if unknown := [token for token in window.tolist() if token >= llm.runner.vocabulary]:
        raise UsageError(f"token id {unknown[0]} of the text is none of the model's {llm.runner.vocabulary}")
    places, blocks = np.arange(n, dtype=np.int32), -(-n // page)
    table = 1 + np.arange(groups * blocks, dtype=np.int32).reshape(groups, 1, blocks)
    slots = table[:, 0, places // page] * page + places % page
    nothing = np.full(n, -1, np.int32)
    ends = np.array([0, n], np.int32)
    logits, _ = llm.runner.run(Step(False, window, nothing, places, slots, table, ends[1:], ends, n, places, nothing))
    return logits


def read(path: Path) -> str:
    """A file's text, UTF-8.

    Raises:
        InputError: it cannot be read, is not UTF-8, or is empty.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"'{path}' cannot be read: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise InputError(f"'{path}' is not UTF-8: byte {error.start} does not belong there") from None
    if not text:
        raise InputError(f"'{path}' is empty")
    return text


def stored_bytes(graph: Graph) -> int:
    """Bytes of all that a graph's weights are made of, each once."""
    constants = [value.constant for value in graph.constants() if value.constant is not None]
    return sum({leaf.key: leaf.stored_bytes for constant in constants for leaf in constant.leaves()}.values())


def rows(
    trial: Trial, ways: Sequence[Choices], *, kv_cache: str = "auto", is_compared: bool = False
) -> Iterator[tuple[str, Quality]]:
    """The original, and what is compared with it: the model quantized in each way, or as it is if that is asked for."""
    yield "original", trial.original()
    cached = "" if kv_cache == "auto" else f", {kv_cache} cache"
    for way in ways:
        yield f"{way}{cached}", trial.compared(way, kv_cache)
    if not ways and (is_compared or cached):
        yield f"model{cached}", trial.compared(None, kv_cache)


def main(trial: Trial, found: Iterator[tuple[str, Quality]], *, as_json: bool = False) -> None:
    """Prints a table, a line as it is measured, or JSON."""
    if as_json:
        measured = [{"name": name, **_plain(quality)} for name, quality in found]
        print(json.dumps({"tokens": len(trial.ids), "context": trial.context, "measured": measured}, indent=2))
        return
    print(f"{_count(len(trial.ids), 'token')} in windows of {trial.context}\n{HEADER}", flush=True)
    for name, quality in found:
        print(line(name, quality), flush=True)


def _plain(quality: Quality) -> dict[str, Any]:
    """As JSON takes it: what is no number is none."""
    return {key: value if value is None or math.isfinite(value) else None for key, value in asdict(quality).items()}


def line(name: str, quality: Quality) -> str:
    """A line of the table."""
    told = [f"{name:<30} {quality.perplexity:>10.4f}"]
    if quality.kl_mean is None or quality.kl_p999 is None or quality.top1 is None:
        told.append(f"{'-':>10} {'-':>10} {'-':>8}")
    else:
        told.append(f"{quality.kl_mean:>10.3e} {quality.kl_p999:>10.3e} {quality.top1:>8.2%}")
    return " ".join([*told, f"{size(quality.weights_bytes):>10}"])


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


HEADER = f"{'':<30} {'perplexity':>10} {'mean KL':>10} {'99.9% KL':>10} {'top-1':>8} {'weights':>10}"
