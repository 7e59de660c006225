"""What every kernel's test shares: the text around a family's inputs and its definition."""

from dataclasses import dataclass

from fuser.codegen.kernel import Kernel, wrapped

TORCH = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
TOLERANCE = {"bf16": 1.2e-2, "fp16": 1.5e-3, "fp32": 1e-5}  # relative, by norm
ACTIVATIONS = {
    "silu": "functional.silu({})",
    "gelu": "functional.gelu({})",
    "gelu_tanh": 'functional.gelu({}, approximate="tanh")',
}

TEXT = '''
"""{name}.py against what it computes, written out in float64.

Run it by itself or by pytest. Without a GPU, Triton's interpreter runs the kernel, in float32, whose products it has.
"""

import os

import torch
{functional}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"  # before the kernel is imported

from {name} import launch  # noqa: E402

DTYPE, TOLERANCE = (torch.{dtype}, {tolerance!r}) if DEVICE == "cuda" else (torch.float32, 1e-05)
{constants}


def drawn(*shape, scale=1.0):
    return (torch.randn(shape, device=DEVICE) * scale).to(DTYPE)


def unwritten(*shape):
    return torch.full(shape, float("nan"), dtype=DTYPE, device=DEVICE)


def close(name, found, expected):
    """Equal up to rounding; what is not to be written is still NaN."""
    kept = ~expected.isnan()
    assert torch.equal(kept, ~found.isnan()), f"{{name}} is not written where it should be, or elsewhere"
    off = (found.double() - expected)[kept].norm() / expected[kept].norm().clamp(min=1e-30)
    assert off < TOLERANCE, f"{{name}}: relative error {{off:.1e}}"


{functions}


def test_{name}():
    for case in CASES:
        torch.manual_seed(0)
        tensors = inputs(case)
        expected = definition(**tensors)
{launch}
        for name, values in expected.items():
            close(name, tensors[name], values)


if __name__ == "__main__":
    test_{name}()
'''

INTEGERS = """
def integers(values):
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


"""
LAUNCH = "        launch(*tensors.values())"
LAUNCH_ON_WORKSPACE = """
        partial = torch.full([{floats}], float("nan"), device=DEVICE)
        arrived = torch.zeros([{counters}], dtype=torch.int32, device=DEVICE)
        for _ in range(2):  # a launch leaves the counters as it found them
            launch(*tensors.values(), partial, arrived)
            assert not arrived.any()
""".strip("\n")


@dataclass(frozen=True)
class Parts:
    """What a family says of its test.

    `functions` define inputs(case), the tensors of `launch` in order by name, and definition(**tensors), what they hold
    afterwards. `cases` are literals; the kernel's workspace is for one of `sequences`.
    """

    cases: str
    functions: str
    constants: tuple[str, ...] = ()
    sequences: int = 1


def written(name: str, kernel: Kernel, dtype: str, parts: Parts) -> str:
    """The text of the test of the kernel in the module `name`."""
    floats, counters = (size * parts.sequences for size in kernel.workspace)
    launch = LAUNCH_ON_WORKSPACE.format(floats=floats, counters=counters) if floats else LAUNCH
    functional = "from torch.nn import functional\n" if "functional." in parts.functions else ""
    text = TEXT.format(
        name=name,
        functional=functional,
        dtype=TORCH[dtype],
        tolerance=TOLERANCE[dtype],
        constants="\n".join([*parts.constants, f"CASES = {parts.cases}"]),
        functions=parts.functions.strip("\n"),
        launch=launch,
    )
    return "\n".join(line for whole in text.strip("\n").splitlines() for line in wrapped(whole)) + "\n"


def listed(entries: dict[str, str]) -> str:
    """The lines of a dict that is returned, an entry a line."""
    return "\n".join(["    return {", *(f'        "{name}": {value},' for name, value in entries.items()), "    }"])
