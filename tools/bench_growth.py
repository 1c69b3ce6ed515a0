"""How fast, and in how much memory, a checkpoint is resharded and grown: this package, a copy, DeepSpeed's converter, torch
alone."""

from __future__ import annotations

import json
import os
import platform
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich import box
from rich.table import Table

from incr_ds.arch.architecture import Architecture, architecture_from_config
from incr_ds.checkpoint.deepspeed.writer import OptimizerFile
from incr_ds.cli.command import command, console
from incr_ds.config.fields import parse_settings
from incr_ds.config.growth import GrowthRecipe
from incr_ds.config.json_file import read_json
from incr_ds.errors import ConfigError
from incr_ds.offline.plan import GrowthRequest, PlannedGrowth, plan_files
from incr_ds.offline.run import grow_checkpoint
from incr_ds.sharding.optimizer_groups import optimizer_groups
from incr_ds.testing.contest import Contestant, Result, race
from incr_ds.testing.synthetic import SyntheticCheckpoint

TOOLS = Path(__file__).resolve().parent
DATA_PARALLEL = 2
START = "incr_ds, plan only"  # Python, torch, transformers, opening the source: the part that does not grow
RESHARD = "{target: {}, layout: {format: universal}}\n"
RATIOS = {
    "throughput_vs_copy": "of the copy's throughput, the start of the program included",
    "speedup_vs_ds_to_universal": "times ds_to_universal's speed",
    "speedup_vs_torch_dcp": "times the speed of torch's own resharding, the faster of the two",
}
TENSOR_PARALLEL = 2
RESHARD_TORCH_DIST = f"{{target: {{}}, layout: {{format: torch_dist, tensor_parallel: {TENSOR_PARALLEL}}}}}\n"


@dataclass(frozen=True)
class ConvertibleFile(OptimizerFile):
    """An optimizer file with param_slice_mappings, which DeepSpeed's converter reads and its loader does not."""

    def content(self) -> dict[str, Any]:
        """The file's content, with where each parameter's piece lies in this rank's partition."""
        from deepspeed.utils.tensor_fragment import fragment_address

        content = super().content()
        state = content["optimizer_state_dict"]
        mappings: list[dict[str, Any]] = []
        moments = state["base_optimizer_state"]["state"]
        for number, group in enumerate(optimizer_groups(self.target.shards(self.model_rank))):
            size, position = moments[number]["exp_avg"].numel, 0
            first, pieces = self.data_rank * size, {}
            for shard in group:
                begin, end = max(first, position), min(first + size, position + shard.numel)
                if begin < end:
                    pieces[shard.parameter] = fragment_address(numel=end - begin, start=begin - first)
                position += shard.numel
            mappings.append(pieces)
        state["param_slice_mappings"] = mappings
        return content


def architecture_of(parameters: float) -> Architecture:
    """A Llama of about that many parameters, with the proportions of small published ones."""
    hidden = 64 * max(1, round((parameters / (16 * 12 + 500)) ** 0.5 / 64))
    layers = max(1, round((parameters - 2 * 32_000 * hidden) / (12 * hidden**2)))
    config = {
        "model_type": "llama",
        "vocab_size": 32_000 if parameters > 5e7 else 1_000,
        "hidden_size": hidden,
        "intermediate_size": 8 * hidden // 3,
        "num_hidden_layers": layers,
        "num_attention_heads": hidden // 64,
        "num_key_value_heads": hidden // 64,
        "max_position_embeddings": 2048,
    }
    return architecture_from_config(config, "benchmark")


def write_source(folder: Path, parameters: float) -> int:
    """A ZeRO-1 checkpoint of two data-parallel ranks, in bf16, below ``folder``/source; returns its parameter count."""
    planned = planned_source(folder, architecture_of(parameters), {"data_parallel": DATA_PARALLEL})
    files = tuple(
        ConvertibleFile(file.target, file.model_rank, file.data_rank) if isinstance(file, OptimizerFile) else file
        for file in planned.files
    )
    grow_checkpoint(PlannedGrowth(planned.request, planned.source, planned.plan, files, planned.dtype))
    return planned.plan.target.num_parameters


def planned_torch_dist_source(folder: Path, parameters: float) -> PlannedGrowth:
    """A torch_dist checkpoint of a Llama that two tensor ranks can cut: with heads half as wide, and an even FFN."""
    stated = architecture_of(parameters).stated
    heads, ffn = stated["hidden_size"] // 32, stated["intermediate_size"] // 2 * 2
    changes = {"num_attention_heads": heads, "num_key_value_heads": heads, "intermediate_size": ffn}
    architecture = architecture_from_config({**stated, **changes}, "benchmark")
    return planned_source(folder, architecture, {"format": "torch_dist"})


def planned_source(folder: Path, architecture: Architecture, layout: dict[str, Any]) -> PlannedGrowth:
    """A checkpoint in bf16, which is to be written below ``folder``/source."""
    (folder / "same.yaml").write_text("target: {}\n")
    content = {"target": {}, "layout": {**layout, "dtype": "bfloat16"}}
    recipe = parse_settings(content, GrowthRecipe, "benchmark")
    request = GrowthRequest(folder, folder / "same.yaml", folder / "source", workers=os.cpu_count() or 1)
    return plan_files(request, SyntheticCheckpoint(architecture), recipe)


def contestants(folder: Path, workers: Sequence[int]) -> list[Contestant]:
    """Each program turns folder/source into the universal format; the copy moves as many bytes."""
    (folder / "reshard.yaml").write_text(RESHARD)
    inputs = tuple(sorted((folder / "source" / "grown").glob("*.pt")))
    optimizer = tuple(path for path in inputs if "optim" in path.name)
    written = sum(path.stat().st_size for path in optimizer)
    tag, output = str(folder / "source" / "grown"), folder / "out"
    python, program = sys.executable, str(Path(__file__).resolve())
    most = str(max(workers))
    ours = growing(folder, "reshard.yaml")
    theirs = [python, "-m", "deepspeed.checkpoint.ds_to_universal", "--inject_missing_state", "--input_folder", tag]
    theirs += ["--output_folder", str(output / "universal"), "--num_extract_workers", most, "--num_merge_workers", most]
    found = [Contestant(START, [*ours, "--plan-only"], (), output)]
    found += [Contestant(f"incr_ds, {n} workers", [*ours, "--workers", str(n)], inputs, output) for n in workers]
    copy = [python, "-S", "-c", COPY, str(written), str(output), *map(str, inputs)]
    (folder / "wider.yaml").write_text(json.dumps(wider(folder / "source" / "config.json")))
    grow = [str(folder / "wider.yaml") if word == str(folder / "reshard.yaml") else word for word in ours]
    found += [
        Contestant(f"incr_ds, growth, {n} workers", [*grow, "--workers", str(n)], inputs, output) for n in workers
    ]
    found.append(Contestant("plain copy", copy, inputs, output))
    found.append(Contestant("ds_to_universal", theirs, inputs, output))
    everything = [python, program, "load-everything", tag, str(output)]
    found.append(Contestant("load everything", everything, inputs, output))
    return found


def growing(folder: Path, recipe: str) -> list[str]:
    """The command that makes ``folder``/out from ``folder``/source by a recipe in ``folder``."""
    source, output = str(folder / "source"), str(folder / "out")
    paths = ["--source", source, "--output", output, "--recipe", str(folder / recipe)]
    return [sys.executable, str(TOOLS / "grow_checkpoint.py"), *paths, "--json"]


def torch_dist_contestants(folder: Path, workers: Sequence[int]) -> list[Contestant]:
    """Each program turns a torch_dist checkpoint, folder/source, into one with chunks for two tensor ranks."""
    (folder / "reshard.yaml").write_text(RESHARD_TORCH_DIST)
    (iteration,) = (folder / "source").glob("iter_*")
    inputs, output = tuple(sorted(iteration.glob("*.distcp"))), folder / "out"
    ours, paths = growing(folder, "reshard.yaml"), ["incr_ds.testing.torch_resharding", str(iteration), str(output)]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(TENSOR_PARALLEL)]
    return [
        *(Contestant(f"incr_ds, {n} workers", [*ours, "--workers", str(n)], inputs, output) for n in workers),
        Contestant("torch DCP, one process", [sys.executable, "-m", *paths], inputs, output),
        Contestant(f"torch DCP, {TENSOR_PARALLEL} ranks", [*launcher, "-m", *paths], inputs, output),
    ]


def wider(config: Path) -> dict[str, Any]:
    """A recipe that widens a benchmark's model by heads of 64, to about 4/3, moments included: every tensor is computed."""
    old = read_json(config, ConfigError)["hidden_size"]
    hidden = 64 * max(old // 64 + 1, round(old * 4 / 3 / 64))
    sizes = {"hidden_size": hidden, "num_attention_heads": hidden // 64, "num_key_value_heads": hidden // 64}
    target = {**sizes, "intermediate_size": 8 * hidden // 3}
    return {"target": target, "width": {"hidden": "isometric"}, "layout": {"format": "universal"}}


# Reads every input once, front to back, and writes what was read until the wanted size is reached; flushed to disk.
COPY = """
import mmap, os, sys
wanted, output, inputs = int(sys.argv[1]), sys.argv[2], sys.argv[3:]
os.makedirs(output)
buffer = memoryview(mmap.mmap(-1, 8 << 20))  # begins on a page, where the copy is fastest
for path in sorted(inputs, key=lambda path: "optim" not in path):
    target = open(os.path.join(output, os.path.basename(path)), "wb", buffering=0)
    with open(path, "rb", buffering=0) as source:
        while count := source.readinto(buffer):
            written = target.write(buffer[:min(count, wanted)])
            wanted -= written
    os.fsync(target.fileno())
"""


def load_everything(tag: Path, output: Path) -> None:
    """The obvious program: all ranks in memory, partitions joined, one torch.save per tensor."""
    shapes = torch.load(tag / "mp_rank_00_model_states.pt", weights_only=False)["param_shapes"]
    files = sorted(tag.glob("*_optim_states.pt"))
    ranks = [torch.load(path, weights_only=False)["optimizer_state_dict"] for path in files]
    for number, group in enumerate(shapes):
        moments = [rank["base_optimizer_state"]["state"][number] for rank in ranks]
        flats = {"fp32": torch.cat([rank["single_partition_of_fp32_groups"][number] for rank in ranks])}
        flats |= {key: torch.cat([moment[key] for moment in moments]) for key in ("exp_avg", "exp_avg_sq")}
        position = 0
        for name, shape in group.items():
            (output / "zero" / name).mkdir(parents=True)
            for key, flat in flats.items():
                tensor = flat[position : position + shape.numel()].view(shape).clone()
                torch.save({"param": tensor}, output / "zero" / name / f"{key}.pt")
            position += shape.numel()


def benchmark(folder: Path, place: str, parameters: float, workers: Sequence[int], rounds: int) -> dict[str, Any]:
    """One source, one race; what each contestant did."""
    with tempfile.TemporaryDirectory(dir=folder, prefix="bench_growth_") as home:
        count = write_source(Path(home), parameters)
        results = race(contestants(Path(home), workers), rounds)
    by_name = {result.name: result for result in results}
    best = max((by_name[f"incr_ds, {n} workers"] for n in workers), key=lambda result: result.throughput)
    copy = by_name["plain copy"].throughput
    return {
        "place": place,
        "parameters": count,
        "throughput_vs_copy": best.throughput / copy,
        "speedup_vs_ds_to_universal": by_name["ds_to_universal"].seconds / best.seconds,
        "peak_anonymous_bytes": max(by_name[f"incr_ds, {n} workers"].peak for n in workers),
        "contestants": [_row(result) for result in results],
    }


def torch_dist_benchmark(folder: Path, parameters: float, workers: Sequence[int], rounds: int) -> dict[str, Any]:
    """The race over a torch_dist checkpoint: this package, and torch.distributed.checkpoint, which Megatron-core uses."""
    with tempfile.TemporaryDirectory(dir=folder, prefix="bench_growth_") as home:
        planned = planned_torch_dist_source(Path(home), parameters)
        grow_checkpoint(planned)
        results = race(torch_dist_contestants(Path(home), workers), rounds)
    own, theirs = ([result for result in results if result.name.startswith(name)] for name in ("incr_ds", "torch"))
    return {
        "place": "disk, torch_dist",
        "parameters": planned.plan.target.num_parameters,
        "speedup_vs_torch_dcp": min(result.seconds for result in theirs) / min(result.seconds for result in own),
        "peak_anonymous_bytes": max(result.peak for result in own),
        "contestants": [_row(result) for result in results],
    }


def _row(result: Result) -> dict[str, Any]:
    return {
        "name": result.name,
        "seconds": result.seconds,
        "read_bytes": result.read,
        "written_bytes": result.written,
        "bytes_per_second": result.throughput,
        "peak_anonymous_bytes": result.peak,
    }


def machine() -> dict[str, Any]:
    """What the numbers depend on."""
    import deepspeed

    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "cpu_cores": os.cpu_count(),
        "memory_bytes": memory,
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "deepspeed": deepspeed.__version__,
    }


def print_table(report: dict[str, Any]) -> None:
    """One table per race."""
    for entry in report["races"]:
        table = Table(
            title=f"{entry['place']}, {entry['parameters']:,} parameters", title_justify="left", box=box.SIMPLE
        )
        for heading in ("", "seconds", "GB read", "GB written", "GB/s", "peak anonymous MiB"):
            table.add_column(heading, justify="left" if not heading else "right")
        for row in entry["contestants"]:
            gigabytes = [row[key] / 1e9 for key in ("read_bytes", "written_bytes", "bytes_per_second")]
            peak = f"{row['peak_anonymous_bytes'] / (1 << 20):,.0f}"
            table.add_row(row["name"], f"{row['seconds']:.2f}", *(f"{number:.2f}" for number in gigabytes), peak)
        console.print(table)
        console.print("; ".join(f"{said}: {entry[key]:.2f}" for key, said in RATIOS.items() if key in entry) + "\n")


@command
def main(
    disk: Annotated[Path, typer.Option(help="A folder on the disk to measure.")] = Path("."),
    memory: Annotated[Path, typer.Option(help="A folder on tmpfs.")] = Path("/dev/shm"),
    parameters: Annotated[float, typer.Option(min=1e6, help="Size of the source on disk.")] = 5e8,
    memory_parameters: Annotated[
        float,
        typer.Option(min=0, help="Size on tmpfs; the converter needs 60 bytes for each parameter; 0 leaves it out."),
    ] = 2.5e8,
    smaller: Annotated[float, typer.Option(min=0, help="A second size on disk, for the trend; 0 leaves it out.")] = 1e8,
    torch_dist_parameters: Annotated[
        float, typer.Option(min=0, help="Size of a torch_dist checkpoint on disk; 0 leaves it out.")
    ] = 1e8,
    workers: Annotated[str, typer.Option(help="Worker counts, separated by commas.")] = "1,2",
    rounds: Annotated[int, typer.Option(min=1, help="Runs of each contestant; medians are reported.")] = 3,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the report there.")] = None,
) -> None:
    """Race on disk and on tmpfs. The headline numbers are those of the largest source on disk."""
    counts = [int(count) for count in workers.split(",")]
    races = [benchmark(disk, "disk", parameters, counts, rounds)]
    if smaller:
        races.append(benchmark(disk, "disk", smaller, counts, rounds))
    if memory_parameters:
        races.append(benchmark(memory, "tmpfs", memory_parameters, counts, rounds))
    if torch_dist_parameters:
        races.append(torch_dist_benchmark(disk, torch_dist_parameters, counts, rounds))
    keys = ("throughput_vs_copy", "speedup_vs_ds_to_universal", "peak_anonymous_bytes")
    report = {**{key: races[0][key] for key in keys}, "rounds": rounds, "machine": machine(), "races": races}
    if json_file:
        json_file.write_text(json.dumps(report, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    print_table(report)


if __name__ == "__main__":
    if sys.argv[1:2] == ["load-everything"]:
        load_everything(Path(sys.argv[2]), Path(sys.argv[3]))
    else:
        main()
