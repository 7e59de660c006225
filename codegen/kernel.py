"""Kernels as text: a module of Triton source with one kernel and its launch, composed line by line."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

from fuser.errors import UsageError

DTYPES = {"bf16": 2, "fp16": 2, "fp32": 4, "int8": 1, "fp8": 1}  # names of element types, with their bytes
FLOATS = ("bf16", "fp16", "fp32")  # Triton's names of those that kernels compute in
WIDTH = 120  # of a line of text
LONGEST_ROW = 65536  # what one program can hold: the widest row of a norm


@dataclass(frozen=True)
class Kernel:
    """One emitted kernel: `text` is a Python module with the functions `kernel` (Triton) and `launch` (host).

    `signature` gives each run-time parameter's type as Triton spells it ("*bf16", "i32"), in order; `constants` the
    compile-time ones, which are the defaults in the text; `options` num_warps and num_stages. `workspace` is the scratch that
    `launch` takes as its last two tensors, `partial` and `arrived`: elements of float32, of any content, and counters
    of int32, which are zero before a launch and after it. One workspace serves launches that follow one another.

    `launch(..., pdl=True)` lets the kernel start while the one before it in the stream still runs (programmatic dependent
    launch, compute capability 9.0): it loads weights at once and waits before it reads or writes anything else.
    """

    name: str
    text: str
    signature: Mapping[str, str]
    constants: Mapping[str, object]
    options: Mapping[str, int]
    workspace: tuple[int, int] = (0, 0)


@dataclass
class Emitter:
    """Collects what a kernel is made of. Every line is the emitter's own; numbers enter through `repr`."""

    name: str
    summary: str
    details: tuple[str, ...]
    options: Mapping[str, int]
    signature: dict[str, str] = field(default_factory=dict)
    constants: dict[str, object] = field(default_factory=dict)
    lines: list[str] = field(default_factory=list)
    parts: list[str] = field(default_factory=list)  # device functions before the kernel
    host: list[str] = field(default_factory=list)
    workspace: tuple[int, int] = (0, 0)
    _depth: int = 1

    def pointer(self, name: str, dtype: str) -> str:
        """A run-time parameter that points at elements of `dtype`."""
        self.signature[name] = f"*{dtype}"
        return name

    def integer(self, name: str) -> str:
        """A run-time parameter of 32 bits."""
        self.signature[name] = "i32"
        return name

    def constant(self, **values: object) -> None:
        """Compile-time parameters, in capitals."""
        self.constants.update(values)

    def part(self, text: str) -> None:
        """A device function, once."""
        if text not in self.parts:
            self.parts.append(text)

    def add(self, *lines: str) -> None:
        """Lines of the kernel's body, at the present depth; an empty one is a blank line."""
        self.lines += [("    " * self._depth + line) if line else "" for line in lines]

    def begin(self, *, waits: bool = False) -> None:
        """The start of a body: the next launch may start as well, as far as it can without this one's results."""
        self.constant(PDL=False)
        with self.block("if PDL:"):
            self.add("tl.extra.cuda.gdc_launch_dependents()", *["tl.extra.cuda.gdc_wait()"] * waits)

    def wait(self) -> None:
        """From here on the body may read what launches before it wrote, and write what they read."""
        with self.block("if PDL:"):
            self.add("tl.extra.cuda.gdc_wait()")

    @contextmanager
    def block(self, header: str) -> Iterator[None]:
        """`header` and, one level deeper, what is added within."""
        self.add(header)
        self._depth += 1
        yield
        self._depth -= 1

    def kernel(self) -> Kernel:
        """The finished text."""
        doc = [f'"""{self.summary}', "", *self.details, '"""']
        parameters = [f"    {name}," for name in self.signature]
        parameters += [f"    {name}: tl.constexpr = {value!r}," for name, value in self.constants.items()]
        own, torch = (
            [f"import {name}"] * any(f"{name}." in line for line in self.host) for name in ("ctypes", "torch")
        )
        out = [*doc, "", *own, *[""] * len(own), *torch, "import triton", "import triton.language as tl"]
        for part in self.parts:
            out += ["", "", *part.strip("\n").splitlines()]
        out += ["", "", "@triton.jit", "def kernel(", *parameters, "):", *self.lines]
        if "PDL" in self.constants:
            out += ["", "", 'OVERLAPPED = {"PDL": True, "launch_pdl": True}  # programmatic dependent launch']
        out += ["", "", *self.host, ""]
        text = "\n".join(line for whole in out for line in wrapped(whole))
        return Kernel(self.name, text, dict(self.signature), dict(self.constants), dict(self.options), self.workspace)

    def launched(self, grid: str, *arguments: str) -> str:
        """The host's line that starts the kernel."""
        options = "".join(f", {name}={value!r}" for name, value in self.options.items())
        overlap = ", **(OVERLAPPED if pdl else {})" if "PDL" in self.constants else ""
        return f"kernel[{grid}]({', '.join(arguments)}{options}{overlap})"


def wrapped(line: str) -> list[str]:
    """A line of the text, its last call's arguments on lines of their own where it is too long, as formatters do."""
    comment = line.lstrip().startswith(("#", '"""'))
    end = len(line) - 1 - line.endswith(":")
    if len(line) <= WIDTH or comment or line[end] != ")":
        return [line]
    depth, start = 0, end
    while True:
        depth += {")": 1, "]": 1, "(": -1, "[": -1}.get(line[start], 0)
        if not depth:
            break
        start -= 1
    indent = line[: len(line) - len(line.lstrip())]
    inner = line[start + 1 : end]
    if len(indent) + 4 + len(inner) <= WIDTH:
        return [line[: start + 1], f"{indent}    {inner}", f"{indent}{line[end:]}"]
    depth, arguments = 0, [""]
    for character in inner:
        depth += {"(": 1, "[": 1, ")": -1, "]": -1}.get(character, 0)
        if character == "," and not depth:
            arguments.append("")
        else:
            arguments[-1] += character
    return [line[: start + 1], *(f"{indent}    {argument.strip()}," for argument in arguments), f"{indent}{line[end:]}"]


def element(dtype: str) -> str:
    """`dtype`, if kernels take it.

    Raises:
        UsageError: they do not.
    """
    if dtype not in FLOATS:
        raise UsageError(f"codegen: kernels take elements of {', '.join(FLOATS)}, not {dtype}")
    return dtype


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << max(n - 1, 0).bit_length()


ACTIVATIONS = {
    "silu": '''
@triton.jit
def activation(x):
    """SiLU, in float32."""
    return x / (1.0 + tl.exp(-x))
''',
    "gelu": '''
@triton.jit
def activation(x):
    """GELU, in float32."""
    return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
''',
    "gelu_tanh": '''
@triton.jit
def activation(x):
    """GELU's tanh approximation, in float32: 0.5 (1 + tanh z) is sigmoid(2 z)."""
    z = 0.7978845608028654 * (x + 0.044715 * x * x * x)
    return x / (1.0 + tl.exp(-2.0 * z))
''',
}


def activated(emitter: Emitter, name: str) -> None:
    """Gives the kernel the device function `activation`.

    Raises:
        UsageError: there is none of that name.
    """
    if name not in ACTIVATIONS:
        raise UsageError(f"codegen: an activation is {', '.join(ACTIVATIONS)}, not {name}")
    emitter.part(ACTIVATIONS[name])
