"""Tiny transformers models with random weights, as every exporter writes them: the real graphs that the tests compile.

    path = zoo.exported("llama", "dynamo")
    for name, feeds in zoo.cases(path).items():
        assert zoo.relative_error(zoo.run(path, feeds), zoo.reference("llama", feeds)) < 2e-5

To add a model, add an entry to tests/architectures.py; to have it from optimum too, add it to
tests/fixtures/optimum/make.py.
"""

import contextlib
import getpass
import hashlib
import importlib.metadata
import io
import logging
import os
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import onnxruntime
import torch

from tests import architectures
from tests.architectures import (
    ARCHITECTURES,
    DH,
    MORE,
    D,
    Decoder,
    Encoder,
    F,
    G,
    H,
    Implementation,
    V,
    flat_model,
    model,
    spec_of,
)
from tests.feeds import Array, Feeds, cases, feeds, padded_prefill, reference, relative_error, run, standard

__all__ = [
    "ARCHITECTURES",
    "DH",
    "EXPORTERS",
    "EXPORTS",
    "MORE",
    "MORE_EXPORTS",
    "OPTIMUM",
    "Array",
    "D",
    "Decoder",
    "F",
    "Feeds",
    "G",
    "H",
    "V",
    "cases",
    "export",
    "export_for_generation",
    "exported",
    "feeds",
    "flat_model",
    "implementation",
    "model",
    "padded_prefill",
    "quiet",
    "reference",
    "relative_error",
    "run",
    "standard",
]

OPTIMUM = Path(__file__).parent / "fixtures" / "optimum"


@dataclass(frozen=True)
class Exporter:
    """How a torch module becomes ONNX.

    Attributes:
        kind: whose exporter it is.
        opset: None where the exporter's own default is taken.
        attn: the attention implementation; None where it is the architecture's own.
        component: of what transformers' exporter gives for generation. `prefill` has no past, `decode` takes one token,
            `chunk` is its decode for any number of tokens, `static` its decode with a cache of a fixed size.
    """

    kind: Literal["dynamo", "torchscript", "committed", "transformers"]
    opset: int | None = None
    attn: Implementation | None = None
    component: Literal["prefill", "decode", "chunk", "static"] = "decode"


EXPORTERS: dict[str, Exporter] = {
    "dynamo": Exporter("dynamo"),
    # Opset 23 is the newest that torch declares, and the only one for which its optimizer puts RMSNormalization and
    # RotaryEmbedding together again; 24 is accepted too and keeps just Attention whole.
    "dynamo23": Exporter("dynamo", 23),
    "dynamo24": Exporter("dynamo", 24),
    "torchscript": Exporter("torchscript", 17),
    "optimum": Exporter("committed"),
    "transformers-prefill": Exporter("transformers", component="prefill"),
    "transformers-decode": Exporter("transformers"),
    "transformers-chunk": Exporter("transformers", component="chunk"),
    "dynamo-eager": Exporter("dynamo", attn="eager"),
    "dynamo23-eager": Exporter("dynamo", 23, attn="eager"),
    "torchscript-eager": Exporter("torchscript", 17, attn="eager"),
    "transformers-decode-eager": Exporter("transformers", attn="eager"),
    "dynamo-sdpa": Exporter("dynamo", attn="sdpa"),
    "dynamo23-sdpa": Exporter("dynamo", 23, attn="sdpa"),
    "torchscript-sdpa": Exporter("torchscript", 17, attn="sdpa"),
    "transformers-decode-sdpa": Exporter("transformers", attn="sdpa"),
    "transformers-static": Exporter("transformers", component="static"),
}

RUNTIME = tuple(int(part) for part in onnxruntime.__version__.split(".")[:2])
# The architectures that are exported in every way; the others by torch's exporters and optimum, with their own attention.
WIDELY = ("llama", "mistral", "qwen2", "qwen3", "gemma2")


def _is_made(architecture: str, exporter: str) -> bool:
    how = EXPORTERS[exporter]
    if how.kind == "committed":
        return (OPTIMUM / f"{architecture}.onnx").exists()
    if how.opset == 24 and RUNTIME < (1, 24):  # the installed ONNX Runtime knows opset 24 from 1.24 on
        return False
    if how.kind == "transformers" or how.attn is not None:
        own = spec_of(architecture).attn  # who has no sdpa has it by no exporter
        return (
            architecture in WIDELY
            and how.component != "static"
            and how.attn != own
            and (own, how.attn) != ("eager", "sdpa")
        )
    return True


# Every (architecture, exporter) whose fusion is demanded.
EXPORTS: list[tuple[str, str]] = [
    (architecture, exporter)
    for architecture in ARCHITECTURES
    for exporter in EXPORTERS
    if _is_made(architecture, exporter)
]

# What TorchScript does not export: the rank of rotated neighbours is lost to it in flattening them, so it does not append
# them to the past; and it has no operator for the copy by which longrope changes its frequencies.
DYNAMO_ONLY = ("cohere", "glm", "llama_longrope")
NO_ONNX = ("mixtral",)  # its experts are grouped products by an operator that ONNX has not
MORE_EXPORTS: list[tuple[str, str]] = [
    *((a, "dynamo" if a in DYNAMO_ONLY else "torchscript") for a in MORE if a not in NO_ONNX),
    ("llama", "transformers-static"),
]


def implementation(architecture: str, exporter: str) -> Implementation:
    """The attention implementation that `exported` takes by default."""
    return EXPORTERS[exporter].attn or spec_of(architecture).attn


def exported(
    architecture: str,
    exporter: str,
    *,
    dtype: Literal["float32", "float16"] = "float32",
    layers: int = 2,
    attn: Implementation | None = None,
) -> Path:
    """An ONNX file of that architecture by that exporter, weights inside, made at the first request.

    Decoders have inputs input_ids, attention_mask, position_ids and past_key_values.{i}.key and .value, and outputs
    logits and present.{i}.key and .value, with dynamic batch, sequence, past and total length; the committed files have
    the signature that optimum gave them, and those of transformers' exporter the one that it gives. `attn` is
    `implementation` by default, but eager for TorchScript in float16. For many layers take torchscript: 32 layers of
    llama are 4 s with it and 70 s with dynamo. Of gemma2 in float16 dynamo23 writes a RMSNormalization with two dtypes,
    which no runtime takes.

    Files are kept in the temporary directory, by user, package versions and the text of this file and of the
    architectures' ($FUSER_ZOO_CACHE names another directory). Processes may ask for one at the same time.

    Raises:
        KeyError: no such architecture or exporter.
        ValueError: a committed file with options that it was not made with, or one that was never made.
    """
    how, own = EXPORTERS[exporter], implementation(architecture, exporter)
    # TorchScript's SDPA puts float32 constants into a float16 model: all that follows turns float32, as far as a
    # LayerNormalization whose weights did not, which no runtime takes.
    eager = how.kind == "torchscript" and dtype == "float16"
    attn = attn or ("eager" if eager else own)
    if how.kind == "committed":
        path = OPTIMUM / f"{architecture}.onnx"
        if (dtype, layers, attn) != ("float32", 2, own) or not path.exists():
            raise ValueError(
                f"{exporter} files are committed, in float32 with 2 layers and {own}: there is none of {architecture} "
                f"in {dtype} with {layers} layers and {attn}; tests/fixtures/optimum/make.py makes them"
            )
        return path
    path = _cache_directory() / f"{architecture}-{exporter}-{dtype}-{layers}-{attn}.onnx"
    if not path.exists():
        with tempfile.TemporaryDirectory(dir=path.parent) as folder, quiet():
            unfinished = Path(folder) / path.name
            if how.kind == "transformers":
                export_for_generation(model(architecture, dtype=dtype, layers=layers, attn=attn), how, unfinished)
            else:
                export(flat_model(architecture, dtype=dtype, layers=layers, attn=attn), how, unfinished)
            os.replace(unfinished, path)
    return path


def _cache_directory() -> Path:
    root = os.environ.get("FUSER_ZOO_CACHE") or Path(tempfile.gettempdir()) / f"fuser-zoo-{getpass.getuser()}"
    made_by = hashlib.sha256(Path(__file__).read_bytes() + Path(architectures.__file__).read_bytes())
    for package in ("torch", "transformers", "onnx", "onnxscript", "onnx-ir"):
        made_by.update(f"{package} {importlib.metadata.version(package)}\n".encode())
    directory = Path(root) / made_by.hexdigest()[:16]
    directory.mkdir(parents=True, exist_ok=True)
    return directory


def export(flat: Decoder | Encoder, how: Exporter, path: Path) -> None:
    """Writes one as ONNX, weights inside, every dim dynamic that `.inputs` and `.outputs` name."""
    sizes = {"batch": 2, "sequence": 3, "past": 5, "total": 8}  # neither 0 nor 1, which torch.export takes as constants
    example = []
    for name, dims in flat.inputs.items():
        dtype = next(flat.parameters()).dtype if name.startswith("past_key_values.") else torch.int64
        example.append(torch.ones([dim if isinstance(dim, int) else sizes[dim] for dim in dims], dtype=dtype))
    axes = {
        name: {axis: dim for axis, dim in enumerate(dims) if isinstance(dim, str)}
        for name, dims in (flat.inputs | flat.outputs).items()
    }
    options: dict[str, Any] = {
        "input_names": list(flat.inputs),
        "output_names": list(flat.outputs),
        "opset_version": how.opset,
    }
    if how.kind == "dynamo":
        shapes = [axes[name] for name in flat.inputs]
        # a decoder's inputs after the mask are one argument, a tuple
        options["dynamic_shapes"] = (*shapes[:2], tuple(shapes[2:])) if isinstance(flat, Decoder) else tuple(shapes)
        options |= {"dynamo": True, "external_data": False, "verbose": False}
    else:
        options |= {"dynamo": False, "dynamic_axes": axes}
    torch.onnx.export(flat, tuple(example), str(path), **options)


def export_for_generation(made: torch.nn.Module, how: Exporter, path: Path) -> None:
    """One component of `OnnxExporter.export_for_generation(model, inputs, OnnxConfig(dynamic=True))`."""
    import onnx_ir
    from transformers import GenerationConfig
    from transformers.exporters.exporter_onnx import OnnxConfig, OnnxExporter
    from transformers.exporters.utils import decompose_for_generation

    prompt = torch.arange(3, 17).reshape(2, 7)
    mask = torch.ones_like(prompt)
    mask[0, :2] = 0
    fixed = GenerationConfig(cache_implementation="static", max_cache_len=24) if how.component == "static" else None
    components = decompose_for_generation(
        made,
        {"input_ids": prompt, "attention_mask": mask},
        generation_config=fixed,
        multi_token_decode=how.component in ("chunk", "static"),
    )
    part, inputs = components["prefill" if how.component == "prefill" else "decode"]
    exporter = OnnxExporter()
    program, _ = exporter.export_program(part, inputs, OnnxConfig(dynamic=True, opset_version=how.opset))
    onnx_ir.save(program, path)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Drop what exporters say about themselves, by printing, warnings and log messages up to that level; errors raise."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
