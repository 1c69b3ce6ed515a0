"""Training against a plain loop of transformers and DeepSpeed: CPU seconds and tokens per second, with and without a teacher."""

from __future__ import annotations

import json as json_module
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import numpy as np
import torch
import typer
import yaml
from rich.table import Table

from incr_ds.arch.architecture import Architecture, architecture_from_config
from incr_ds.arch.flops import forward_flops_per_token, training_flops_per_token
from incr_ds.bench.measure import machine
from incr_ds.cli.command import command, console, print_json
from incr_ds.cli.options import Json
from incr_ds.config.fields import parse_settings
from incr_ds.config.training import RunSettings
from incr_ds.testing.checkpoint import drawn_checkpoint
from incr_ds.testing.processes import free_port, run_processes

ROOT = Path(__file__).parent.parent
STUDENT = {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 6, "num_attention_heads": 8}
TEACHER = {"hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 3, "num_attention_heads": 4}
PLAIN, OURS, TAUGHT, PIPELINE = "plain loop", "incr_ds", "incr_ds, distillation", "incr_ds, pipeline of 2"
HEADINGS = ("trained by", "CPU s a step", "wall s a step", "tokens/s", "vs plain loop")
RATE = 1e-3
Batch = tuple[torch.Tensor, torch.Tensor]
Step = Callable[[list[Batch]], None]


@dataclass(frozen=True)
class Work:
    """Sizes of one optimizer step, over two processes."""

    vocabulary: int
    sequence_length: int
    micro_batch: int
    micro_batches: int
    rounds: int
    threads: int

    @property
    def tokens(self) -> int:
        """Tokens of a step."""
        return self.sequence_length * self.micro_batch * self.micro_batches


@command
def main(
    output: Annotated[Path, typer.Option(help="Folder for bench_training.json and bench_training.md.")],
    vocabulary: Annotated[int, typer.Option(min=2, help="Vocabulary size.")] = 4096,
    sequence_length: Annotated[int, typer.Option(min=2, help="Tokens per sample.")] = 128,
    micro_batch: Annotated[int, typer.Option(min=1, help="Samples per micro-batch.")] = 4,
    micro_batches: Annotated[int, typer.Option(min=2, help="Micro-batches of a step, of both processes; even.")] = 8,
    rounds: Annotated[int, typer.Option(min=1, help="Timed steps of each.")] = 20,
    threads: Annotated[int, typer.Option(min=1, help="Threads per process.")] = 1,
    starts: Annotated[int, typer.Option(min=0, help="Timed starts of pretrain.py and of its imports.")] = 3,
    json: Json = False,
) -> None:
    """Race the training loops in the same two processes, one step of each in turn; then time the start of a run."""
    work = Work(vocabulary, sequence_length, micro_batch, micro_batches, rounds, threads)
    (found, _) = run_processes(race, 2, work, timeout=3600.0)
    summary = _summary(work, found, _startup(starts))
    _write(summary, output)
    if json:
        print_json(summary)
        return
    console.print(_table(summary))
    for line in _sentences(summary):
        console.print(line)


def race(work: Work) -> dict[str, dict[str, float]]:
    """Median CPU seconds (of both processes) and wall seconds of a step of each contestant. Runs in two processes."""
    import torch.distributed as dist

    torch.set_num_threads(work.threads)
    contestants = _contestants(work)
    names, spent = list(contestants), {name: list[tuple[float, float]]() for name in contestants}
    for turn in range(-2, work.rounds):  # the first two steps warm up
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            batches = _batches(work, turn, dist.get_rank(), pipeline=name == PIPELINE)
            dist.barrier()
            wall, cpu = time.perf_counter(), time.process_time()
            contestants[name](batches)
            cpu_spent = torch.tensor(time.process_time() - cpu, dtype=torch.float64)
            dist.barrier()
            wall = time.perf_counter() - wall
            dist.all_reduce(cpu_spent)
            if turn >= 0:
                spent[name].append((cpu_spent.item(), wall))
    return {
        name: {"cpu_seconds": median(cpu for cpu, _ in pairs), "wall_seconds": median(wall for _, wall in pairs)}
        for name, pairs in spent.items()
    }


def _contestants(work: Work) -> dict[str, Step]:
    return {
        PLAIN: _plain_loop(work),
        OURS: _own_step(work, {"data_parallel": 2}, taught=False),
        TAUGHT: _own_step(work, {"data_parallel": 2}, taught=True),
        PIPELINE: _own_step(work, {"pipeline_parallel": 2}, taught=False),
    }


def _own_step(work: Work, layout: Mapping[str, int], *, taught: bool) -> Step:
    from incr_ds.train.engine import build_engine

    run = _run(work, layout, taught=taught)
    teacher = drawn_checkpoint(_architecture(work, TEACHER)) if taught else None
    engine = build_engine(run, _architecture(work, STUDENT), None, teacher)
    alpha = 0.5 if taught else 0.0
    return lambda batches: _ignore(engine.train_step(iter(batches), learning_rate=RATE, alpha=alpha))


def _plain_loop(work: Work) -> Step:
    """What the documentation of transformers and DeepSpeed shows, with the same model, optimizer and ZeRO stage."""
    import deepspeed
    from transformers import AutoConfig, AutoModelForCausalLM

    from incr_ds.launch.deepspeed_config import deepspeed_config
    from incr_ds.train.engine import initialize_distributed

    run = _run(work, {"data_parallel": 2}, taught=False)
    initialize_distributed(run.layout)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**_config(work, STUDENT)), dtype=torch.float32)
    matrices = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    vectors = [parameter for parameter in model.parameters() if parameter.dim() < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=RATE, betas=(0.9, 0.95))
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=deepspeed_config(run))

    def step(batches: list[Batch]) -> None:
        for input_ids, labels in batches:
            loss = engine(input_ids=input_ids, labels=labels, shift_labels=labels, use_cache=False).loss
            engine.backward(loss)
            engine.step()

    return step


def _batches(work: Work, turn: int, rank: int, *, pipeline: bool) -> list[Batch]:
    """This rank's micro-batches of a step: half of them, or all of them in a pipeline."""
    generator = torch.Generator().manual_seed(turn + 10)
    shape = (work.micro_batches, work.micro_batch, work.sequence_length + 1)
    ids = torch.randint(0, work.vocabulary, shape, generator=generator)
    mine = ids if pipeline else ids[rank::2]
    return [(micro[:, :-1].contiguous(), micro[:, 1:].contiguous()) for micro in mine]


def _config(work: Work, sizes: Mapping[str, int]) -> dict[str, Any]:
    longest = {"max_position_embeddings": work.sequence_length, "vocab_size": work.vocabulary}
    return {"model_type": "llama", **sizes, **longest, "tie_word_embeddings": False}


def _architecture(work: Work, sizes: Mapping[str, int]) -> Architecture:
    return architecture_from_config(_config(work, sizes), "the benchmark's model")


def _run(work: Work, layout: Mapping[str, int], *, taught: bool) -> RunSettings:
    content: dict[str, Any] = {
        "output": "unused",
        "precision": "fp32",
        "model": {"config": "unused"},
        "layout": layout,
        "batch": {
            "sequence_length": work.sequence_length,
            "micro_batch_size": work.micro_batch,
            "global_batch_size": work.micro_batch * work.micro_batches,
        },
        "schedule": {"train_steps": 1, "learning_rate": RATE},
        "data": {"train": [{"prefix": "unused"}]},
        "checkpoint": {"interval": 1},
        "deepspeed": str(ROOT / "ds_configs/deepspeed/fp32_cpu.json"),
    }
    if taught:
        content["distillation"] = {"teacher": "unused", "anneal_steps": 1}
    return parse_settings(content, RunSettings, "bench_training")


def _ignore(result: object) -> None:
    """Drop a result."""


def _startup(starts: int) -> dict[str, Any] | None:
    """Median seconds from the command to the first step, by part, and of the imports that no run can do without."""
    if not starts:
        return None
    with tempfile.TemporaryDirectory() as folder:
        run_file = _write_run(Path(folder))
        runs, floors = [], []
        for number in range(starts):
            floors.append(_floor(Path(folder)))
            output = ["--set", f"output={folder}/run{number}"]
            runs.append(_timed_start([sys.executable, "launchers/pretrain.py", "--config", str(run_file), *output]))
    parts = {part: median(run[part] for run in runs) for part in runs[0]}
    floor = {part: median(run[part] for run in floors) for part in floors[0]}
    return {"run": parts, "imports_and_model": floor}


FLOOR = """
import sys
import deepspeed, transformers
model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.from_pretrained(sys.argv[1]))
print("built", flush=True)
"""


def _floor(folder: Path) -> dict[str, float]:
    return _timed(["-c", FLOOR, str(folder)], {"built": "seconds"})


def _timed_start(arguments: Sequence[str]) -> dict[str, float]:
    return _timed(arguments[1:], {"layout: ": "seconds", "step 1/1  loss": "to_step_1"})


def _timed(arguments: Sequence[str], marks: Mapping[str, str]) -> dict[str, float]:
    """Wall seconds until a line with each mark is printed, and the CPU seconds of the whole process."""
    alone = {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
    }
    environment = {**os.environ, **alone, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    before, began, found = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter(), dict[str, float]()
    with subprocess.Popen(
        [sys.executable, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=ROOT,
        env=environment,
    ) as process:
        lines = []
        for line in _lines(process):
            lines.append(line)
            for mark, name in marks.items():
                if mark in line:
                    found.setdefault(name, time.perf_counter() - began)
    if process.returncode or set(found) != set(marks.values()):
        raise RuntimeError(f"{' '.join(arguments)} failed with exit code {process.returncode}:\n{''.join(lines)}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return found | {"cpu_seconds": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime}


def _lines(process: subprocess.Popen[str]) -> Iterator[str]:
    assert process.stdout is not None
    yield from process.stdout


def _write_run(folder: Path) -> Path:
    """A run of one step of the student, with its config and random data."""
    from incr_ds.data.megatron import IndexedDatasetBuilder

    work = Work(4096, 128, 4, 2, 1, 1)
    (folder / "config.json").write_text(json_module.dumps(_config(work, STUDENT)))
    builder = IndexedDatasetBuilder(f"{folder}/data.bin", dtype=np.uint16)
    ids = torch.randint(0, work.vocabulary, (20, 200), generator=torch.Generator().manual_seed(0)).tolist()
    for document in ids:
        builder.add_document(document, [len(document)])
    builder.finalize(f"{folder}/data.idx")
    run = _run(work, {"data_parallel": 1}, taught=False).model_dump(mode="json", exclude_defaults=True)
    run |= {"model": {"config": f"{folder}/config.json"}, "data": {"train": [{"prefix": f"{folder}/data"}]}}
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(run))
    return path


def _summary(work: Work, found: Mapping[str, Mapping[str, float]], startup: dict[str, Any] | None) -> dict[str, Any]:
    student, teacher = (_architecture(work, sizes) for sizes in (STUDENT, TEACHER))
    cpu = {name: times["cpu_seconds"] for name, times in found.items()}
    wall = {name: times["wall_seconds"] for name, times in found.items()}
    # Two stages can be busy at most m of m + 1 turns with m micro-batches.
    bound = wall[OURS] * (work.micro_batches + 1) / work.micro_batches
    return {
        "machine": machine(torch.device("cpu")),
        "work": asdict(work),
        "tokens_per_step": work.tokens,
        "parameters": {"student": student.num_parameters, "teacher": teacher.num_parameters},
        "contestants": found,
        "time_vs_plain": cpu[OURS] / cpu[PLAIN],
        "distillation_time_ratio": cpu[TAUGHT] / cpu[OURS],
        "teacher_flops_share": forward_flops_per_token(teacher, work.sequence_length)
        / training_flops_per_token(student, work.sequence_length),
        "pipeline_vs_bubble_bound": wall[PIPELINE] / bound,
        "startup": startup,
        "startup_vs_imports": None
        if startup is None
        else startup["run"]["seconds"] / startup["imports_and_model"]["seconds"],
    }


def _rows(summary: Mapping[str, Any]) -> list[tuple[str, ...]]:
    plain = summary["contestants"][PLAIN]["cpu_seconds"]
    return [
        (
            name,
            f"{times['cpu_seconds']:.3f}",
            f"{times['wall_seconds']:.3f}",
            f"{summary['tokens_per_step'] / times['wall_seconds']:,.0f}",
            f"{times['cpu_seconds'] / plain:.3f}",
        )
        for name, times in summary["contestants"].items()
    ]


def _table(summary: Mapping[str, Any]) -> Table:
    table = Table(*HEADINGS, title="one optimizer step in two processes", title_justify="left")
    for cells in _rows(summary):
        table.add_row(*cells)
    return table


def _sentences(summary: Mapping[str, Any]) -> list[str]:
    found = [
        f"against the plain loop: {summary['time_vs_plain']:.3f} of its CPU seconds",
        f"distillation: {summary['distillation_time_ratio']:.3f} times the CPU seconds without; the teacher's FLOPs are "
        f"{summary['teacher_flops_share']:.1%} of the student's",
        f"the pipeline: {summary['pipeline_vs_bubble_bound']:.3f} times the time that its bubble allows",
    ]
    if (startup := summary["startup"]) is not None:
        found.append(
            f"from the command until the engine is ready: {startup['run']['seconds']:.1f} s, "
            f"{summary['startup_vs_imports']:.2f} times importing DeepSpeed and transformers and building the model "
            f"({startup['imports_and_model']['seconds']:.1f} s); after its first step: {startup['run']['to_step_1']:.1f} s"
        )
    return found


def _write(summary: Mapping[str, Any], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "bench_training.json").write_text(json_module.dumps(summary, indent=1) + "\n", encoding="utf-8")
    facts = ", ".join(f"{key} {value}" for key, value in {**summary["machine"], **summary["work"]}.items())
    lines = ["# Training against a plain loop of transformers and DeepSpeed", "", f"{facts}.", ""]
    lines += ["| " + " | ".join(HEADINGS) + " |", "|" + "---|" * len(HEADINGS)]
    lines += ["| " + " | ".join(cells) + " |" for cells in _rows(summary)]
    lines += ["", *(f"- {line}" for line in _sentences(summary))]
    (folder / "bench_training.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
