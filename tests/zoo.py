"""Tiny transformers models with random weights, as every exporter writes them: the real graphs that the tests compile.

    path = zoo.exported("llama", "dynamo")
    for name, feeds in zoo.cases(path).items():
        assert zoo.relative_error(zoo.run(path, feeds), zoo.reference("llama", feeds)) < 2e-5

To add a model, add an entry to `ARCHITECTURES`; to have it from optimum too, add it to tests/fixtures/optimum/make.py.
"""

import contextlib
import getpass
import hashlib
import importlib.metadata
import logging
import os
import tempfile
import warnings
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnxruntime
import torch
from numpy.typing import NDArray
from onnxruntime.capi.onnxruntime_pybind11_state import Fail

Array = NDArray[Any]
Feeds = dict[str, Array]
Dims = tuple[int | str, ...]  # a size, or the name of a dynamic dim

# Dims are told apart by their size: no two of these are equal, and F is no multiple of D.
D, H, G, DH, F, V, MAX_POSITIONS = 64, 4, 2, 16, 112, 96, 80
OPTIMUM = Path(__file__).parent / "fixtures" / "optimum"


@dataclass(frozen=True)
class Architecture:
    """One transformers model type at a tiny size.

    Attributes:
        model_type: its name in `transformers.AutoConfig`.
        config: what its config says besides, or instead of, the sizes that all of them share.
        attn: the attention implementation that it is exported with; some have no sdpa.
        causal: a decoder with past and present; otherwise an encoder that gives its last hidden state.
    """

    model_type: str
    config: Mapping[str, Any] = field(default_factory=dict)
    attn: Literal["sdpa", "eager"] = "sdpa"
    causal: bool = True


@dataclass(frozen=True)
class Exporter:
    """How a torch module becomes ONNX; `opset` is None where the exporter's own default is taken."""

    kind: Literal["dynamo", "torchscript", "committed"]
    opset: int | None = None


SIZES = {
    "hidden_size": D,
    "num_attention_heads": H,
    "vocab_size": V,
    "max_position_embeddings": MAX_POSITIONS,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
GROUPED = {"num_key_value_heads": G, "intermediate_size": F, "rms_norm_eps": 1e-5}

ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture("llama", GROUPED),
    "qwen2": Architecture("qwen2", GROUPED),  # biases on q, k and v
    "gpt2": Architecture("gpt2", {"n_inner": F}),  # packed QKV, learned positions, tied head
    "mistral": Architecture("mistral", GROUPED | {"sliding_window": 6}),
    "qwen3": Architecture("qwen3", GROUPED | {"head_dim": DH}),  # norms over the head dim of q and k
    "phi3": Architecture("phi3", GROUPED | {"sliding_window": None}),  # packed QKV, packed gate and up
    # (1 + weight) norms before and after, soft-capped scores and logits; every other layer sees 6 tokens
    "gemma2": Architecture(
        "gemma2", GROUPED | {"head_dim": DH, "query_pre_attn_scalar": DH, "sliding_window": 6}, attn="eager"
    ),
    "bert": Architecture("bert", {"intermediate_size": F}, causal=False),
}

EXPORTERS: dict[str, Exporter] = {
    "dynamo": Exporter("dynamo"),
    # Opset 23 is the newest that torch declares, and the only one for which its optimizer puts RMSNormalization and
    # RotaryEmbedding together again; 24 is accepted too and keeps just Attention whole.
    "dynamo23": Exporter("dynamo", 23),
    "dynamo24": Exporter("dynamo", 24),
    "torchscript": Exporter("torchscript", 17),
    "optimum": Exporter("committed"),
}

RUNTIME = tuple(int(part) for part in onnxruntime.__version__.split(".")[:2])

# Every (architecture, exporter) that `exported` can give and the installed ONNX Runtime, which knows opset 24 from 1.24
# on, can run.
EXPORTS: list[tuple[str, str]] = [
    (architecture, exporter)
    for architecture in ARCHITECTURES
    for exporter, how in EXPORTERS.items()
    if how.kind != "committed" or (OPTIMUM / f"{architecture}.onnx").exists()
    if how.opset != 24 or RUNTIME >= (1, 24)
]


def model(architecture: str, *, dtype: str = "float32", layers: int = 2, attn: str | None = None) -> torch.nn.Module:
    """The transformers model itself, in eval mode on the CPU, the same weights in every process and version.

    Weights are drawn anew, because a fresh model has norm weights of one and biases of zero, which hide a rewrite that
    drops or swaps them.
    """
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

    spec = ARCHITECTURES[architecture]
    config = AutoConfig.for_model(spec.model_type, **(SIZES | {"num_hidden_layers": layers} | dict(spec.config)))
    auto = AutoModelForCausalLM if spec.causal else AutoModel
    made: torch.nn.Module = auto.from_config(config, attn_implementation=attn or spec.attn)
    draw_weights(made)
    return made.to(getattr(torch, dtype)).eval()


@torch.no_grad()
def draw_weights(made: torch.nn.Module) -> None:
    """Give every parameter new values that depend on its name only."""
    from transformers.pytorch_utils import Conv1D

    fan_in = {}
    for module in made.modules():
        if isinstance(module, torch.nn.Embedding):
            fan_in[module.weight] = 1
        elif isinstance(module, Conv1D):  # stored [in, out], unlike Linear
            fan_in[module.weight] = module.weight.shape[0]
    for name, parameter in made.named_parameters():
        # RandomState is the one generator whose stream NumPy promises never to change; the committed files rely on it.
        normal = torch.from_numpy(np.random.RandomState(zlib.crc32(name.encode())).standard_normal(parameter.shape))
        if parameter.dim() == 1:
            parameter.add_(0.3 * normal)  # to a bias of zero, or a norm weight of one (zero where the model adds one)
        else:
            parameter.copy_(normal / fan_in.get(parameter, parameter.shape[-1]) ** 0.5)


class Decoder(torch.nn.Module):
    """A causal model as a function of tensors alone, which is what every exporter takes.

    `(input_ids[B, S], attention_mask[B, T], position_ids[B, S], *past[B, G, P, Dh]) -> (logits[B, S, V],
    *present[B, G, T, Dh])`, past and present being key, value, key, value ... by layer.
    """

    def __init__(self, made: torch.nn.Module) -> None:
        super().__init__()
        self.model = made
        self.eval()  # or the exporters, which put the mode back that they found, would leave dropout on
        config: Any = made.config
        heads = getattr(config, "num_key_value_heads", config.num_attention_heads)
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        states = [f"{layer}.{state}" for layer in range(config.num_hidden_layers) for state in ("key", "value")]
        tokens = ("batch", "sequence")
        self.inputs: dict[str, Dims] = {
            "input_ids": tokens,
            "attention_mask": ("batch", "total"),
            "position_ids": tokens,
            **{f"past_key_values.{state}": ("batch", heads, "past", width) for state in states},
        }
        self.outputs: dict[str, Dims] = {
            "logits": (*tokens, config.vocab_size),
            **{f"present.{state}": ("batch", heads, "total", width) for state in states},
        }

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, position_ids: torch.Tensor, *past: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        from transformers import DynamicCache

        # Without a config: a sliding-window layer too then keeps all it has seen, and the mask alone says what it sees.
        cache = DynamicCache(list(zip(past[::2], past[1::2], strict=True)))
        out = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=True,
        )
        return out.logits, *(state for layer in cache.layers for state in (layer.keys, layer.values))


class Encoder(torch.nn.Module):
    """An encoder likewise: `(input_ids, attention_mask, token_type_ids)[B, S] -> last_hidden_state[B, S, D]`."""

    def __init__(self, made: torch.nn.Module) -> None:
        super().__init__()
        self.model = made
        self.eval()
        tokens = ("batch", "sequence")
        self.inputs: dict[str, Dims] = dict.fromkeys(("input_ids", "attention_mask", "token_type_ids"), tokens)
        self.outputs: dict[str, Dims] = {"last_hidden_state": (*tokens, D)}

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, token_type_ids: torch.Tensor
    ) -> tuple[torch.Tensor]:
        out = self.model(input_ids=input_ids, attention_mask=attention_mask, token_type_ids=token_type_ids)
        return (out.last_hidden_state,)


def flat_model(
    architecture: str, *, dtype: str = "float32", layers: int = 2, attn: str | None = None
) -> Decoder | Encoder:
    """`model` as the function of tensors that `exported` exports; `.inputs` and `.outputs` name and shape them."""
    made = model(architecture, dtype=dtype, layers=layers, attn=attn)
    return Decoder(made) if ARCHITECTURES[architecture].causal else Encoder(made)


def exported(
    architecture: str,
    exporter: str,
    *,
    dtype: Literal["float32", "float16"] = "float32",
    layers: int = 2,
    attn: Literal["sdpa", "eager"] | None = None,
) -> Path:
    """An ONNX file of that architecture by that exporter, weights inside, made at the first request.

    Decoders have inputs input_ids, attention_mask, position_ids and past_key_values.{i}.key and .value, and outputs
    logits and present.{i}.key and .value, with dynamic batch, sequence, past and total length; the committed files have
    the signature that optimum gave them. `attn` is the architecture's own by default, but eager for TorchScript in
    float16. For many layers take torchscript: 32 layers of llama are 4 s with it and 70 s with dynamo.
    Of gemma2 in float16 dynamo23 writes a RMSNormalization with two dtypes, which no runtime takes.

    Files are kept in the temporary directory, by user, package versions and the text of this file ($FUSER_ZOO_CACHE
    names another directory). Processes may ask for one at the same time.

    Raises:
        KeyError: no such architecture or exporter.
        ValueError: a committed file with options that it was not made with, or one that was never made.
    """
    how = EXPORTERS[exporter]
    # TorchScript's SDPA puts float32 constants into a float16 model: all that follows turns float32, as far as a
    # LayerNormalization whose weights did not, which no runtime takes.
    eager = how.kind == "torchscript" and dtype == "float16"
    attn = attn or ("eager" if eager else ARCHITECTURES[architecture].attn)
    if how.kind == "committed":
        path = OPTIMUM / f"{architecture}.onnx"
        if (dtype, layers, attn) != ("float32", 2, "sdpa") or not path.exists():
            raise ValueError(
                f"{exporter} files are committed, in float32 with 2 layers and sdpa: there is none of {architecture} "
                f"in {dtype} with {layers} layers and {attn}; tests/fixtures/optimum/make.py makes them"
            )
        return path
    path = _cache_directory() / f"{architecture}-{exporter}-{dtype}-{layers}-{attn}.onnx"
    if not path.exists():
        with tempfile.TemporaryDirectory(dir=path.parent) as unfinished:
            export(flat_model(architecture, dtype=dtype, layers=layers, attn=attn), how, Path(unfinished) / path.name)
            os.replace(Path(unfinished) / path.name, path)
    return path


def _cache_directory() -> Path:
    root = os.environ.get("FUSER_ZOO_CACHE") or Path(tempfile.gettempdir()) / f"fuser-zoo-{getpass.getuser()}"
    made_by = hashlib.sha256(Path(__file__).read_bytes())
    for package in ("torch", "transformers", "onnx", "onnxscript", "onnx-ir"):
        made_by.update(f"{package} {importlib.metadata.version(package)}\n".encode())
    directory = Path(root) / made_by.hexdigest()[:16]
    directory.mkdir(parents=True, exist_ok=True)
    return directory


def export(flat: Decoder | Encoder, how: Exporter, path: Path) -> None:
    """Write one as ONNX, weights inside, every dim dynamic that `.inputs` and `.outputs` name."""
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
        # three named arguments, and for a decoder the past, one argument that is a tuple
        options["dynamic_shapes"] = (*shapes[:3], tuple(shapes[3:])) if len(shapes) > 3 else tuple(shapes)
        options |= {"dynamo": True, "external_data": False, "verbose": False}
    else:
        options |= {"dynamo": False, "dynamic_axes": axes}
    with quiet():
        torch.onnx.export(flat, tuple(example), str(path), **options)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Drop warnings and log messages up to that level: exporters give dozens about themselves; errors still raise."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


def cases(source: Path | str | onnxruntime.InferenceSession) -> dict[str, Feeds]:
    """Random feeds for a graph, the same ones each time, by what a serving engine would be doing.

    `decode`: one token on a past of 5. `prefill`: 7 tokens on none. `chunk`: 3 tokens on 5. `padded`: two sequences of
    3 tokens on 5, the first with two tokens of padding on its left. A graph without a past gets those tokens alone, and
    one of a single new token only `decode` and a `padded` of one token.

    Raises:
        ValueError: the graph has an input of another kind.
    """
    session = source if isinstance(source, onnxruntime.InferenceSession) else _session(source)
    signature = {entry.name: entry.shape for entry in session.get_inputs()}
    sizes = {"decode": (1, 1, 5), "prefill": (1, 7, 0), "chunk": (1, 3, 5), "padded": (2, 3, 5)}
    if signature.get("input_ids", ())[1:] == [1]:
        sizes = {"decode": (1, 1, 5), "padded": (2, 1, 5)}
    if not any(len(shape) == 4 for shape in signature.values()):
        sizes = {name: (B, S, 0) for name, (B, S, _) in sizes.items()}
    return {
        name: feeds(session, B, S, P, padding=2 if name == "padded" else 0, seed=seed)
        for seed, (name, (B, S, P)) in enumerate(sizes.items())
    }


def feeds(
    session: onnxruntime.InferenceSession, batch: int, tokens: int, past: int, *, padding: int = 0, seed: int = 0
) -> Feeds:
    """Random feeds: `tokens` new ones on `past`, the first sequence with `padding` tokens of padding on its left.

    Raises:
        ValueError: the graph has an input of another kind.
    """
    random = np.random.RandomState(seed)
    mask = np.ones((batch, past + tokens), np.int64)
    mask[0, :padding] = 0
    known = {
        "input_ids": random.randint(0, V, (batch, tokens)),
        "attention_mask": mask,
        "position_ids": np.maximum(mask.cumsum(1) - 1, 0)[:, past:],
        "token_type_ids": random.randint(0, 2, (batch, tokens)),
    }
    made: Feeds = {}
    for entry in session.get_inputs():
        if entry.name in known:
            made[entry.name] = known[entry.name]
        elif len(entry.shape) == 4:  # keys or values; some exporters write a fixed size as a name, "2"
            _, heads, _, head_dim = entry.shape
            dtype = {"tensor(float)": np.float32, "tensor(float16)": np.float16}[entry.type]
            made[entry.name] = random.standard_normal((batch, int(heads), past, int(head_dim))).astype(dtype)
        else:
            raise ValueError(f"no feeds for input {entry.name} {entry.type} {entry.shape}, only for {list(known)}")
    return made


def run(path: Path | str, feeds: Feeds, *, optimize: bool = True) -> dict[str, Array]:
    """Every output by name, of the file in ONNX Runtime on two CPU threads, with or without its graph optimizations."""
    session = _session(path, optimize=optimize)
    names = [entry.name for entry in session.get_outputs()]
    return dict(zip(names, session.run(names, feeds), strict=True))


def _session(path: Path | str, *, optimize: bool = True) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 2
    options.log_severity_level = 3
    if optimize:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Fail:
        # Up to 1.30 a Cast of float16 to float16 loads only with the basic optimizations, which drop it (onnxruntime 29235).
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


@torch.no_grad()
def reference(architecture: str, feeds: Feeds, *, layers: int = 2, attn: str = "eager") -> dict[str, Array]:
    """What torch itself gives for those feeds, in float32, by output name."""
    flat = flat_model(architecture, layers=layers, attn=attn)
    inputs = [torch.from_numpy(feeds[name]) for name in flat.inputs]
    outputs = flat(*(t.float() if t.is_floating_point() else t for t in inputs))
    return {name: t.numpy() for name, t in zip(flat.outputs, outputs, strict=True)}


def relative_error(actual: Mapping[str, Array], reference: Mapping[str, Array]) -> float:
    """The largest ||a - r|| / ||r|| of the outputs, in float64; infinite where a NaN or an infinity is involved.

    Raises:
        ValueError: the two differ in their outputs or in a shape.
    """
    if actual.keys() != reference.keys():
        raise ValueError(f"outputs differ: {sorted(actual)} and {sorted(reference)}")
    worst = 0.0
    for name, expected in reference.items():
        if actual[name].shape != expected.shape:
            raise ValueError(f"{name}: {actual[name].shape}, reference {expected.shape}")
        r = expected.astype(np.float64)
        difference = float(np.linalg.norm(actual[name].astype(np.float64) - r))
        if difference > 0 or np.isnan(difference):
            norm = float(np.linalg.norm(r))
            error = difference / norm if norm > 0 else np.inf
            worst = max(worst, error if np.isfinite(error) else np.inf)
    return worst
