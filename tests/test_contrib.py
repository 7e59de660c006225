"""ONNX Runtime's own operators as the table computes them, against ONNX Runtime on the CPU, on odd shapes."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import helper

from fuser import operators
from fuser.errors import UnsupportedOperator
from fuser.tensors import to_array, to_tensor
from tests import models

MICROSOFT = "com.microsoft"
TOLERANCE = 2e-6  # relative, norm-wise, float32
B, S, H, G, D = 2, 3, 6, 2, 8


def drawn(*shape: int, seed: int = 0) -> NDArray[Any]:
    return models.random(*shape, seed=seed)


def both(
    op: str, inputs: Sequence[NDArray[Any] | None], outputs: int = 1, **attributes: Any
) -> list[tuple[NDArray[Any], NDArray[Any]]]:
    """(ours, ONNX Runtime's) of each output."""
    names = ["" if array is None else f"i{n}" for n, array in enumerate(inputs)]
    results = [f"o{n}" for n in range(outputs)]
    node = helper.make_node(op, names, results, domain=MICROSOFT, **attributes)
    infos = [
        helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(array.dtype), array.shape)
        for name, array in zip(names, inputs, strict=True)
        if array is not None
    ]
    made = [onnx.ValueInfoProto(name=name) for name in results]
    imports = [helper.make_opsetid("", 21), helper.make_opsetid(MICROSOFT, 1)]
    model = helper.make_model(helper.make_graph([node], "g", infos, made), opset_imports=imports, ir_version=10)
    feeds = {name: array for name, array in zip(names, inputs, strict=True) if array is not None}
    expected = models.run(model, feeds)
    tensors = [None if array is None else to_tensor(array) for array in inputs]
    found = operators.evaluate(op, MICROSOFT, attributes, tensors, outputs=outputs)
    return [(to_array(ours), theirs) for ours, theirs in zip(found, expected, strict=True) if ours is not None]


def agree(ours: NDArray[Any], theirs: NDArray[Any]) -> None:
    assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
    assert np.isfinite(theirs.astype(np.float64)).all()
    assert np.linalg.norm((ours - theirs).astype(np.float64)) <= TOLERANCE * np.linalg.norm(theirs.astype(np.float64))


def tables(positions: int = 32, width: int = D) -> tuple[NDArray[Any], NDArray[Any]]:
    angles = np.arange(positions)[:, None] * 10000.0 ** (-np.arange(width // 2) / (width // 2))
    return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)


@pytest.mark.parametrize("interleaved", [0, 1])
@pytest.mark.parametrize("form", ["tokens", "heads", "offset", "partial"])
def test_rotary_embedding(form: str, interleaved: int) -> None:
    width = 4 if form == "partial" else D
    x = drawn(B, H, S, D) if form == "heads" else drawn(B, S, H * D)
    positions = np.array([5]) if form == "offset" else np.array([[0, 4, 2], [7, 1, 31]])
    more = {"num_heads": H, "rotary_embedding_dim": width} if form == "partial" else {}
    for ours, theirs in both("RotaryEmbedding", [x, positions, *tables(width=width)], interleaved=interleaved, **more):
        agree(ours, theirs)


@pytest.mark.parametrize("buffer", [False, True])
@pytest.mark.parametrize("rotary", [0, 1])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("form", ["prompt", "token", "chunk", "window", "softcap", "bias", "scale"])
def test_group_query_attention(form: str, packed: bool, rotary: int, buffer: bool) -> None:
    # ONNX Runtime takes heads of a multiple of 16, and several new tokens on a past for one sequence alone.
    D, B = 16, 1 if form in ("chunk", "softcap", "bias") else 2
    new = 1 if form in ("token", "window", "scale") else S
    past = 0 if form == "prompt" else 5
    total = past + new
    room = total + 4 if buffer else past
    q, k, v = drawn(B, new, H * D), drawn(B, new, G * D, seed=1), drawn(B, new, G * D, seed=2)
    ragged = form == "token"  # the first sequence is two tokens shorter
    lengths = np.array([total - 3 if ragged else total - 1, total - 1][-B:], np.int32)
    states = [drawn(B, G, room, D, seed=3), drawn(B, G, room, D, seed=4)]
    if form == "prompt" and not buffer:
        states = [np.zeros((B, G, 0, D), np.float32)] * 2
    inputs: list[Any] = [np.concatenate([q, k, v], -1), None, None] if packed else [q, k, v]
    inputs += [*states, lengths, np.array(total, np.int32)]
    inputs += list(tables(width=D)) if rotary else [None, None]
    options: dict[str, Any] = {"num_heads": H, "kv_num_heads": G, "do_rotary": rotary}
    if form == "window":
        options["local_window_size"] = 3
    elif form == "softcap":
        options["softcap"] = 2.0
    elif form == "scale":
        options["scale"] = 0.2
    elif form == "bias":
        inputs += [None, drawn(1, H, new, total, seed=7)]
    while inputs[-1] is None:
        inputs.pop()
    for index, (ours, theirs) in enumerate(both("GroupQueryAttention", inputs, 3, **options)):
        if index:  # what lies behind a sequence's last token is not defined
            for b in range(B):
                agree(ours[b, :, : lengths[b] + 1], theirs[b, :, : lengths[b] + 1])
            assert ours.shape == theirs.shape
        else:
            agree(ours, theirs)


@pytest.mark.parametrize(
    "form", ["plain", "bias", "lengths", "mask", "attention_bias", "past", "causal", "cross", "packed"]
)
def test_multi_head_attention(form: str) -> None:
    T = 5 if form in ("cross", "mask", "lengths") else S
    q, k, v = drawn(B, S, H * D), drawn(B, T, H * D, seed=1), drawn(B, T, H * D, seed=2)
    inputs: list[Any] = [q, k, v] + [None] * 5
    options: dict[str, Any] = {"num_heads": H}
    outputs = 1
    if form == "bias":
        inputs[3] = drawn(3 * H * D, seed=3)
    elif form == "lengths":
        inputs[4] = np.array([3, 5], np.int32)
    elif form == "mask":
        inputs[4] = np.array([[0, 1, 1, 1, 0], [1, 1, 1, 1, 1]], np.int32)
    elif form == "attention_bias":
        inputs[5] = drawn(1, H, S, S, seed=4)
    elif form == "past":
        inputs[6], inputs[7], outputs = drawn(B, H, 4, D, seed=5), drawn(B, H, 4, D, seed=6), 3
    elif form == "causal":
        options |= {"unidirectional": 1, "scale": 0.5}
    elif form == "by_head":
        inputs[1:3] = [x.reshape(B, T, H, D).swapaxes(1, 2).copy() for x in (k, v)]
    while inputs[-1] is None:
        inputs.pop()
    for ours, theirs in both("MultiHeadAttention", inputs, outputs, **options):
        agree(ours, theirs)


@pytest.mark.parametrize("form", ["plain", "lengths", "mask", "rows", "past", "causal", "sizes"])
def test_attention(form: str) -> None:
    width = H * D
    x, bias = drawn(B, S, 20), drawn(3 * width, seed=2)
    weights = drawn(20, 3 * width, seed=1) / 4
    mask: Any = None
    past: Any = None
    options: dict[str, Any] = {"num_heads": H}
    if form == "lengths":
        mask = np.array([2, 3], np.int32)
    elif form == "mask":
        mask = np.array([[0, 1, 1], [1, 1, 1]], np.int32)
    elif form == "rows":
        mask = np.tril(np.ones((B, S, S), np.int32))
    elif form == "past":
        past, options["unidirectional"] = drawn(2, B, H, 4, D, seed=3), 1
    elif form == "causal":
        options |= {"unidirectional": 1, "scale": 0.3}
    elif form == "sizes":
        options["qkv_hidden_sizes"] = [width, width, H * 4]
        weights, bias = weights[:, : 2 * width + H * 4], bias[: 2 * width + H * 4]
    inputs = [x, weights, bias, mask, past]
    while inputs[-1] is None:
        inputs.pop()
    for ours, theirs in both("Attention", inputs, 2 if form == "past" else 1, **options):
        agree(ours, theirs)


@pytest.mark.parametrize(
    ("bits", "K", "zero"),
    [
        (b, k, z)
        for b, k in ((4, 64), (4, 48), (8, 64))
        for z in ("absent", "packed", "floating")
        if (b, z) != (8, "floating")
    ],
)  # floating zero points of 8 bits are no form of ONNX Runtime's on the CPU
def test_matmul_n_bits(bits: int, K: int, zero: str) -> None:
    N, block = 7, 32
    blocks = -(-K // block)
    random = np.random.default_rng(0)
    weight = random.integers(0, 256, (N, blocks, block * bits // 8), dtype=np.uint8)
    scales = random.uniform(0.01, 0.1, N * blocks).astype(np.float32)
    zeros: Any = None
    if zero == "packed":
        zeros = random.integers(0, 256, N * -(-blocks * bits // 8), dtype=np.uint8)
    elif zero == "floating":
        zeros = random.uniform(0, 15, N * blocks).astype(np.float32)
    inputs = [drawn(2, 3, K), weight, scales, *([] if zeros is None else [zeros])]
    for ours, theirs in both("MatMulNBits", inputs, K=K, N=N, bits=bits, block_size=block):
        agree(ours, theirs)


@pytest.mark.parametrize("segments", [False, True])
@pytest.mark.parametrize("mask", [False, True])
def test_embed_layer_normalization(mask: bool, segments: bool) -> None:
    ids = np.array([[1, 5, 9], [0, 2, 2]], np.int32)
    inputs: list[Any] = [
        ids, ids % 2 if segments else None, drawn(10, 12), drawn(6, 12, seed=1),
        drawn(2, 12, seed=2) if segments else None, drawn(12, seed=3), drawn(12, seed=4),
        *([np.array([[1, 1, 0], [1, 1, 1]], np.int32)] if mask else []),
    ]  # fmt: skip
    for ours, theirs in both("EmbedLayerNormalization", inputs, 3, epsilon=1e-5):
        assert ours.dtype == theirs.dtype
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("op", "inputs", "attributes"),
    [
        ("GroupQueryAttention", [drawn(1, 1, 16)] * 3, {"num_heads": 2, "kv_num_heads": 2, "smooth_softmax": 1}),
        ("MultiHeadAttention", [drawn(1, 2, 2, 3, 4)], {"num_heads": 2}),
        ("Attention", [drawn(1, 2, 4), drawn(4, 12), drawn(12)], {"num_heads": 2, "do_rotary": 1}),
        ("MatMulNBits", [drawn(1, 32)] * 3, {"K": 32, "N": 1, "bits": 3, "block_size": 32}),
        ("BiasSplitGelu", [drawn(1, 2, 8), drawn(8)], {}),
    ],
)
def test_what_is_outside_is_named(op: str, inputs: list[NDArray[Any]], attributes: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedOperator, match=rf"com\.microsoft\.{op}: "):
        operators.evaluate(op, MICROSOFT, attributes, [to_tensor(array) for array in inputs])
