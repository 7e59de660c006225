"""fuser.compile against the module it was given: models of transformers with and without a cache, generation, other modules."""

import copy
import pickle
import warnings
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import DynamicCache, StaticCache

import fuser
from fuser.errors import InputError
from tests import architectures
from tests.architectures import ARCHITECTURES, V
from tests.test_coverage import EXPECTED, LLAMA, MISSES, MORE

TOLERANCE = 2e-5  # relative, norm-wise, float32
DECODERS = [name for name, spec in ARCHITECTURES.items() if spec.causal] + ["mixtral"]
FUSED = EXPECTED | {"mixtral": {k: n for k, n in LLAMA.items() if k != "gate_up_linear"}}  # experts are no linears
# (B, S, P, padding on the left of the first sequence)
STEPS = {
    "decode": (1, 1, 9, 0),
    "padded": (2, 3, 5, 2),
    "prefill": (1, 7, 0, 0),
    "chunk": (1, 3, 5, 0),
    "batch": (3, 2, 4, 0),
}
CACHES: dict[str, Callable[[Any], Any]] = {
    "plain": lambda config: DynamicCache(),
    "configured": lambda config: DynamicCache(config=config),
}


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def error_of(got: Tensor, wanted: Tensor) -> float:
    assert got.dtype == wanted.dtype and got.shape == wanted.shape
    return float((got.double() - wanted.double()).norm() / wanted.double().norm().clamp(min=1e-30))


@cache
def pair(architecture: str, dtype: str = "float32", attn: str | None = None) -> tuple[Any, Any]:
    """A model, and what `fuser.compile` makes of it."""
    model = architectures.model(architecture, dtype=dtype, attn=attn)
    return model, fuser.compile(model)


def tokens(B: int, T: int, padding: int = 0) -> tuple[Tensor, Tensor]:
    ids = torch.randint(3, V, (B, T), generator=torch.Generator().manual_seed(10 * B + T))
    mask = torch.ones(B, T, dtype=torch.int64)
    ids[0, :padding], mask[0, :padding] = 0, 0
    return ids, mask


def step(model: Any, made: Any, B: int, S: int, P: int, padding: int, empty: Callable[[Any], Any]) -> tuple[Any, Any]:
    """What both make of S tokens after a past of P, which the model itself has seen; each with a cache of its own."""
    ids, mask = tokens(B, P + S, padding)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    found = []
    for one in (model, made):
        past = empty(model.config)
        if P:
            model(ids[:, :P], attention_mask=mask[:, :P], position_ids=positions[:, :P], past_key_values=past)
        given: dict[str, Any] = {"attention_mask": mask, "position_ids": positions[:, P:], "use_cache": True}
        out = one(ids[:, P:], past_key_values=past, **given)
        assert out.past_key_values is past
        found.append(out)
    return found[0], found[1]


@pytest.mark.parametrize("kind", CACHES)
@pytest.mark.parametrize("name", STEPS)
@pytest.mark.parametrize("architecture", DECODERS)
def test_steps_with_a_cache(architecture: str, name: str, kind: str) -> None:
    B, S, P, padding = STEPS[name]
    wanted, got = step(*pair(architecture), B, S, P, padding, CACHES[kind])
    assert type(got) is type(wanted)
    # A row of padding attends to nothing, and what it gives is read by nobody.
    seen = tokens(B, P + S, padding)[1][:, P:].bool()
    assert error_of(got.logits[seen], wanted.logits[seen]) <= TOLERANCE
    before, after = wanted.past_key_values, got.past_key_values
    assert after.get_seq_length() == before.get_seq_length() == P + S
    assert len(after.layers) == len(before.layers) == 2
    for mine, theirs in zip(after.layers, before.layers, strict=True):
        assert type(mine) is type(theirs)
        assert error_of(mine.keys, theirs.keys) <= TOLERANCE
        assert error_of(mine.values, theirs.values) <= TOLERANCE


@pytest.mark.parametrize("architecture", DECODERS)
def test_many_steps_in_one_cache(architecture: str) -> None:
    """Beyond a window, where layers drop what is no longer seen, and back in chunks."""
    model, made = pair(architecture)
    ids, _ = tokens(2, 21)
    caches = [DynamicCache(config=model.config) for _ in range(2)]
    for start, end in ((0, 4), (4, 5), (5, 12), (12, 13), (13, 14), (14, 21)):
        wanted = model(ids[:, start:end], past_key_values=caches[0])
        got = made(ids[:, start:end], past_key_values=caches[1])
        assert error_of(got.logits, wanted.logits) <= TOLERANCE
    for mine, theirs in zip(caches[1].layers, caches[0].layers, strict=True):
        assert error_of(mine.keys, theirs.keys) <= TOLERANCE


@pytest.mark.parametrize("architecture", [*DECODERS, "bert"])
def test_without_a_cache(architecture: str) -> None:
    model, made = pair(architecture)
    options = {"use_cache": False} if architecture != "bert" else {}
    for B, S, padding in ((1, 7, 0), (2, 6, 2), (1, 1, 0), (3, 9, 0)):
        ids, mask = tokens(B, S, padding)
        wanted, got = model(ids, attention_mask=mask, **options), made(ids, attention_mask=mask, **options)
        assert got.keys() == wanted.keys()
        for key in wanted:
            seen = mask.bool() if wanted[key].dim() == 3 else slice(None)
            assert error_of(got[key][seen], wanted[key][seen]) <= TOLERANCE
    ids, _ = tokens(2, 5)
    assert error_of(made(ids)[0], model(ids)[0]) <= TOLERANCE
    assert error_of(made(input_ids=ids, return_dict=False)[0], model(ids)[0]) <= TOLERANCE


@pytest.mark.parametrize("architecture", [*DECODERS, "bert"])
def test_fuses(architecture: str) -> None:
    report = pair(architecture)[1].report
    assert report.fused == FUSED[architecture]
    # The router of experts is a product and a softmax, as attention begins.
    assert [miss.fusion for miss in report.misses] == (["attention"] if architecture == "mixtral" else [])
    assert report.verification is not None and report.verification.cases


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "phi3"])
def test_eager_attention(architecture: str) -> None:
    model, made = pair(architecture, attn="eager")
    assert made.report.fused == FUSED[architecture]
    wanted, got = step(model, made, 2, 3, 5, 0, CACHES["configured"])
    assert error_of(got.logits, wanted.logits) <= TOLERANCE


@pytest.mark.parametrize("padding", [0, 3])
@pytest.mark.parametrize("architecture", DECODERS)
def test_generates_the_same_tokens(architecture: str, padding: int) -> None:
    model, made = pair(architecture)
    ids, mask = tokens(2, 7, padding)
    options = {"attention_mask": mask, "max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    assert torch.equal(made.generate(ids, **options), model.generate(ids, **options))
    assert not made._compilation.fallbacks


@pytest.mark.parametrize(
    "architecture",
    [
        *(name for name in MORE if name not in ("llama_dynamic", "llama_counting")),
        "gemma3",
        "smollm3",
        "opt",
        "bloom",
        "falcon",
    ],
)
def test_more_architectures(architecture: str) -> None:
    """Rotary embedding in all its forms, norms in other places, ALiBi: what is demanded of their exports to ONNX."""
    model, made = pair(architecture)
    assert set(made.report.fused) >= MORE.get(architecture, set())
    if architecture in MORE:
        assert [miss.fusion for miss in made.report.misses] == MISSES.get(architecture, [])
    wanted, got = step(model, made, *STEPS["chunk"], CACHES["configured"])
    assert error_of(got.logits, wanted.logits) <= TOLERANCE
    ids, mask = tokens(2, 7, 3)
    seen = mask.bool()
    assert (
        error_of(made(ids, attention_mask=mask).logits[seen], model(ids, attention_mask=mask).logits[seen]) <= TOLERANCE
    )
    options = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    assert torch.equal(made.generate(ids, **options), model.generate(ids, **options))
    assert not made._compilation.fallbacks


def test_frequencies_that_depend_on_the_longest_position() -> None:
    with pytest.raises(
        fuser.InputError, match=r"control flow depends on what a tensor holds .at .*modeling_rope_utils.py:\d+"
    ):
        fuser.compile(architectures.model("llama_dynamic"))


WAYS: dict[str, dict[str, Any]] = {
    "beams": {"num_beams": 3, "num_return_sequences": 2, "do_sample": False},
    "samples": {"do_sample": True, "top_k": 5},
    "penalty": {"repetition_penalty": 1.3, "do_sample": False},
    "no cache": {"use_cache": False, "do_sample": False},
    "lookup": {"prompt_lookup_num_tokens": 2, "do_sample": False},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("architecture", ["llama", "mistral"])
def test_generates_in_other_ways(architecture: str, way: str) -> None:
    model, made = pair(architecture)
    ids, mask = tokens(1 if way == "lookup" else 2, 7, 3)
    found = []
    for one in (model, made):
        torch.manual_seed(3)
        found.append(one.generate(ids, attention_mask=mask, max_new_tokens=8, eos_token_id=None, **WAYS[way]))
    assert torch.equal(*found)
    assert not made._compilation.fallbacks


def test_a_static_cache_runs_uncompiled() -> None:
    model, ids = architectures.model("mistral"), tokens(1, 5)[0]
    made = fuser.compile(model)
    with pytest.warns(UserWarning, match="cache is a StaticCache"):
        got = made(ids, past_key_values=StaticCache(config=model.config, max_cache_len=12))
    assert torch.equal(
        got.logits, model(ids, past_key_values=StaticCache(config=model.config, max_cache_len=12)).logits
    )
    options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "cache_implementation": "static"}
    assert torch.equal(made.generate(ids, **options), model.generate(ids, **options))


def test_calls_as_people_write_them() -> None:
    model, made = pair("llama")
    ids, mask = tokens(2, 6)
    assert error_of(made(ids).logits, model(ids).logits) <= TOLERANCE
    assert error_of(made(ids, mask).logits, model(ids, mask).logits) <= TOLERANCE
    flat = made(ids, return_dict=False)
    assert type(flat) is tuple and len(flat) == len(model(ids, return_dict=False))
    for kept in (1, 3, torch.tensor([0, 2])):
        wanted = model(ids, logits_to_keep=kept).logits
        assert error_of(made(ids, logits_to_keep=kept).logits, wanted) <= TOLERANCE
    assert made(ids, use_cache=False).past_key_values is None
    assert made(ids).past_key_values.get_seq_length() == 6
    assert error_of(made(ids, labels=None, mask_is_unknown=None).logits, model(ids).logits) <= TOLERANCE
    with pytest.raises(fuser.InputError, match="LlamaForCausalLM"):
        made(ids, *range(30))
    with pytest.raises(ValueError, match="input_ids"), pytest.warns(UserWarning, match="without input_ids"):
        made()


@pytest.mark.parametrize("name", ["labels", "inputs_embeds"])
def test_calls_that_are_not_compiled(name: str) -> None:
    model, made = pair("llama")
    ids, _ = tokens(2, 6)
    given = {
        "labels": {"input_ids": ids, "labels": ids},
        "inputs_embeds": {"inputs_embeds": model.model.embed_tokens(ids)},
    }
    with pytest.warns(UserWarning, match=name):
        got = made(**given[name])
    wanted = model(**given[name])
    assert got.keys() == wanted.keys()
    assert torch.equal(got.logits, wanted.logits)


def test_what_is_not_compiled_runs_uncompiled_with_one_warning() -> None:
    model = architectures.model("llama")
    made, ids = fuser.compile(model), tokens(1, 5)[0]
    with pytest.warns(UserWarning, match="output_hidden_states") as told:
        for _ in range(2):
            got, wanted = made(ids, output_hidden_states=True), model(ids, output_hidden_states=True)
    assert len([one for one in told if "fuser" in str(one.message)]) == 1
    assert len(got.hidden_states) == len(wanted.hidden_states) == 3
    assert all(torch.equal(a, b) for a, b in zip(got.hidden_states, wanted.hidden_states, strict=True))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "bert"])
def test_half_precision(architecture: str, dtype: str) -> None:
    """Not further from the float32 model than the model itself in that type, but for half as much."""
    model, made = pair(architecture, dtype)
    exact = copy.deepcopy(model).float()
    assert made.report.fused == FUSED[architecture]
    ids, mask = tokens(2, 7, 2)
    wanted, own, got = (one(ids, attention_mask=mask)[0][mask.bool()] for one in (exact, model, made))
    assert got.dtype is own.dtype
    assert error_of(got.float(), wanted) <= 1.5 * error_of(own.float(), wanted)


def test_converting_compiles_anew() -> None:
    model = architectures.model("gpt2")
    ids, _ = tokens(2, 5)
    made = fuser.compile(model)
    assert made.to(torch.float64) is made
    wanted = copy.deepcopy(model).to(torch.float64)(ids).logits
    got = made(ids).logits
    assert got.dtype is torch.float64
    assert error_of(got, wanted) <= 1e-12


def test_tied_weights_are_one() -> None:
    model, made = pair("gpt2")
    assert model.lm_head.weight is model.transformer.wte.weight
    leaves = [leaf for value in made.graph.constants() if value.constant for leaf in value.constant.leaves()]
    assert len({leaf for leaf in leaves if sorted(leaf.shape) == sorted(model.lm_head.weight.shape)}) == 1


def test_a_copy_is_compiled_for_itself() -> None:
    model = architectures.model("llama")
    ids, _ = tokens(2, 5)
    made = fuser.compile(model)
    twin = copy.deepcopy(made)
    twin.lm_head.weight.mul_(2)
    wanted = model(ids).logits
    assert error_of(made(ids).logits, wanted) <= TOLERANCE
    assert error_of(twin(ids).logits, 2 * wanted) <= TOLERANCE
    with pytest.raises(fuser.UsageError, match="state_dict"):
        pickle.dumps(made)


def test_loaded_weights_are_seen() -> None:
    model = architectures.model("llama")
    ids, _ = tokens(2, 5)
    made, before = fuser.compile(model), model(ids).logits
    made.load_state_dict({k: 0.9 * v for k, v in model.state_dict().items()})
    assert error_of(model(ids).logits, before) > 0.01
    assert error_of(made(ids).logits, model(ids).logits) <= TOLERANCE


def test_weights_that_are_written_to() -> None:
    """Those that are packed with others, and those that are used as they are."""
    model = architectures.model("qwen2")
    ids, _ = tokens(2, 5)
    made = fuser.compile(model)
    attention = model.model.layers[0].self_attn
    for weight in (attention.q_proj.weight, attention.o_proj.weight):
        weight.mul_(2)
    assert error_of(made(ids).logits, model(ids).logits) <= TOLERANCE
    linked = made._compilation.made
    made(ids)
    assert made._compilation.made is linked, "compiled once"


def test_it_is_the_model_it_was() -> None:
    model, made = pair("llama")
    assert isinstance(made, type(model)) and not made.training
    assert made.config is model.config
    assert [name for name, _ in made.named_parameters()] == [name for name, _ in model.named_parameters()]
    assert all(a is b for a, b in zip(made.parameters(), model.parameters(), strict=True))
    with pytest.raises(fuser.UsageError, match="inference"):
        made.train()
    assert "rms_norm" in made.explain()


def test_without_weights() -> None:
    """On the meta device a model is fused all the same, to be read; calling it is one error."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model("llama", num_hidden_layers=2, vocab_size=100)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    compiled = fuser.compile(model)
    assert {"rotary_cache_write": 2, "attention": 2, "qkv_linear": 2}.items() <= compiled.report.fused.items()
    assert "no elements" in compiled.report.verification.skipped
    with pytest.raises(InputError, match="without its weights"):
        compiled(torch.zeros(1, 3, dtype=torch.int64, device="meta"))


def test_an_exported_program() -> None:
    """Its sizes are as dynamic as it says, and nothing is exported again."""

    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.linear = torch.nn.RMSNorm(8, eps=1e-6), torch.nn.Linear(8, 5)

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"y": self.linear(self.norm(x))}

    net = Net().eval()
    program = torch.export.export(net, (torch.randn(3, 8),), dynamic_shapes=({0: torch.export.Dim("rows")},))
    compiled = fuser.compile(program)
    assert compiled.report.fused == {"rms_norm": 1} and "export" not in compiled.report.stages_s
    x = torch.randn(7, 8)
    torch.testing.assert_close(compiled(x), net(x))
    with pytest.raises(InputError, match=r"cannot be captured on float32\[7, 9\]"):
        compiled(torch.randn(7, 9))
    with torch.no_grad():
        net.linear.weight.mul_(2)  # what was compiled of it is made anew
    torch.testing.assert_close(compiled(x), net(x))


SMALL = {"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2, "intermediate_size": 112}
TEXT = SMALL | {"vocab_size": V, "max_position_embeddings": 80, "pad_token_id": 0}
GPT2 = {"n_embd": 64, "n_head": 4, "n_layer": 2, "vocab_size": V}
T5 = {"vocab_size": V, "d_model": 64, "d_kv": 16, "d_ff": 112, "num_layers": 2, "num_heads": 4}
OTHERS: dict[str, tuple[str, dict[str, Any]]] = {  # by class: a model type and its config
    "LlamaModel": ("llama", TEXT),
    "LlamaForSequenceClassification": ("llama", TEXT),
    "GPT2Model": ("gpt2", GPT2),
    "RobertaModel": ("roberta", TEXT),
    "BertForMaskedLM": ("bert", TEXT),
    "BertForQuestionAnswering": ("bert", TEXT),
    "DistilBertForSequenceClassification": ("distilbert", {"vocab_size": V, "dim": 64, "n_heads": 4, "n_layers": 2}),
    "T5EncoderModel": ("t5", T5),  # its table of biases is read at buckets of distances, a square of the tokens
    "ModernBertModel": ("modernbert", TEXT | {"global_attn_every_n_layers": 2, "local_attention": 6}),
    "ViTModel": ("vit", SMALL | {"image_size": 32, "patch_size": 8}),
}


@cache
def other(name: str) -> Any:
    kind, config = OTHERS[name]
    model = getattr(transformers, name)(transformers.AutoConfig.for_model(kind, **config)).eval()
    architectures.draw_weights(model)
    return model


@pytest.mark.parametrize("name", OTHERS)
def test_other_models(name: str) -> None:
    model = other(name)
    made = fuser.compile(model)
    if name == "ViTModel":
        given = {"pixel_values": torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))}
    else:
        given = {"input_ids": tokens(2, 7)[0], "attention_mask": tokens(2, 7)[1]}
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        for kept in ({*given}, {"input_ids", "pixel_values"}):
            chosen = {key: value for key, value in given.items() if key in kept}
            wanted, got = model(**chosen), made(**chosen)
            assert got.keys() == wanted.keys()
            for key in wanted:
                if isinstance(wanted[key], Tensor):
                    assert error_of(got[key], wanted[key]) <= TOLERANCE
    assert made.report.fused


def test_token_types_that_are_not_neutral() -> None:
    """GPT-2 adds the embedding of a token to that of its type: no types are other than types of zero."""
    model, ids = other("GPT2Model"), tokens(2, 7)[0]
    with pytest.warns(UserWarning, match="token_type_ids"):
        got = fuser.compile(model)(ids, token_type_ids=torch.zeros_like(ids))
    assert error_of(got[0], model(ids, token_type_ids=torch.zeros_like(ids))[0]) == 0
    assert error_of(got[0], model(ids)[0]) > 0.1


@pytest.mark.parametrize(
    ("name", "kind", "config", "error", "match"),
    [
        ("T5ForConditionalGeneration", "t5", T5, fuser.UnsupportedOperator, "encoders with a decoder"),
        ("MambaForCausalLM", "mamba", {"hidden_size": 64, "num_hidden_layers": 2, "vocab_size": V, "state_size": 8},
         fuser.UnsupportedOperator, "fixes how many tokens"),
    ],
)  # fmt: skip
def test_models_that_are_not_compiled(name: str, kind: str, config: dict[str, Any], error: Any, match: str) -> None:
    with pytest.raises(error, match=f"{name}.*{match}"):
        fuser.compile(getattr(transformers, name)(transformers.AutoConfig.for_model(kind, **config)))
