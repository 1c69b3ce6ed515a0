"""Training against a plain loop of transformers and DeepSpeed: CPU seconds, tokens per second and peak memory."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import psutil
import torch
import typer

from incr_ds.arch.architecture import Architecture, architecture_from_config
from incr_ds.arch.flops import forward_flops_per_token, training_flops_per_token
from incr_ds.bench.measure import machine
from incr_ds.bench.results import ResultTable, write_results
from incr_ds.bench.start import startup_seconds
from incr_ds.cli.command import command, console, print_json
from incr_ds.cli.options import Json
from incr_ds.config.fields import parse_settings
from incr_ds.config.training import RunSettings
from incr_ds.data.slices import slices
from incr_ds.data.targets import Targets
from incr_ds.testing.checkpoint import drawn_checkpoint
from incr_ds.testing.processes import run_processes

ROOT = Path(__file__).parent.parent
STUDENT = {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 6, "num_attention_heads": 8}
TEACHER = {"hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 3, "num_attention_heads": 4}
PLAIN, OURS, TAUGHT = "plain loop", "incr_ds", "incr_ds, distillation"
PIPELINE, SHARED = "incr_ds, pipeline of 2", "incr_ds, samples shared by 2"
HEADINGS = ("trained by", "CPU s a step", "wall s a step", "tokens/s", "vs plain loop", "peak MB a process")
RATE = 1e-3
Batch = tuple[torch.Tensor, Targets]
Step = Callable[[list[Batch]], None]
Times = Mapping[str, float]
KINDS = ("cpu_seconds", "wall_seconds")


@dataclass(frozen=True)
class Work:
    """Sizes of one optimizer step over two processes, how often each is timed, and in how many pairs of processes."""

    vocabulary: int
    sequence_length: int
    micro_batch: int
    micro_batches: int
    rounds: int
    threads: int
    pairs: int = 1

    @property
    def tokens(self) -> int:
        """Tokens of a step."""
        return self.sequence_length * self.micro_batch * self.micro_batches


# The run whose start is timed.
STARTED = Work(vocabulary=4096, sequence_length=128, micro_batch=4, micro_batches=2, rounds=1, threads=1)


@command
def main(
    output: Annotated[Path, typer.Option(help="Folder for bench_training.json and bench_training.md.")],
    vocabulary: Annotated[int, typer.Option(min=2, help="Vocabulary size.")] = 4096,
    sequence_length: Annotated[int, typer.Option(min=2, help="Tokens per sample.")] = 128,
    micro_batch: Annotated[int, typer.Option(min=1, help="Samples per micro-batch.")] = 4,
    micro_batches: Annotated[int, typer.Option(min=2, help="Micro-batches of a step, of both processes; even.")] = 8,
    rounds: Annotated[int, typer.Option(min=1, help="Timed steps of each, in each pair.")] = 8,
    pairs: Annotated[int, typer.Option(min=1, help="Pairs of processes, one after the other.")] = 5,
    threads: Annotated[int, typer.Option(min=1, help="Threads per process.")] = 1,
    starts: Annotated[int, typer.Option(min=0, help="Timed starts of pretrain.py and of its imports.")] = 3,
    json: Json = False,
) -> None:
    """Race the training loops in the same two processes, one step of each in turn; then time the start of a run.

    The same loop may be a tenth slower in one process than in the next, so that several pairs are started.
    """
    work = Work(vocabulary, sequence_length, micro_batch, micro_batches, rounds, threads, pairs)
    races = [run_processes(race, 2, work, timeout=3600.0)[0] for _ in range(pairs)]
    peaks = {name: max(run_processes(peak_bytes, 2, name, work, timeout=3600.0)) for name in CONTESTANTS}
    startup = startup_seconds(_run(STARTED, {"data_parallel": 1}), _config(STARTED, STUDENT), starts)
    summary = _summary(work, races, peaks, startup)
    table = ResultTable("one optimizer step in two processes", HEADINGS, _rows(summary))
    heading = "Training against a plain loop of transformers and DeepSpeed"
    write_results(output / "bench_training", heading, summary, table, _sentences(summary))
    if json:
        print_json(summary)
        return
    console.print(table.on_console())
    for line in _sentences(summary):
        console.print(line)


def race(work: Work) -> dict[str, dict[str, float]]:
    """Median CPU seconds (of both processes) and wall seconds of a step of each contestant. Runs in two processes."""
    import torch.distributed as dist

    torch.set_num_threads(work.threads)
    contestants = {name: build(work) for name, build in CONTESTANTS.items()}
    names, spent = list(contestants), {name: list[tuple[float, float]]() for name in contestants}
    for turn in range(-2, work.rounds):  # the first two steps warm up
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            batches = read_batches(name, work, turn, dist.get_rank())
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


def peak_bytes(name: str, work: Work) -> int:
    """Peak memory of this process while it builds contestant ``name`` and takes two steps, beyond what imports take.

    Runs in two processes that do nothing else.
    """
    import torch.distributed as dist
    from transformers import LlamaForCausalLM

    assert LlamaForCausalLM is not None  # imported, so that its code is not counted
    torch.set_num_threads(work.threads)
    before = psutil.Process().memory_info().rss
    step = CONTESTANTS[name](work)
    for turn in range(2):
        step(read_batches(name, work, turn, dist.get_rank()))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before


def _own_step(
    work: Work, layout: Mapping[str, int], *, teacher: Mapping[str, int] | None = None, sequence_parallel: int = 1
) -> Step:
    from incr_ds.train.engine import build_engine

    run = _run(work, layout, taught=teacher is not None, sequence_parallel=sequence_parallel)
    taught_by = None if teacher is None else drawn_checkpoint(_architecture(work, teacher))
    engine = build_engine(run, _architecture(work, STUDENT), None, taught_by)
    alpha = 0.0 if teacher is None else 0.5
    return lambda batches: _ignore(engine.train_step(iter(batches), learning_rate=RATE, alpha=alpha))


def _plain_loop(work: Work) -> Step:
    """What the documentation of transformers and DeepSpeed shows, with the same model, optimizer and ZeRO stage."""
    import deepspeed
    from transformers import AutoConfig, AutoModelForCausalLM

    from incr_ds.launch.deepspeed_config import deepspeed_config
    from incr_ds.train.engine import initialize_distributed

    run = _run(work, {"data_parallel": 2})
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


def read_batches(name: str, work: Work, turn: int, rank: int) -> list[Batch]:
    """The micro-batches of a step that process ``rank`` reads: half of them, all in a pipeline, or half of every sample."""
    generator = torch.Generator().manual_seed(turn + 10)
    shape = (work.micro_batches, work.micro_batch, work.sequence_length + 1)
    ids = torch.randint(0, work.vocabulary, shape, generator=generator)
    mine = ids if name in (PIPELINE, SHARED) else ids[rank::2]
    batches: list[Batch] = [(micro[:, :-1].contiguous(), micro[:, 1:].contiguous()) for micro in mine]
    return list(slices(batches, rank, 2)) if name == SHARED else batches


def _config(work: Work, sizes: Mapping[str, int]) -> dict[str, Any]:
    longest = {"max_position_embeddings": work.sequence_length, "vocab_size": work.vocabulary}
    return {"model_type": "llama", **sizes, **longest, "tie_word_embeddings": False}


def _architecture(work: Work, sizes: Mapping[str, int]) -> Architecture:
    return architecture_from_config(_config(work, sizes), "the benchmark's model")


def _run(work: Work, layout: Mapping[str, int], *, taught: bool = False, sequence_parallel: int = 1) -> RunSettings:
    content: dict[str, Any] = {
        "output": "unused",
        "precision": "fp32",
        "model": {"config": "unused"},
        "layout": layout,
        "batch": {
            "sequence_length": work.sequence_length,
            "micro_batch_size": work.micro_batch,
            "global_batch_size": work.micro_batch * work.micro_batches,
            "sequence_parallel": sequence_parallel,
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


CONTESTANTS: Mapping[str, Callable[[Work], Step]] = {
    PLAIN: _plain_loop,
    OURS: lambda work: _own_step(work, {"data_parallel": 2}),
    TAUGHT: lambda work: _own_step(work, {"data_parallel": 2}, teacher=TEACHER),
    PIPELINE: lambda work: _own_step(work, {"pipeline_parallel": 2}),
    SHARED: lambda work: _own_step(work, {"data_parallel": 2}, sequence_parallel=2),
}


def _summary(
    work: Work, races: Sequence[Mapping[str, Times]], peaks: Mapping[str, int], startup: dict[str, Any] | None
) -> dict[str, Any]:
    student, teacher = (_architecture(work, sizes) for sizes in (STUDENT, TEACHER))
    found = {name: {kind: median(race[name][kind] for race in races) for kind in KINDS} for name in races[0]}
    # Two stages can be busy at most m of m + 1 turns with m micro-batches.
    bubble = (work.micro_batches + 1) / work.micro_batches
    ratios = {
        "time_vs_plain": _ratios(races, "cpu_seconds", OURS, PLAIN),
        "distillation_time_ratio": _ratios(races, "cpu_seconds", TAUGHT, OURS),
        "pipeline_vs_bubble_bound": [ratio / bubble for ratio in _ratios(races, "wall_seconds", PIPELINE, OURS)],
    }
    shared = median(_ratios(races, "wall_seconds", SHARED, OURS))
    return {
        "machine": machine(torch.device("cpu")),
        "work": asdict(work),
        "tokens_per_step": work.tokens,
        "parameters": {"student": student.num_parameters, "teacher": teacher.num_parameters},
        "contestants": {name: {**times, "peak_bytes": peaks[name]} for name, times in found.items()},
        **{name: median(of_pairs) for name, of_pairs in ratios.items()},
        "lowest_and_highest": {name: [min(of_pairs), max(of_pairs)] for name, of_pairs in ratios.items()},
        "peak_memory_vs_plain": peaks[OURS] / peaks[PLAIN],
        "teacher_flops_share": forward_flops_per_token(teacher, work.sequence_length)
        / training_flops_per_token(student, work.sequence_length),
        "shared_samples": {"time": shared, "peak_memory": peaks[SHARED] / peaks[OURS]},
        "startup": startup,
        "startup_vs_imports": None
        if startup is None
        else startup["run"]["seconds"] / startup["imports_and_model"]["seconds"],
    }


def _ratios(races: Sequence[Mapping[str, Times]], kind: str, one: str, other: str) -> list[float]:
    return [race[one][kind] / race[other][kind] for race in races]


def _rows(summary: Mapping[str, Any]) -> list[tuple[str, ...]]:
    plain = summary["contestants"][PLAIN]["cpu_seconds"]
    return [
        (
            name,
            f"{times['cpu_seconds']:.3f}",
            f"{times['wall_seconds']:.3f}",
            f"{summary['tokens_per_step'] / times['wall_seconds']:,.0f}",
            f"{times['cpu_seconds'] / plain:.3f}",
            f"{times['peak_bytes'] / 1e6:,.0f}",
        )
        for name, times in summary["contestants"].items()
    ]


def _sentences(summary: Mapping[str, Any]) -> list[str]:
    spread = {name: f"{low:.3f} to {high:.3f}" for name, (low, high) in summary["lowest_and_highest"].items()}
    found = [
        f"ratios are medians over {summary['work']['pairs']} pairs of processes, with the lowest and the highest in parentheses",
        f"against the plain loop: {summary['time_vs_plain']:.3f} ({spread['time_vs_plain']}) of its CPU seconds, "
        f"{summary['peak_memory_vs_plain']:.3f} of its peak memory beyond imports",
        f"distillation: {summary['distillation_time_ratio']:.3f} ({spread['distillation_time_ratio']}) times the CPU seconds "
        f"without; the teacher's FLOPs are {summary['teacher_flops_share']:.1%} of the student's",
        f"the pipeline: {summary['pipeline_vs_bubble_bound']:.3f} ({spread['pipeline_vs_bubble_bound']}) times the time that "
        "its bubble allows",
        f"samples shared by two processes (batch.sequence_parallel): {summary['shared_samples']['time']:.3f} times the time of "
        f"processes that read samples of their own, {summary['shared_samples']['peak_memory']:.3f} of the peak memory",
    ]
    if (startup := summary["startup"]) is not None:
        found.append(
            f"from the command until the engine is ready: {startup['run']['seconds']:.1f} s, "
            f"{summary['startup_vs_imports']:.2f} times importing DeepSpeed and transformers and building the model "
            f"({startup['imports_and_model']['seconds']:.1f} s); after its first step: {startup['run']['to_step_1']:.1f} s"
        )
    return found


if __name__ == "__main__":
    main()
