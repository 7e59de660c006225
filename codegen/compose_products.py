"""Products of a program: of numbers, of codes and of eight bits, each with what its kernel takes in."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from fuser.codegen.arrangement import arrangement
from fuser.codegen.compose_linear import Product, folds, product_of, quantized_of, rounded_of, scale_dtype
from fuser.codegen.compose_places import Places, is_selected, refused, vector
from fuser.codegen.linear import Linear
from fuser.codegen.matmul import Matmul, default_tiles, matmul
from fuser.codegen.plan import NORMS, Launch
from fuser.codegen.program import Argument, Part, Rows, Scratch, Step, Weight
from fuser.codegen.quantized import Dequantize, dequantize
from fuser.codegen.rounding import Rounding, rounding
from fuser.codegen.tuning import Problem
from fuser.constants import Constant
from fuser.formats import Format
from fuser.graph import FUSER, Node

CODES: dict[str, Any] = {"weight": "codes", "scales": "scales", "zeros": "zeros"}


class Products(Places):
    """The steps of products; what follows one and is not part of its kernel is given back."""

    def is_product(self, launch: Launch) -> bool:
        """Whether whole rows meet one matrix, and not the parts of a row, or each its own."""
        main = next(node for role, node in launch.parts if role == "main")
        x, weight = arrangement(main.inputs[0], self.tokens), main.inputs[1]
        shape = weight.shape if weight is not None else None
        return x is not None and shape is not None and len(shape) == 2 and x.row == shape[:1]

    def product(self, launch: Launch) -> list[Node]:
        """The steps of a product; what its kernel does not take in is given back."""
        found = product_of(launch, self.tokens, few=self.few, writes=self.writes)
        node, before = found.main, found.norm
        if self.codes and (format := quantized_of(found.weight)) is not None:
            return self._of_codes(launch, found, format)
        if node.inputs[0] in self.rounded and (format := rounded_of(found.weight)) is not None:
            return self._of_eight_bits(launch, format)
        folded = before is not None and folds(before, found.weight, self.tables)
        scale, shift = (constant(before, i) if folded else None for i in (1, 2))
        weight = Weight("linear", found.weight, scale)
        bias = self._bias(found, weight, shift)
        kind = None
        if before is None:
            x = self.whole(node.inputs[0], node)
        elif folded and self.few:
            x, kind = self.whole(before.inputs[0], before), "rms" if before.op == "rms_norm" else "layer"
        else:
            x = self.norm(before, scaled=not folded)
            x = self.selection(x, node) if node in self.tail else x
        tensors: dict[str, Argument] = {"x": x, "weight": weight}
        if kind == "layer":
            tensors["column_sums"] = Weight("column_sums", found.weight, scale)
        if bias is not None:
            tensors["bias"] = bias
        if found.residual is not None:
            tensors["residual"] = self.whole(found.residual, node)
        if self.few:
            self._small(found, tensors, kind, before)
        else:
            tensors["y"] = self._results(found)
            what = tuple(name for name in ("x", "weight", "bias", "residual", "y") if name in tensors)
            self.made.steps.append(Step("product", [tensors[name] for name in what], launch.origin, what=what))
        return found.left

    def _of_codes(self, launch: Launch, found: Product, format: Format) -> list[Node]:
        """A product with codes: of few tokens in one launch, of many a product of torch with the weight made just before."""
        node, before = found.main, found.norm
        if before is None:
            x = self.whole(node.inputs[0], node)
        else:
            x = self.norm(before, scaled=True)
            x = self.selection(x, node) if node in self.tail else x
        # Codes are in the order of the kernel of few tokens, whoever reads them.
        described = self._described(product_of(launch, self.tokens, few=True, writes=self.writes), None, None, {})
        described = replace(described, format=format, scale_dtype=scale_dtype(found.weight))
        held = {name: Weight(kind, found.weight, product=described) for name, kind in CODES.items()}
        if format.symmetric:
            del held["zeros"]
        tensors: dict[str, Argument] = {"x": x, **held}
        tensors |= self._added(found)
        if self.few:
            self._small(found, tensors, None, None, format)
        else:
            K, N = found.weight.shape
            made = Scratch(N, K)
            undone = Dequantize(described)
            self.add(dequantize(undone), undone, [*held.values(), made], [node])
            tensors |= {"weight": made, "y": self._results(found)}
            what = tuple(name for name in ("x", "weight", "bias", "residual", "y") if name in tensors)
            self.made.steps.append(Step("product", [tensors[name] for name in what], launch.origin, what=what))
        return found.left

    def _added(self, found: Product) -> dict[str, Argument]:
        """The bias and the residual of a product that takes no norm."""
        added: dict[str, Argument] = {}
        if found.bias is not None:
            added["bias"] = Weight("bias", found.bias)
        if found.residual is not None:
            added["residual"] = self.whole(found.residual, found.main)
        return added

    def is_rounding(self, node: Node) -> bool:
        """Whether all that read a node's rounded rows are products of eight bits."""
        return (
            self.codes
            and node.is_a("fake_quantize", FUSER)
            and not node.output.is_output
            and all(
                (user.is_a("MatMul") or user.is_a("packed_linear", FUSER))
                and (weight := user.input(1)) is not None
                and weight.constant is not None
                and rounded_of(weight.constant) is not None
                for user in node.output.consumers
            )
        )

    def is_rounded_at_once(self, launch: Launch) -> bool:
        """Whether a launch is a norm that whoever rounds its rows computes: nothing else reads it."""
        node, *others = launch.nodes
        readers = node.output.consumers
        return (
            not others
            and node.op in NORMS
            and node.domain == FUSER
            and not node.output.is_output
            and len(readers) == 1
            and self.is_rounding(readers[0])
            and all(value is None or value.constant is not None for value in node.inputs[1:])
        )

    def round_rows(self, node: Node) -> None:
        """Rows in eight bits, of the norm before them where that is part of it."""
        given = node.inputs[0]
        assert given is not None
        norm = given.producer if given not in self.places else None
        if norm is not None and (norm.op not in NORMS or norm.domain != FUSER):
            norm = None
        vectors = norm.inputs[1:] if norm is not None else []
        x = self.rows_at(given, node) if norm is None else self.rows_at(norm.inputs[0], norm)
        tensors: dict[str, Argument] = {
            name: vector(value, norm or node)
            for name, value in zip(("weight", "bias"), vectors, strict=False)
            if value is not None
        }
        selected, kind = node in self.tail, node.attributes["kind"]
        y, scales = Rows(x.width, selected, dtype=kind), Rows(1, selected, dtype="fp32")
        what = Rounding(
            x.width, kind, self.made.dtype, None if norm is None else "rms" if norm.op == "rms_norm" else "layer",
            0.0 if norm is None else float(norm.attributes["eps"]), "weight" in tensors, "bias" in tensors,
        )  # fmt: skip
        tensors |= {"x": self.selected(x, node) if selected and not is_selected(x) else x, "y": y, "scales": scales}
        self.add(
            rounding(what), what, [tensors[name] for name in what.tensors], [node] if norm is None else [norm, node]
        )
        self.rounded[node.output] = y, scales

    def _of_eight_bits(self, launch: Launch, format: Format) -> list[Node]:
        """A product of eight bits by a kernel, of few tokens and of many."""
        found = product_of(launch, self.tokens, few=self.few, writes=self.writes, gates=True)
        node = found.main
        assert node.inputs[0] is not None
        x, x_scales = self.rounded[node.inputs[0]]
        tensors: dict[str, Argument] = {
            "x": x, "x_scales": x_scales,
            "weight": Weight("eights", found.weight), "scales": Weight("row_scales", found.weight),
        }  # fmt: skip
        tensors |= self._added(found)
        if self.few:
            self._small(found, tensors, None, None, format)
        else:
            K, N = found.weight.shape
            large = Matmul(
                N, K, self.made.dtype, bias="bias" in tensors, activation=found.activation, gated=found.gated,
                residual="residual" in tensors, kind=format.kind,
            )  # fmt: skip
            tensors["y"] = self._results(found)
            self.add(
                matmul(large, default_tiles(large, self.made.tokens)),
                large,
                [tensors[name] for name in large.tensors],
                found.nodes,
            )
        return found.left

    def _small(
        self, found: Product, tensors: dict[str, Argument], kind: Any, before: Node | None, format: Format | None = None
    ) -> None:
        """A product of few tokens, all in one launch."""
        what = self._described(found, kind, before, tensors)
        if format is not None:
            what = replace(what, format=format, scale_dtype=scale_dtype(found.weight))
        if found.write is not None and what.rotary is not None:
            tensors |= self.written(found.write, what.rotary)
        for name, node in zip("qk", found.head_norms or (), strict=False):
            tensors[f"{name}_norm_weight"] = vector(node.inputs[1], node)
        tensors["y"] = self._results(found)
        self.add(self.kernel_of(Problem(what)), what, [tensors[name] for name in what.tensors], found.nodes)

    def _described(self, found: Product, kind: Any, before: Node | None, tensors: Mapping[str, Argument]) -> Linear:
        """A product of few tokens as its family describes it."""
        K, N = found.weight.shape
        return Linear(
            N, K, self.made.tokens, self.made.dtype, norm=kind, bias="bias" in tensors, activation=found.activation,
            norm_eps=float(before.attributes["eps"]) if kind and before is not None else 0.0,
            gated=found.gated or found.activation is None,
            residual="residual" in tensors, rotary=self.rotary(found.write, N) if found.write is not None else None,
            head_norm_eps=found.head_norms[0].attributes["eps"] if found.head_norms else None,
        )  # fmt: skip

    def _results(self, found: Product) -> Rows:
        """The rows of a product; of several results side by side, a part for each."""
        outputs = found.main.outputs
        if len(outputs) == 1 or found.result is not outputs[0] or found.write is not None:
            return self.new(found.result, found.main)
        parts = [arrangement(output, self.tokens) for output in outputs]
        widths = [part.width for part in parts if part is not None]
        if len(widths) < len(parts):
            raise refused(found.main, "its results are not one row for each token")
        rows, start = Rows(sum(widths), found.main in self.tail), 0
        for output, width in zip(outputs, widths, strict=True):
            self.places[output] = Part(rows, start, start + width)
            start += width
        return rows

    def _bias(self, found: Product, weight: Weight, shift: Constant | None) -> Weight | None:
        if found.bias is None and shift is None:
            return None
        return Weight("bias", found.bias, shift=shift, linear=None if shift is None else found.weight)


def constant(node: Node | None, index: int) -> Constant | None:
    value = node.input(index) if node is not None else None
    return value.constant if value is not None else None
