"""Where a decoder to generate with comes from: a file, a folder, a module; its fused graph, and what stands beside it."""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from sys import maxsize
from typing import Any

import torch
from torch import nn

from fuser import importer
from fuser.compilation import Options
from fuser.compiling import Compiled
from fuser.errors import InputError, UsageError
from fuser.graph import Graph
from fuser.layers import steps
from fuser.loading import load, pretrained
from fuser.pipeline import Progress, canonicalized, quantization, rewritten, stage, weight_bytes
from fuser.pretrained import Pretrained, is_pretrained
from fuser.quantizing import Choices, quantized
from fuser.report import Report
from fuser.verification import Verification, too_large

CONFIGS = ("config.json", "generation_config.json")  # the later ones say more of generating


@dataclass
class Source:
    """A fused decoder, and what is known of it."""

    graph: Graph
    report: Report
    folder: Path | None = None  # where a tokenizer may be
    config: Mapping[str, Any] = field(default_factory=dict)
    device: torch.device | None = None  # where its weights are

    @property
    def eos(self) -> tuple[int, ...]:
        """The tokens that end a text."""
        found = self.config.get("eos_token_id")
        return tuple(found) if isinstance(found, (list, tuple)) else (found,) if isinstance(found, int) else ()

    @property
    def max_length(self) -> int | None:
        """The most positions, if it is said."""
        names = ("max_position_embeddings", "n_positions", "max_sequence_length", "n_ctx", "seq_length")
        found = [self.config.get(name) for name in names]
        return next((value for value in found if isinstance(value, int) and value > 0), None)

    def tokenizer(self, given: Any) -> Any:
        """The tokenizer that was given, or that lies beside the model, as `tokenizer_of` says."""
        return tokenizer_of(self.folder, given)


def tokenizer_of(folder: Path | None, given: Any = None) -> Any:
    """The tokenizer that was given, itself or its folder, or that lies in a folder; None where there is none.

    Raises:
        InputError: it cannot be read.
        UsageError: what was given is none.
    """
    if given is not None and not isinstance(given, (str, os.PathLike)):
        if hasattr(given, "encode") and hasattr(given, "decode"):
            return given
        raise UsageError(f"a tokenizer has encode and decode, {type(given).__name__} has not")
    folder = Path(given) if given is not None else folder
    names = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")
    if folder is None or (given is None and not any((folder / name).is_file() for name in names)):
        return None
    try:
        from transformers import AutoTokenizer
    except ImportError:
        if given is None:
            return None
        raise UsageError("a tokenizer's folder needs transformers: pip install 'fuser[hf]'") from None
    try:
        # lengths are looked at where a text is used
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, model_max_length=maxsize)
    except Exception as error:  # it raises what its parts raise
        text = " ".join(str(error).split())
        raise InputError(
            f"the tokenizer of '{folder}' cannot be loaded: {text[:300] or type(error).__name__}"
        ) from None


def source_of(
    model: Any, *, verify: bool, note: Progress, choices: Choices | None = None, device: torch.device | None = None
) -> Source:
    """What a model is, its weights quantized where `choices` says so, and fused; a Source is fused already.

    Raises:
        InputError: it cannot be read or captured.
        UnsupportedOperator: it has an operator that is not known.
        UsageError: it is none that can be generated with.
    """
    if isinstance(model, Source):
        return model if choices is None else replace(model, graph=quantized(model.graph, choices, device=device))
    if isinstance(model, Compiled):
        if choices is not None:
            raise UsageError("a module is quantized before it is compiled: fuser.compile(fuser.quantize(module, ...))")
        return _of_module(model, model.graph, model.report)
    if isinstance(model, nn.Module):
        if not is_pretrained(model):
            raise UsageError(
                f"LLM takes a decoder of transformers or what fuser.compile made, not a {type(model).__name__}"
            )
        if choices is not None:
            note("quantize")
            model = quantized(model, choices, device=device)
        linked = Pretrained(model, Options(True, "auto", verify, note, is_run=False)).first
        return _of_module(model, linked.graph, linked.report)
    if not isinstance(model, (str, os.PathLike)):
        raise UsageError(f"LLM takes a path or a module, not a {type(model).__name__}")
    path = Path(model)
    if path.is_dir():
        note("read")
        made = source_of(pretrained(path, None, None), verify=verify, note=note, choices=choices, device=device)
        made.folder, made.device = path, None
        made.config = {**made.config, **_configs(path)}
        return made
    graph, report = _of_file(path, verify=verify, note=note, choices=choices, device=device)
    return Source(graph, report, path.parent, _configs(path.parent))


def _of_file(
    path: Path, *, verify: bool, note: Progress, choices: Choices | None, device: torch.device | None
) -> tuple[Graph, Report]:
    """The fused graph of a file; a large one is compared by its rewrites alone: its weights are read once, when placed."""
    report = Report(str(path), "pages")
    with stage(report, "read", note):
        graph = importer.load(path, None)
        report.nodes_before, report.weights_bytes_before = len(graph.nodes), weight_bytes(graph)
    skipped = too_large(report.weights_bytes_before)
    if verify and not skipped and choices is None:
        loaded = load(path)
        return loaded.graph, loaded.report
    before = steps(graph)
    canonicalized(graph, report, note)
    if choices is not None:
        graph = quantization(graph, choices, report, note, device)
    rewritten(graph, before, report, note, verify=verify)
    report.nodes_after, report.weights_bytes_after = len(graph.nodes), weight_bytes(graph)
    report.verification = Verification(skipped=skipped or "it was not asked for")
    return graph, report


def _of_module(module: Any, graph: Graph, report: Report) -> Source:
    config: dict[str, Any] = {}
    for name in ("config", "generation_config"):
        held = getattr(module, name, None)
        if held is not None:
            config |= {key: value for key, value in held.to_dict().items() if value is not None}
    parameter = next(module.parameters(), None)
    return Source(graph, report, None, config, parameter.device if parameter is not None else None)


def _configs(folder: Path) -> dict[str, Any]:
    """What the configs beside a model say."""
    found: dict[str, Any] = {}
    for name in CONFIGS:
        try:
            held = json.loads((folder / name).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if isinstance(held, dict):
            found |= {key: value for key, value in held.items() if value is not None}
    return found
