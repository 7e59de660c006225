"""Shapes as models of transformers without weights, and what they are as fused graphs."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fuser import checkpoints
from fuser.cost.workload import Shape
from fuser.errors import InputError, UsageError
from fuser.graph import Graph
from fuser.loading import described
from fuser.pipeline import Progress
from fuser.quantizing import choices, quantized, unfilled
from fuser.sources import source_of

LAYERS = 3  # of a shape that are made: the first, one between, the last


@dataclass
class Made:
    """A fused graph, and how many layers stand for how many."""

    graph: Graph
    name: str
    made_layers: int = 1
    layers: int = 1


def graph_of(model: "str | Path | Shape", *, quantize: str | None = None, note: Progress | None = None) -> Made:
    """The fused graph of a file, a folder (its config; no weights are read) or a shape, in codes if that is asked for.

    Raises:
        InputError: it cannot be read or captured.
        UsageError: no model of transformers has such a shape.
    """
    note = note or (lambda stage: None)
    if isinstance(model, Shape):
        made = Made(source_of(module_of(model), verify=False, note=note).graph, model.name, LAYERS, model.layers)
    elif Path(model).is_dir():
        made = Made(source_of(_of_folder(Path(model)), verify=False, note=note).graph, str(model))
    else:
        made = Made(source_of(Path(model), verify=False, note=note).graph, str(model))
    if quantize is not None:
        made.graph = quantized(made.graph, choices(quantize), rounding=unfilled)
    return made


def module_of(shape: Shape, layers: int = LAYERS, *, filled: bool = False) -> Any:
    """A decoder of transformers in the sizes of a shape, without elements, or `filled` with random ones; bfloat16.

    Raises:
        UsageError: transformers is not installed, or none of the families that are known here is like it.
    """
    try:
        import transformers
    except ImportError:
        raise UsageError("a shape is made into a model by transformers: pip install 'fuser[hf]'") from None
    sizes = {"vocab_size": shape.vocabulary, "hidden_size": shape.hidden, "tie_word_embeddings": shape.tied}
    heads = {"num_hidden_layers": layers, "num_attention_heads": shape.heads, "intermediate_size": shape.feed_forward}
    kind = (shape.norm, shape.positions, shape.gated)
    config: Any
    if kind == ("rms", "rotary", True) and shape.vocabulary:
        config = transformers.LlamaConfig(
            **sizes, **heads, num_key_value_heads=shape.kv_heads, head_dim=shape.head_dim, attention_bias=shape.bias,
            mlp_bias=shape.bias, max_position_embeddings=8192,
        )  # fmt: skip
        family: Any = transformers.LlamaForCausalLM
    elif kind == ("layer", "alibi", False) and shape.feed_forward == 4 * shape.hidden:
        config = transformers.BloomConfig(**sizes, n_layer=layers, n_head=shape.heads)
        family = transformers.BloomForCausalLM
    elif kind == ("layer", "rotary", False) and shape.heads == shape.kv_heads:
        config = transformers.GPTNeoXConfig(**sizes, **heads, use_parallel_residual=False, max_position_embeddings=8192)
        family = transformers.GPTNeoXForCausalLM
    else:
        raise UsageError(f"'{shape.name}' is a shape on paper: no family of models that is known here is like it")
    return _built(family, config, filled=filled)


def _of_folder(folder: Path) -> Any:
    """The module that a folder's config describes."""
    config, family = described(folder)
    import transformers

    if hasattr(config, "quantization_config"):
        del config.quantization_config
    try:
        return _built(family or transformers.AutoModelForCausalLM.from_config, config, filled=False)
    except Exception as error:  # it raises what its parts raise
        text = " ".join(str(error).split())
        raise InputError(f"'{folder}' cannot be read: {text[:300] or type(error).__name__}") from None


def _built(family: Any, config: Any, *, filled: bool) -> Any:
    """A model of random weights, or of none; what is computed from its config alone it holds."""
    config.dtype = torch.bfloat16
    if filled:
        return family(config).to(torch.bfloat16).eval()
    with checkpoints.Unfilled():
        module = family(config)
    for path, part in module.named_modules():
        for name, held in part.named_parameters(recurse=False):
            # One element that stands for all: it can be computed with, and takes no memory.
            one = torch.full((), 0.01, dtype=torch.bfloat16).expand(held.shape)
            setattr(module.get_submodule(path), name, torch.nn.Parameter(one, requires_grad=False))
    module.tie_weights()
    return module.eval()
