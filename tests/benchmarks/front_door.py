"""Seconds that each stage of fuser.compile takes on a model of a real size, whose weights are on the meta device.

python -m tests.benchmarks.front_door                  Llama-2-7B: 32 layers
python -m tests.benchmarks.front_door --layers 2       fewer
python -m tests.benchmarks.front_door --profile 30     and the functions that take longest, torch.export aside
"""

import argparse
import cProfile
import pstats
from collections.abc import Sequence

import torch
from torch.export import Dim

from fuser.fx import export_module, import_program
from fuser.layers import steps
from fuser.pipeline import canonicalized, rewritten, stage
from fuser.report import Report
from tests.architectures import Decoder

LLAMA_2_7B = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
}


def model(layers: int, *, buffers: str = "cpu") -> Decoder:
    """Llama with parameters on the meta device; `buffers` is where the rest of its state is."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model("llama", **(LLAMA_2_7B | {"num_hidden_layers": layers}))
    with torch.device("meta"):
        made = AutoModelForCausalLM.from_config(config)
    made.model.rotary_emb = type(made.model.rotary_emb)(config).to(buffers)
    return Decoder(made)


def exported(decoder: Decoder) -> torch.export.ExportedProgram:
    """The program of a decoder: batch, sequence and past are dynamic."""
    sizes = {"batch": 2, "sequence": 3, "past": 5, "total": 8}
    kinds = [torch.float32 if name.startswith("past") else torch.int64 for name in decoder.inputs]
    shapes = [[sizes.get(str(dim), dim) for dim in shape] for shape in decoder.inputs.values()]
    given = [torch.zeros(shape, dtype=kind, device="meta") for shape, kind in zip(shapes, kinds, strict=True)]
    named = {"batch": Dim("batch"), "past": Dim("past")}
    specs = [
        {axis: named.get(dim, Dim.AUTO) for axis, dim in enumerate(shape) if isinstance(dim, str)}
        for shape in decoder.inputs.values()
    ]
    dynamic = {"input_ids": specs[0], "attention_mask": specs[1], "others": tuple(specs[2:])}
    return export_module(decoder, tuple(given), {}, dynamic)


def measured(decoder: Decoder, profile: cProfile.Profile | None = None) -> Report:
    """What was fused, and the seconds of each stage."""
    report = Report("Llama", "torch")

    def silent(name: str) -> None:
        pass

    with stage(report, "export", silent):
        program = exported(decoder)
    if profile is not None:
        profile.enable()
    with stage(report, "read", silent):
        graph = import_program(program)
        report.nodes_before = len(graph.nodes)
        before = steps(graph)
    canonicalized(graph, report, silent)
    rewritten(graph, before, report, silent, verify=True)
    if profile is not None:
        profile.disable()
    report.nodes_after = len(graph.nodes)
    return report


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.front_door", description=__doc__)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--buffers", choices=("cpu", "meta"), default="cpu")
    parser.add_argument("--profile", type=int, metavar="N", help="print the N functions that take longest")
    options = parser.parse_args(arguments)
    profile = cProfile.Profile() if options.profile else None
    report = measured(model(options.layers, buffers=options.buffers), profile)
    counts = ", ".join(f"{count} {kind}" for kind, count in sorted(report.fused.items()))
    print(f"Llama-2-7B, {options.layers} layers: {report.nodes_before} -> {report.nodes_after} nodes: {counts}")
    for miss in report.misses:
        print(f"  near miss: {miss.fusion} at {miss.line}")
    for name, seconds in report.stages_s.items():
        print(f"  {name:14}{seconds:8.2f} s")
    print(f"  {'all but export':14}{sum(report.stages_s.values()) - report.stages_s['export']:8.2f} s")
    if profile is not None:
        pstats.Stats(profile).sort_stats("cumulative").print_stats(options.profile)


if __name__ == "__main__":
    main()
