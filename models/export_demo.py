"""Export the demo model to one self-contained ONNX file with a KV cache, and check it against transformers.

    python -m fuser.models.export_demo

The file is torch's dynamo exporter's own output at its default opset, float32 from the float16 weights as saved. Only
stack traces are taken out, since they name the folders of the machine that exported; module paths and classes stay.
"""

import argparse
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import torch
from transformers import AutoModelForCausalLM, DynamicCache

DEMO = Path(__file__).resolve().parent / "demo"
TOLERANCE = 2e-5  # of the norm of each output; float32 on both sides
STACK_TRACE = "pkg.torch.onnx.stack_trace"


class Decoder(torch.nn.Module):
    """A causal LM whose KV cache goes in and out as tensors; holds its parts, so that module paths stay the model's."""

    def __init__(self, lm: Any) -> None:
        super().__init__()
        self.model, self.lm_head = lm.model, lm.lm_head

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, position_ids: torch.Tensor, *past: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        """Ids, positions [B, S], mask [B, T], past [B, G, P, Dh] -> logits [B, S, V], present [B, G, T, Dh]."""
        cache = DynamicCache(list(zip(past[::2], past[1::2], strict=True)))
        hidden = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state
        return self.lm_head(hidden), *(state for layer in cache.layers for state in (layer.keys, layer.values))


def load(folder: Path) -> Any:
    """The saved model in float32, and so with exactly the float16 values on disk."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def cache_names(lm: Any, prefix: str) -> list[str]:
    return [f"{prefix}.{i}.{kind}" for i in range(lm.config.num_hidden_layers) for kind in ("key", "value")]


def cases(lm: Any) -> Iterator[tuple[str, tuple[torch.Tensor, ...]]]:
    """Named inputs of `Decoder`: decode, prefill, a chunk on top of a past, and a left-padded batch."""
    c = lm.config
    generator = torch.Generator().manual_seed(0)
    for name, B, S, P, padding in (
        ("decode", 1, 1, 37, 0),
        ("prefill", 1, 48, 0, 0),
        ("chunk", 1, 16, 21, 0),
        ("left-padded batch", 2, 24, 0, 9),
        ("left-padded decode", 2, 1, 24, 9),
    ):
        ids = torch.randint(c.vocab_size, (B, P + S), generator=generator)
        mask = torch.ones(B, P + S, dtype=torch.int64)
        mask[0, :padding] = 0
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        past = [torch.zeros(B, c.num_key_value_heads, 0, c.head_dim) for _ in range(2 * c.num_hidden_layers)]
        if P:  # a real past, from the model itself
            past = list(Decoder(lm)(ids[:, :P], mask[:, :P], positions[:, :P], *past)[1:])
        yield name, (ids[:, P:].contiguous(), mask, positions[:, P:].contiguous(), *past)


@torch.no_grad()
def check(path: Path, lm: Any) -> dict[str, float]:
    """The largest error of any output over its norm, for each case of `cases`, padded positions aside."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 2
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    names = ["input_ids", "attention_mask", "position_ids", *cache_names(lm, "past_key_values")]
    errors = {}
    for name, inputs in cases(lm):
        S = inputs[0].shape[1]
        expected = Decoder(lm)(*inputs)
        found = session.run(
            ["logits", *cache_names(lm, "present")],
            {key: value.numpy() for key, value in zip(names, inputs, strict=True)},
        )
        real = inputs[1].bool()
        errors[name] = 0.0
        for i, (f, e) in enumerate(zip(found, expected, strict=True)):
            if f.shape != tuple(e.shape):
                raise SystemExit(f"export_demo: {name}: output {i} must be {list(e.shape)}, got {list(f.shape)}")
            kept = real[:, -S:] if i == 0 else real  # [B, S] of logits, [B, T] of key and value
            want = (e if i == 0 else e.transpose(1, 2))[kept].double()
            got = torch.from_numpy(f if i == 0 else f.swapaxes(1, 2))[kept].double()
            error = float((got - want).norm() / want.norm())
            errors[name] = max(errors[name], error if np.isfinite(error) else np.inf)
    return errors


def export(lm: Any) -> onnx.ModelProto:
    """The model as ONNX, weights inside, without machine paths."""
    c = lm.config
    B, S, P = 2, 3, 5
    past = [torch.zeros(B, c.num_key_value_heads, P, c.head_dim) for _ in range(2 * c.num_hidden_layers)]
    inputs = (
        torch.zeros(B, S, dtype=torch.int64),
        torch.ones(B, P + S, dtype=torch.int64),
        torch.arange(P, P + S).expand(B, S).contiguous(),
        *past,
    )
    batch, sequence, length, total = (torch.export.Dim(name) for name in ("batch", "sequence", "past", "total"))
    dims = {
        "input_ids": {0: batch, 1: sequence},
        "attention_mask": {0: batch, 1: total},
        "position_ids": {0: batch, 1: sequence},
        "past": tuple({0: batch, 2: length} for _ in past),
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # each axis of one name but the first warns that it shares the name
        program = torch.onnx.export(
            Decoder(lm).eval(),
            inputs,
            dynamo=True,
            dynamic_shapes=dims,
            verbose=False,
            input_names=["input_ids", "attention_mask", "position_ids", *cache_names(lm, "past_key_values")],
            output_names=["logits", *cache_names(lm, "present")],
        )
    if program is None:
        raise SystemExit("export_demo: torch.onnx.export returned no program")
    model: onnx.ModelProto = program.model_proto
    for node in model.graph.node:
        kept = [entry for entry in node.metadata_props if entry.key != STACK_TRACE]
        del node.metadata_props[:]
        node.metadata_props.extend(kept)
    shape = {c.vocab_size, c.hidden_size}
    embeddings = [tensor.name for tensor in model.graph.initializer if set(tensor.dims) == shape]
    if len(embeddings) != 1:
        raise SystemExit(f"export_demo: the tied embedding must be stored once, found {embeddings}")
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=DEMO, help="the saved folder (default: %(default)s)")
    parser.add_argument("--output", type=Path, help="default: model.onnx in the folder")
    args = parser.parse_args()
    output = args.output or args.model / "model.onnx"
    lm = load(args.model)
    data = export(lm).SerializeToString(deterministic=True)
    for folder in (Path(torch.__file__).parents[1], Path(__file__).resolve().parent, Path.cwd(), Path.home()):
        if len(folder.parts) > 1 and bytes(folder) in data:
            raise SystemExit(f"export_demo: the file names a folder of this machine: {folder}")
    output.write_bytes(data)
    errors = check(output, lm)
    print(f"{output}: {len(data):,} bytes")
    for name, error in errors.items():
        print(f"  {name:20s} {error:.2e}")
    if max(errors.values()) > TOLERANCE:
        raise SystemExit(f"export_demo: an output is off by more than {TOLERANCE:g} of its norm")


if __name__ == "__main__":
    main()
