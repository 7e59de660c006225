"""Folders of quantized weights as GPTQ, AWQ and compressed-tensors leave them: modules whose linears hold the codes.

Sources: the packing of AutoGPTQ and GPTQModel (`qweight`, `qzeros`, `scales`, `g_idx`), the gemm version of AutoAWQ, and the
compressors pack-quantized, int-quantized and float-quantized of compressed-tensors.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fuser.errors import InputError
from fuser.formats import GROUPS, Format
from fuser.quantized import Codes, pack
from fuser.quantizing import QuantizedLinear

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # the columns, of eight, whose codes follow one another in a word
BITS = (4, 8)


def quantization_of(config: Any) -> Mapping[str, Any] | None:
    """What a config says of how its weights are quantized; nothing where they are not."""
    found = getattr(config, "quantization_config", None)
    if found is not None and not isinstance(found, Mapping):
        found = found.to_dict() if hasattr(found, "to_dict") else {}
    return found


def load(folder: Path, config: Any, kind: Any, dtype: torch.dtype | None) -> nn.Module:
    """The module of a folder whose config has a `quantization_config`; no weight is held in floating point meanwhile.

    Args:
        config: of transformers.
        kind: the class of the module.
        dtype: of what is not quantized, and of what codes stand for; by default the config's.

    Raises:
        InputError: weights are quantized in a way that is not read, or a tensor is missing or of a wrong shape.
    """
    said = quantization_of(config) or {}
    method = str(said.get("quant_method", ""))
    if method not in METHODS:
        raise InputError(f"'{folder}': weights quantized by '{method}' are not read; those by {', '.join(METHODS)} are")
    read = METHODS[method](folder, said)
    del config.quantization_config
    named = dtype or getattr(config, "dtype", None) or torch.float16
    wanted = getattr(torch, named) if isinstance(named, str) else named
    config.dtype = wanted
    with Unfilled():
        module: nn.Module = kind(config)
    tensors = _Tensors.of(folder, module)
    embeddings: Any = getattr(module, "get_output_embeddings", None)
    head = embeddings() if embeddings is not None else None
    count = 0
    for path, part in list(module.named_modules()):
        if not isinstance(part, nn.Linear):
            continue
        layer = Layer(folder, path, part.out_features, part.in_features, tensors)
        found = read(layer)
        if found is None:
            continue
        count += 1
        if part is head:
            config.tie_word_embeddings = False  # what is quantized is no table as well
        bias = layer.get("bias")
        bias = None if bias is None else bias.to(wanted)
        if isinstance(found, Codes):
            module.set_submodule(path, QuantizedLinear(found, bias, wanted))
        else:
            part.weight = nn.Parameter(found.to(wanted), requires_grad=False)
            tensors.done.add(f"{path}.weight")
    if not count:
        raise InputError(f"'{folder}': its config says {method}, and no linear has codes")
    _fill(module, tensors, wanted)
    return module.eval()


class Unfilled(TorchFunctionMode):
    """Within, tensors that are made to be filled, as weights are, have no elements."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.empty:
            kwargs["device"] = "meta"
        return func(*args, **kwargs)


@dataclass
class _Tensors:
    """The tensors of a folder by the names that the module has for them."""

    folder: Path
    files: Mapping[str, Path]
    prefix: str  # what the names in the files have in front
    strip: str  # what those of the module have in front
    done: set[str]

    @classmethod
    def of(cls, folder: Path, module: nn.Module) -> "_Tensors":
        files = _files(folder)
        base = f"{getattr(module, 'base_model_prefix', '')}."
        names = [name for name, _ in module.named_parameters()]
        for prefix, strip in (("", ""), (base, ""), ("", base)):
            found = cls(folder, files, prefix, strip, set())
            if any(found.name(name) in files for name in names):
                return found
        raise InputError(f"'{folder}': no tensor of its files has a name that the model knows")

    def name(self, name: str) -> str:
        return self.prefix + name.removeprefix(self.strip)

    def get(self, name: str) -> Tensor | None:
        """A tensor, read from its file; None where there is none of that name."""
        path = self.files.get(self.name(name))
        if path is None:
            return None
        with _opened(path) as file:
            found: Tensor = file.get_tensor(self.name(name))
        return found


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (OSError, SafetensorError) as error:
        raise InputError(f"'{path}' cannot be read: {' '.join(str(error).split())[:200]}") from None


def _files(folder: Path) -> dict[str, Path]:
    """Which file has which tensor."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            found = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            return {str(name): folder / Path(str(file)).name for name, file in found.items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            raise InputError(f"'{index}' is no index of safetensors") from None
    files: dict[str, Path] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with _opened(path) as file:
            files |= dict.fromkeys(file.keys(), path)
    if not files:
        raise InputError(f"'{folder}' has no safetensors")
    return files


def _fill(module: nn.Module, tensors: _Tensors, dtype: torch.dtype) -> None:
    """Puts what is not quantized in its place."""
    for name, held in [*module.named_parameters(), *module.named_buffers()]:
        path, _, last = name.rpartition(".")
        owner = module.get_submodule(path)
        if isinstance(owner, QuantizedLinear) or name in tensors.done:
            continue
        found = tensors.get(name)
        if found is None:
            continue
        if found.shape != held.shape:
            raise InputError(f"'{tensors.folder}': '{name}' must be {[*held.shape]}, got {[*found.shape]}")
        if last in owner._buffers:
            owner._buffers[last] = found.to(held.dtype)
        else:
            setattr(owner, last, nn.Parameter(found.to(dtype), requires_grad=False))
            tensors.done.add(name)
    tie: Any = getattr(module, "tie_weights", None)
    if tie is not None:
        tie()
    for name, held in module.named_parameters():
        owner = module.get_submodule(name.rpartition(".")[0])
        if name not in tensors.done and not isinstance(owner, QuantizedLinear):
            raise InputError(f"'{tensors.folder}' has no tensor '{tensors.name(name)}'")
        held.requires_grad_(False)


@dataclass(frozen=True)
class Layer:
    """A linear [N, K] and its tensors in a folder."""

    folder: Path
    path: str
    N: int
    K: int
    tensors: _Tensors

    def get(self, name: str) -> Tensor | None:
        return self.tensors.get(f"{self.path}.{name}")

    def need(self, name: str, *shape: int) -> Tensor:
        """A tensor of a shape; -1 is any size.

        Raises:
            InputError: it is missing, or has another.
        """
        found = self.get(name)
        if found is None:
            raise self.wrong(f"{name} is missing")
        if len(found.shape) != len(shape) or any(a not in (-1, b) for a, b in zip(shape, found.shape, strict=True)):
            raise self.wrong(f"{name} must be {[*shape]}, got {[*found.shape]}")
        return found

    def wrong(self, text: str) -> InputError:
        return InputError(f"'{self.folder}': '{self.path}': {text}")


Reader = Callable[[Layer], Codes | Tensor | None]  # a weight in codes, or [N, K]; None where it is not quantized


def _bits(folder: Path, said: Any) -> int:
    if said not in BITS:
        raise InputError(
            f"'{folder}': weights of {said} bits are not read; those of {' and '.join(map(str, BITS))} are"
        )
    return int(said)


def _from_words(words: Tensor, bits: int) -> Tensor:
    """int32 [R, M] as codes uint8 [R, M * 32 / bits], the lower bits first."""
    shifts = torch.arange(0, 32, bits, dtype=torch.int32)
    return ((words.unsqueeze(-1) >> shifts) & ((1 << bits) - 1)).to(torch.uint8).flatten(1)


def _codes(layer: Layer, codes: Tensor, scales: Tensor, zeros: Tensor | None, format: Format, group: int) -> Codes:
    """Codes [N, K], scales and zeros [N, groups] as they are kept here."""
    N, K = layer.N, layer.K
    if tuple(codes.shape) != (N, K):
        raise layer.wrong(f"codes must be [{N}, {K}], got {[*codes.shape]}")
    if not scales.isfinite().all():
        raise layer.wrong("scales are not finite")
    if group >= K:
        group = K
    elif group not in GROUPS and group % GROUPS[-1]:
        raise layer.wrong(f"groups of {group} are not read; those of {', '.join(map(str, GROUPS))} are")
    parts = [scales] if zeros is None else [scales, zeros]
    if any(tuple(part.shape) != (N, -(-K // group)) for part in parts):
        raise layer.wrong(f"scales and zeros must be [{N}, {-(-K // group)}], got {[*scales.shape]}")
    if group > GROUPS[-1] and group < K:
        parts = [part.repeat_interleave(group // GROUPS[-1], 1)[:, : -(-K // GROUPS[-1])] for part in parts]
        group = GROUPS[-1]
    scales, levels = parts[0].contiguous(), parts[1].contiguous() if len(parts) > 1 else None
    if levels is not None and (levels == format.middle).all():
        levels = None
    made = Format(format.kind, None if group == K else group, levels is None, format.activations)
    return Codes(pack(codes, made), scales, levels, made, K)


def gptq(folder: Path, said: Mapping[str, Any]) -> Reader:
    """Codes lie along K in words, zeros along N; those of the old format are one less than they mean.

    Where columns were taken by their activations' size, groups are no neighbours: such a weight is made whole, exactly.
    """
    bits, size = _bits(folder, said.get("bits")), int(said.get("group_size", -1))
    old = str(said.get("checkpoint_format", "gptq")) != "gptq_v2"
    if str(said.get("checkpoint_format", "gptq")) not in ("gptq", "gptq_v2"):
        raise InputError(f"'{folder}': the gptq format '{said['checkpoint_format']}' is not read; gptq and gptq_v2 are")

    def read(layer: Layer) -> Codes | Tensor | None:
        if layer.get("qweight") is None:
            return None
        N, K = layer.N, layer.K
        words = layer.need("qweight", K * bits // 32, N)
        group = K if size < 0 else min(size, K)
        packed = layer.need("qzeros", -(-K // group), N * bits // 32)
        scales = layer.need("scales", -(-K // group), N).T
        if old:  # one was taken from each before they were packed: added to whole words, so that what was borrowed comes back
            ones = sum(1 << shift for shift in range(0, 32, bits))
            packed = (packed.long() + ones).to(torch.int32)
        codes, zeros = _from_words(words.T.contiguous(), bits), _from_words(packed, bits).T
        order = layer.get("g_idx")
        if order is not None and not torch.equal(order.long(), torch.arange(K) // group):
            return _ungrouped(layer, codes, scales, zeros, order)
        return _codes(layer, codes, scales, zeros, Format(f"int{bits}"), group)

    return read


def _ungrouped(layer: Layer, codes: Tensor, scales: Tensor, zeros: Tensor | float, order: Tensor) -> Tensor:
    """The weight [N, K] of codes whose groups are told one by one."""
    if order.shape != (layer.K,) or order.min() < 0 or order.max() >= scales.shape[1]:
        raise layer.wrong(f"g_idx must be [{layer.K}] and below {scales.shape[1]}")
    at = order.long()
    levels = zeros.float()[:, at] if isinstance(zeros, Tensor) else zeros
    return (codes.float() - levels) * scales.float()[:, at]


def awq(folder: Path, said: Mapping[str, Any]) -> Reader:
    """Codes and zeros lie along N in words, of eight neighbours those with even numbers first."""
    bits, size = _bits(folder, said.get("bits")), int(said.get("group_size", -1))
    version = str(said.get("version", "gemm")).lower()
    if version != "gemm" or bits != 4:
        raise InputError(
            f"'{folder}': awq weights of version '{version}', {bits} bits, are not read; gemm of 4 bits is"
        )
    inverse = torch.tensor(AWQ_ORDER).argsort()

    def columns(words: Tensor) -> Tensor:
        codes = _from_words(words, bits)
        return codes.reshape(len(codes), -1, len(AWQ_ORDER))[..., inverse].flatten(1)

    def read(layer: Layer) -> Codes | Tensor | None:
        if layer.get("qweight") is None:
            return None
        N, K = layer.N, layer.K
        group = K if size < 0 else min(size, K)
        codes = columns(layer.need("qweight", K, N // 8)).T.contiguous()
        scales = layer.need("scales", -(-K // group), N).T
        zeros = None
        if said.get("zero_point", True) or layer.get("qzeros") is not None:
            zeros = columns(layer.need("qzeros", -(-K // group), N // 8)).T
        return _codes(layer, codes, scales, zeros, Format("int4"), group)

    return read


def compressed_tensors(folder: Path, said: Mapping[str, Any]) -> Reader:
    """Codes lie along K in words, or are bytes; they are signed, and so are zeros, which lie along N in words."""
    groups = [scheme for scheme in (said.get("config_groups") or {}).values() if isinstance(scheme, Mapping)]
    for name in ("kv_cache_scheme", "transform_config"):
        if said.get(name):
            raise InputError(f"'{folder}': compressed tensors with a {name} are not read")

    def read(layer: Layer) -> Codes | Tensor | None:
        packed, scales = layer.get("weight_packed"), layer.get("weight_scale")
        if packed is None and scales is None:
            return None
        scheme = next((one for one in groups if any(_is_target(t, layer.path) for t in one.get("targets", ()))), None)
        weights = (scheme or {}).get("weights")
        if scheme is None or not isinstance(weights, Mapping):
            raise layer.wrong("it has codes, and no scheme of config_groups is for it")
        kind, activations = _scheme(layer, scheme, weights)
        if scales is None:
            raise layer.wrong("weight_scale is missing")
        return _compressed(layer, weights, kind, activations, scales)

    return read


def _is_target(target: str, path: str) -> bool:
    """Whether a scheme's target means the linear at a path: its class, its name, or `re:` and what its name matches."""
    if target.startswith("re:"):
        return re.match(target[3:], path) is not None
    return target in ("Linear", path)


def _scheme(layer: Layer, scheme: Mapping[str, Any], weights: Mapping[str, Any]) -> tuple[str, str | None]:
    """The kind of a scheme's codes, and what its inputs are rounded to."""
    inputs = scheme.get("input_activations")
    bits, is_float = weights.get("num_bits"), weights.get("type", "int") == "float"
    kind = "fp8" if is_float and bits == 8 else f"int{bits}"
    if (is_float and bits != 8) or bits not in BITS or scheme.get("output_activations"):
        raise layer.wrong(f"{weights.get('type', 'int')} weights of {bits} bits, or rounded outputs, are not read")
    if weights.get("strategy") not in ("group", "channel", "tensor"):
        raise layer.wrong(f"weights with scales by {weights.get('strategy')} are not read")
    if not inputs:
        if is_float:
            raise layer.wrong("fp8 weights whose inputs are not rounded are not read")
        return kind, None
    by_token = inputs.get("dynamic") is True and inputs.get("strategy") == "token" and inputs.get("symmetric", True)
    same = inputs.get("num_bits") == 8 and (inputs.get("type", "int") == "float") == is_float and bits == 8
    whole = weights.get("strategy") in ("channel", "tensor") and weights.get("symmetric", True)
    if not (by_token and same and whole):
        raise layer.wrong("inputs are read that are rounded as their weights are, to eight bits, by a scale a token")
    return kind, "fp8" if is_float else "int8"


def _compressed(
    layer: Layer, weights: Mapping[str, Any], kind: str, activations: str | None, scales: Tensor
) -> Codes | Tensor:
    N, K = layer.N, layer.K
    format = Format(kind, None, activations=activations)
    bits, middle = format.bits, format.middle
    group = int(weights.get("group_size") or K) if weights.get("strategy") == "group" else K
    if layer.get("weight_packed") is not None:
        codes = _from_words(layer.need("weight_packed", N, -(-K * bits // 32)), bits)[:, :K].contiguous()
    else:
        held = layer.need("weight", N, K)
        if held.dtype is not (torch.float8_e4m3fn if kind == "fp8" else torch.int8):
            raise layer.wrong(f"codes of {kind} cannot be {held.dtype}")
        codes = held.view(torch.uint8) if kind == "fp8" else (held.to(torch.int16) + middle).to(torch.uint8)
    scales = scales.reshape(1, 1).expand(N, 1) if scales.numel() == 1 else scales.reshape(N, -1)
    zeros = layer.get("weight_zero_point")
    if zeros is not None and kind != "fp8":
        words = zeros.dtype is torch.int32 and zeros.shape[0] == -(-N * bits // 32)
        zeros = _from_words(zeros.T.contiguous(), bits)[:, :N].T if words else (zeros.to(torch.int16) + middle)
        zeros = zeros.reshape(-1, scales.shape[1]).expand(N, -1).to(torch.uint8)
    order = layer.get("weight_g_idx")
    if order is not None and order.min() >= 0 and not torch.equal(order.long(), torch.arange(K) // group):
        return _ungrouped(layer, codes, scales, float(middle) if zeros is None else zeros, order)
    return _codes(layer, codes, scales, None if kind == "fp8" else zeros, format, group)


METHODS: Mapping[str, Callable[[Path, Mapping[str, Any]], Reader]] = {
    "gptq": gptq,
    "awq": awq,
    "compressed-tensors": compressed_tensors,
}
