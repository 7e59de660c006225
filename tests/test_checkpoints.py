"""Folders as GPTQ, AWQ and compressed-tensors leave them: written here from their layouts, read by fuser."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fuser
from fuser.errors import InputError
from fuser.loading import pretrained
from fuser.quantizing import QuantizedLinear

transformers = pytest.importorskip("transformers")
safetensors = pytest.importorskip("safetensors.torch")

Stored = dict[str, Tensor]
KEPT = ("model.layers.0.mlp.down_proj",)  # a linear that is not quantized, beside the head
SIZES = {"hidden_size": 96, "intermediate_size": 160, "vocab_size": 64, "num_hidden_layers": 2}


def words(codes: Tensor, bits: int) -> Tensor:
    """Codes [R, M] as int32 [R, M * bits / 32], the first lowest."""
    per = 32 // bits
    lanes = codes.long().reshape(len(codes), -1, per) << (torch.arange(per) * bits)
    return lanes.sum(-1).to(torch.int32)


def drawn(N: int, K: int, groups: int, bits: int, *, symmetric: bool, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes [N, K], scales [N, groups] and zeros [N, groups]."""
    random = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 1 << bits, (N, K), generator=random)
    scales = ((torch.rand(N, groups, generator=random) + 0.5) / (1 << bits) * 0.2).half()
    zeros = torch.randint(0, 1 << bits, (N, groups), generator=random)
    return codes, scales, torch.full_like(zeros, 1 << (bits - 1)) if symmetric else zeros


def meant(codes: Tensor, scales: Tensor, zeros: Tensor, group: Tensor) -> Tensor:
    return (codes - zeros[:, group]).float() * scales.float()[:, group]


def gptq(said: dict[str, Any], N: int, K: int, seed: int) -> tuple[Stored, Tensor]:
    bits, size = said["bits"], said["group_size"]
    size = K if size < 0 else size
    groups = -(-K // size)
    codes, scales, zeros = drawn(N, K, groups, bits, symmetric=said["sym"], seed=seed)
    order = torch.arange(K) // size
    if said["desc_act"]:
        order = order[torch.randperm(K, generator=torch.Generator().manual_seed(seed))]
    packed = words(zeros.T, bits)
    if said.get("checkpoint_format") != "gptq_v2":  # as a whole word: what a zero of 0 lacks is borrowed from the next
        packed = (packed.long() - sum(1 << shift for shift in range(0, 32, bits))).to(torch.int32)
    stored = {
        "qweight": words(codes, bits).T, "qzeros": packed, "scales": scales.T, "g_idx": order.int(),
    }  # fmt: skip
    return stored, meant(codes, scales, zeros, order)


def awq(said: dict[str, Any], N: int, K: int, seed: int) -> tuple[Stored, Tensor]:
    groups = K // said["group_size"]
    codes, scales, zeros = drawn(N, K, groups, 4, symmetric=not said["zero_point"], seed=seed)

    def columns(codes: Tensor) -> Tensor:
        return words(codes.reshape(len(codes), -1, 8)[..., [0, 2, 4, 6, 1, 3, 5, 7]].flatten(1), 4)

    stored = {"qweight": columns(codes.T), "qzeros": columns(zeros.T), "scales": scales.T}
    return stored, meant(codes, scales, zeros, torch.arange(K) // said["group_size"])


def packed(said: dict[str, Any], N: int, K: int, seed: int) -> tuple[Stored, Tensor]:
    weights = said["config_groups"]["group_0"]["weights"]
    bits, size = weights["num_bits"], weights["group_size"] or K
    codes, scales, zeros = drawn(N, K, -(-K // size), bits, symmetric=weights["symmetric"], seed=seed)
    stored = {
        "weight_packed": words(codes, bits), "weight_scale": scales.bfloat16(), "weight_shape": torch.tensor([N, K]),
    }  # fmt: skip
    if not weights["symmetric"]:
        stored["weight_zero_point"] = words(zeros.T, bits).T
    return stored, meant(codes, scales.bfloat16(), zeros, torch.arange(K) // size)


def integers(said: dict[str, Any], N: int, K: int, seed: int) -> tuple[Stored, Tensor]:
    codes, scales, zeros = drawn(N, K, 1, 8, symmetric=True, seed=seed)
    stored = {"weight": (codes - 128).to(torch.int8), "weight_scale": scales.float()}
    return stored, meant(codes, scales, zeros, torch.zeros(K, dtype=torch.int64))


def floats(said: dict[str, Any], N: int, K: int, seed: int) -> tuple[Stored, Tensor]:
    codes, scales, _ = drawn(N, K, 1, 8, symmetric=True, seed=seed)
    values = (codes.float() - 128).to(torch.float8_e4m3fn)
    return {"weight": values, "weight_scale": scales.bfloat16()}, values.float() * scales.bfloat16().float()


def scheme(bits: int, size: int | None, symmetric: bool, kind: str = "int", inputs: bool = False, **more: Any) -> Any:
    strategy = "group" if size else "channel"
    weights = {
        "num_bits": bits,
        "type": kind,
        "symmetric": symmetric,
        "strategy": strategy,
        "group_size": size,
        "dynamic": False,
    }
    rounded = {"num_bits": 8, "type": kind, "symmetric": True, "strategy": "token", "dynamic": True}
    group = {"targets": ["Linear"], "weights": weights | more, "input_activations": rounded if inputs else None}
    form = "pack-quantized" if not inputs else f"{kind}-quantized"
    return {
        "quant_method": "compressed-tensors", "format": form, "config_groups": {"group_0": group},
        "ignore": ["lm_head", *KEPT],
    }  # fmt: skip


def gptq_said(bits: int, size: int, sym: bool, desc_act: bool = False, version: str = "gptq") -> dict[str, Any]:
    return {
        "quant_method": "gptq", "bits": bits, "group_size": size, "sym": sym, "desc_act": desc_act,
        "checkpoint_format": version,
    }  # fmt: skip


def awq_said(size: int, zero_point: bool) -> dict[str, Any]:
    return {
        "quant_method": "awq", "bits": 4, "group_size": size, "zero_point": zero_point, "version": "gemm",
        "modules_to_not_convert": list(KEPT),
    }  # fmt: skip


CASES = {
    "gptq-4": (gptq, gptq_said(4, 32, True), "int4:32"),
    "gptq-4-asymmetric": (gptq, gptq_said(4, 32, False), "int4:32:asymmetric"),
    "gptq-4-v2": (gptq, gptq_said(4, 32, False, version="gptq_v2"), "int4:32:asymmetric"),
    "gptq-4-channel": (gptq, gptq_said(4, -1, False), "int4:channel:asymmetric"),
    "gptq-8": (gptq, gptq_said(8, 32, True), "int8:32"),
    "gptq-8-asymmetric": (gptq, gptq_said(8, 32, False), "int8:32:asymmetric"),
    "gptq-act-order": (gptq, gptq_said(4, 32, True, True), None),
    "gptq-act-order-asymmetric": (gptq, gptq_said(8, 32, False, True), None),
    "awq": (awq, awq_said(32, True), "int4:32:asymmetric"),
    "awq-no-zeros": (awq, awq_said(32, False), "int4:32"),
    "packed-4": (packed, scheme(4, 32, True), "int4:32"),
    "packed-4-asymmetric": (packed, scheme(4, 32, False), "int4:32:asymmetric"),
    "packed-4-channel": (packed, scheme(4, None, True), "int4:channel"),
    "packed-8": (packed, scheme(8, 32, True), "int8:32"),
    "w8a8": (integers, scheme(8, None, True, inputs=True), "w8a8"),
    "fp8": (floats, scheme(8, None, True, "float", inputs=True), "fp8"),
}


def made(folder: Path, write: Callable[..., tuple[Stored, Tensor]], said: dict[str, Any], *, shards: int = 1) -> Any:
    """A folder of a small Llama with quantized weights, and the module of what they mean."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        **SIZES, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128, eos_token_id=1
    )
    module = transformers.LlamaForCausalLM(config).eval()
    tensors = {name: held.detach().clone() for name, held in module.state_dict().items()}
    for seed, (path, part) in enumerate(list(module.named_modules())):
        if not isinstance(part, torch.nn.Linear) or path in (*KEPT, "lm_head"):
            continue
        stored, weight = write(said, part.out_features, part.in_features, seed)
        part.weight.data = weight
        del tensors[f"{path}.weight"]
        tensors |= {f"{path}.{name}": held.contiguous() for name, held in stored.items()}
    module.config.architectures = ["LlamaForCausalLM"]
    module.config.dtype = torch.float32
    folder.mkdir(exist_ok=True)
    held = json.loads(module.config.to_json_string()) | {"quantization_config": said}
    (folder / "config.json").write_text(json.dumps(held))
    names = sorted(tensors)
    files = {f"model-{n + 1}-of-{shards}.safetensors": names[n::shards] for n in range(shards)}
    for file, inside in files.items():
        safetensors.save_file({name: tensors[name] for name in inside}, folder / file)
    if shards > 1:
        index = {"weight_map": {name: file for file, inside in files.items() for name in inside}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return module


@pytest.mark.parametrize("case", CASES)
def test_folders(case: str, tmp_path: Path) -> None:
    write, said, format = CASES[case]
    expected = made(tmp_path, write, said, shards=1 + len(case) % 2)
    module: Any = pretrained(tmp_path, None, None)
    linears = {
        path: part for path, part in module.named_modules() if isinstance(part, (torch.nn.Linear, QuantizedLinear))
    }
    for path, part in linears.items():
        plain = expected.get_submodule(path)
        if path in (*KEPT, "lm_head") or format is None:
            assert isinstance(part, torch.nn.Linear)
        else:
            assert isinstance(part, QuantizedLinear) and str(part.format) == format
        torch.testing.assert_close(part.weight.data, plain.weight.data, rtol=1e-6, atol=1e-8)
    ids = torch.arange(1, 30)[None]
    if format is not None and format in ("w8a8", "fp8"):
        expected = fuser.quantize(expected, format, keep=KEPT)
        for path, part in linears.items():
            if isinstance(part, QuantizedLinear):
                expected.set_submodule(path, part)
    with torch.no_grad():
        torch.testing.assert_close(module(ids).logits, expected(ids).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", ("gptq-4-asymmetric", "gptq-act-order", "awq", "packed-4", "w8a8"))
def test_text_is_scored_as_the_weights_mean_it(case: str, tmp_path: Path) -> None:
    write, said, format = CASES[case]
    expected = made(tmp_path, write, said)
    llm = fuser.LLM(tmp_path, max_length=64)
    assert llm.padded is None
    ids = list(range(2, 40))
    with torch.no_grad():
        reference = pretrained(tmp_path, None, None) if format == "w8a8" else expected
        logprobs = reference(torch.tensor([ids])).logits[0].log_softmax(-1)
    wanted = logprobs[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
    found = torch.tensor(llm.score([ids])[0].logprobs)
    assert (found - wanted).abs().max() < (0.1 if format == "w8a8" else 1e-4)
    loaded = fuser.load(tmp_path)
    with torch.no_grad():
        logits = loaded(torch.tensor([ids])).logits[0]
    assert (logits.log_softmax(-1) - logprobs).abs().max() < (0.3 if format == "w8a8" else 1e-4)


WRONG = {
    "quantized by 'hqq' are not read": {"quant_method": "hqq"},
    "weights of 3 bits are not read": gptq_said(3, 32, True),
    "groups of 16 are not read": gptq_said(4, 16, True),
    "the gptq format 'marlin' is not read": gptq_said(4, 32, True, version="marlin"),
    "version 'gemv', 4 bits, are not read": awq_said(32, True) | {"version": "gemv"},
    "kv_cache_scheme are not read": scheme(4, 32, True) | {"kv_cache_scheme": {"num_bits": 8}},
    "scales by block are not read": scheme(4, 32, True, strategy="block"),
    "by a scale a token": scheme(8, 32, True, inputs=True),
    "fp8 weights whose inputs are not rounded": scheme(8, None, True, "float"),
    "no scheme of config_groups is for it": scheme(4, 32, True) | {"config_groups": {}},
}


@pytest.mark.parametrize("reason", WRONG)
def test_what_is_not_read_is_told(reason: str, tmp_path: Path) -> None:
    said = WRONG[reason]
    writer = {"gptq": gptq, "awq": awq}.get(said["quant_method"], packed)
    written = (
        said
        if said.get("bits") in (4, 8) and writer is not packed
        else scheme(4, 32, True)
        if writer is packed
        else gptq_said(4, 32, True)
    )
    made(tmp_path, writer, written)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": said}))
    with pytest.raises(InputError, match=reason) as error:
        fuser.load(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "change", "reason"),
    [
        ("model.layers.1.self_attn.q_proj.scales", None, "scales is missing"),
        ("model.layers.1.self_attn.q_proj.scales", lambda held: held * float("inf"), "scales are not finite"),
        ("model.layers.1.self_attn.q_proj.qweight", lambda held: held[1:], r"qweight must be \[12, 96\]"),
        ("model.layers.1.self_attn.q_proj.g_idx", lambda held: held + 7, "g_idx must be"),
        ("model.norm.weight", None, "has no tensor 'model.norm.weight'"),
        ("model.norm.weight", lambda held: held[1:], r"must be \[96\], got \[95\]"),
    ],
)  # fmt: skip
def test_tensors_that_are_wrong(name: str, change: Any, reason: str, tmp_path: Path) -> None:
    made(tmp_path, gptq, gptq_said(4, 32, True))
    path = tmp_path / "model-1-of-1.safetensors"
    tensors = safetensors.load_file(path)
    held = tensors.pop(name)
    if change is not None:
        tensors[name] = change(held).contiguous()
    safetensors.save_file(tensors, path)
    with pytest.raises(InputError, match=reason):
        fuser.load(tmp_path)
    path.write_bytes(b"no")
    with pytest.raises(InputError, match="cannot be read"):
        fuser.load(tmp_path)
