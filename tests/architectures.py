"""The transformers models that the zoo exports: tiny, with the same random weights everywhere, as functions of tensors.

To add a model, add an entry to `ARCHITECTURES` (those whose fusion is demanded) or to `MORE`.
"""

import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import numpy as np
import torch

Dims: TypeAlias = tuple[int | str, ...]  # sizes, and the names of dynamic dims
Implementation: TypeAlias = Literal["sdpa", "eager"]

# Dims are told apart by their size: no two of these are equal, and F is no multiple of D.
D, H, G, DH, F, V, MAX_POSITIONS = 64, 4, 2, 16, 112, 96, 80
WINDOW = 6  # tokens that a layer with a sliding window sees, itself among them


@dataclass(frozen=True)
class Architecture:
    """One transformers model type at a tiny size.

    Attributes:
        model_type: its name in `transformers.AutoConfig`.
        config: what its config says besides, or instead of, the sizes that all of them share.
        attn: the attention implementation that it is exported with; some have no sdpa.
        causal: a decoder with past and present; otherwise an encoder that gives its last hidden state.
        positions: whether position_ids are an input; otherwise the model counts by itself.
    """

    model_type: str
    config: Mapping[str, Any] = field(default_factory=dict)
    attn: Implementation = "sdpa"
    causal: bool = True
    positions: bool = True


SIZES = {
    "hidden_size": D,
    "num_attention_heads": H,
    "vocab_size": V,
    "max_position_embeddings": MAX_POSITIONS,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
WIDE = {"intermediate_size": F}
SHARED = WIDE | {"num_key_value_heads": G}
GROUPED = SHARED | {"rms_norm_eps": 1e-5}
ALTERNATING = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]}

ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture("llama", GROUPED),
    "qwen2": Architecture("qwen2", GROUPED),  # biases on q, k and v
    "gpt2": Architecture("gpt2", {"n_inner": F}),  # packed QKV, learned positions, tied head
    "mistral": Architecture("mistral", GROUPED | {"sliding_window": WINDOW}),
    "qwen3": Architecture("qwen3", GROUPED | {"head_dim": DH}),  # norms over the head dim of q and k
    "phi3": Architecture("phi3", GROUPED | {"sliding_window": None}),  # packed QKV, packed gate and up
    # (1 + weight) norms before and after, soft-capped scores and logits (scores with eager only); alternating windows
    "gemma2": Architecture(
        "gemma2", GROUPED | {"head_dim": DH, "query_pre_attn_scalar": DH, "sliding_window": WINDOW}, attn="eager"
    ),
    "bert": Architecture("bert", WIDE, causal=False),
}


def _rope(kind: str, **parameters: Any) -> dict[str, Any]:
    return GROUPED | {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0} | parameters}


# What else there is, for tests of one thing each; what of it is fused is not demanded as a whole.
MORE: dict[str, Architecture] = {
    # Rotary over neighbours rather than halves. gptj gathers sine and cosine from a table, over 8 dims of 16.
    "gptj": Architecture("gptj", {"n_inner": F, "rotary_dim": 8}, attn="eager"),
    "cohere": Architecture("cohere", SHARED),  # norms without bias, attention and MLP in parallel
    "glm": Architecture("glm", GROUPED | {"head_dim": DH}),  # over half of the dims
    # Rotary over a part of the dims
    "gpt_neox": Architecture("gpt_neox", WIDE),
    "phi": Architecture("phi", SHARED),
    "stablelm": Architecture("stablelm", SHARED),
    # Frequencies scaled. A trace of dynamic keeps the frequencies of short sequences; longrope chooses in the graph.
    "llama_linear": Architecture("llama", _rope("linear", factor=4.0)),
    "llama_dynamic": Architecture("llama", _rope("dynamic", factor=4.0)),
    "llama_llama3": Architecture(
        "llama",
        _rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=40),
    ),
    "llama_yarn": Architecture("llama", _rope("yarn", factor=4.0, original_max_position_embeddings=20)),
    "llama_longrope": Architecture(
        "llama",
        _rope(
            "longrope",
            factor=4.0,
            original_max_position_embeddings=7,
            short_factor=[1 + i / 10 for i in range(DH // 2)],
            long_factor=[2 + i / 3 for i in range(DH // 2)],
        ),
    ),
    # Positions that the graph counts: from the length of the past, and (a table after it) from the mask
    "llama_counting": Architecture("llama", GROUPED, positions=False),
    "opt": Architecture("opt", {"ffn_dim": F, "word_embed_proj_dim": D}, positions=False),
    # Norms, head sizes and factors
    "olmo2": Architecture("olmo2", GROUPED),  # norms after, and over the whole width of q and k
    "starcoder2": Architecture("starcoder2", SHARED),
    "gemma": Architecture("gemma", GROUPED | {"num_key_value_heads": 1, "head_dim": 24}),  # not D / H
    "gemma3": Architecture("gemma3_text", GROUPED | ALTERNATING | {"head_dim": DH, "query_pre_attn_scalar": DH}),
    "granite": Architecture(
        "granite",
        GROUPED
        | {"attention_multiplier": 0.2, "residual_multiplier": 0.5, "embedding_multiplier": 3.0, "logits_scaling": 2.0},
    ),
    "smollm3": Architecture("smollm3", GROUPED | {"no_rope_layers": [1, 0]}),
    # Experts, of which a router chooses two for each token
    "mixtral": Architecture("mixtral", GROUPED | {"num_local_experts": 5, "num_experts_per_tok": 2}),
    # ALiBi, and one key head for all in a packed QKV
    "bloom": Architecture("bloom", attn="eager", positions=False),
    "falcon": Architecture("falcon", {"ffn_hidden_size": F}),
    "falcon_alibi": Architecture("falcon", {"ffn_hidden_size": F, "alibi": True}),
}


def spec_of(architecture: str) -> Architecture:
    """The entry of that name, in whichever table.

    Raises:
        KeyError: there is none.
    """
    return ARCHITECTURES[architecture] if architecture in ARCHITECTURES else MORE[architecture]


def model(architecture: str, *, dtype: str = "float32", layers: int = 2, attn: str | None = None) -> torch.nn.Module:
    """The transformers model itself, in eval mode on the CPU, the same weights in every process and version.

    Weights are drawn anew, because a fresh model has norm weights of one and biases of zero, which hide a rewrite that
    drops or swaps them.
    """
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

    spec = spec_of(architecture)
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
    *present[B, G, T, Dh])`, past and present being key, value, key, value ... by layer; where the model counts positions
    by itself there are no position_ids.
    """

    def __init__(self, made: torch.nn.Module, *, positions: bool = True) -> None:
        super().__init__()
        self.model = made
        self.eval()  # or the exporters, which put the mode back that they found, would leave dropout on
        self.positions = positions
        states = [f"{layer}.{state}" for layer in range(made.config.num_hidden_layers) for state in ("key", "value")]
        shapes = dict(zip(states, self._states(), strict=True))
        tokens = ("batch", "sequence")
        self.inputs: dict[str, Dims] = {
            "input_ids": tokens,
            "attention_mask": ("batch", "total"),
            **({"position_ids": tokens} if positions else {}),
            **{f"past_key_values.{state}": ("batch", heads, "past", width) for state, (heads, width) in shapes.items()},
        }
        self.outputs: dict[str, Dims] = {
            "logits": (*tokens, made.config.vocab_size),
            **{f"present.{state}": ("batch", heads, "total", width) for state, (heads, width) in shapes.items()},
        }

    @torch.no_grad()
    def _states(self) -> list[tuple[int, int]]:
        """Heads and head dim of every key and value, as a run over one token shows them: configs name them variously."""
        cache = self.model(input_ids=torch.zeros(1, 1, dtype=torch.int64), use_cache=True).past_key_values
        return [(state.shape[1], state.shape[3]) for layer in cache.layers for state in (layer.keys, layer.values)]

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, *others: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        from transformers import DynamicCache

        past = others[1:] if self.positions else others
        # Without a config: a sliding-window layer too then keeps all it has seen, and the mask alone says what it sees.
        cache = DynamicCache(list(zip(past[::2], past[1::2], strict=True)))
        out = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            past_key_values=cache,
            use_cache=True,
            **({"position_ids": others[0]} if self.positions else {}),
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
    """`model` as the function of tensors that `zoo.exported` exports; `.inputs` and `.outputs` name and shape them."""
    made, spec = model(architecture, dtype=dtype, layers=layers, attn=attn), spec_of(architecture)
    return Decoder(made, positions=spec.positions) if spec.causal else Encoder(made)
