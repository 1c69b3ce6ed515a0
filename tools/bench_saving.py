"""How long training waits for a checkpoint: saved at once, in the background, by DeepSpeed alone, and by the disk itself."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import torch
import typer

from incr_ds.arch.architecture import Architecture, architecture_from_config
from incr_ds.bench.measure import machine
from incr_ds.bench.results import ResultTable, write_results
from incr_ds.cli.command import command, console, print_json
from incr_ds.cli.options import Json
from incr_ds.config.fields import parse_settings
from incr_ds.config.training import RunSettings
from incr_ds.testing.processes import run_processes
from incr_ds.train.checkpoints import PendingSave, TrainingState, begin_save
from incr_ds.train.metrics import Position

ROOT = Path(__file__).parent.parent
COPY, DISK, DEEPSPEED = "copy to memory (floor)", "write and flush (floor)", "DeepSpeed's save_checkpoint"
AT_ONCE, BACKGROUND = "incr_ds", "incr_ds, in the background"
HEADINGS = ("saved by", "training waits, s", "GB/s", "complete after, s", "a step meanwhile, s")
PROCESSES, THREADS, TOKENS, RATE, BLOCK = 2, 1, 32, 1e-4, 2**24
# Seconds that training waits, until the checkpoint is complete, and of a step meanwhile.
Spent = tuple[float, float, float | None]
Saver = Callable[[int], Spent]


@dataclass(frozen=True)
class Work:
    """The model, which two processes train in fp32 under ZeRO-1, and how often each saver saves it."""

    hidden_size: int
    layers: int
    vocabulary: int
    rounds: int


@command
def main(
    output: Annotated[
        Path, typer.Option(help="Folder for bench_saving.json and bench_saving.md; checkpoints lie there meanwhile.")
    ],
    hidden_size: Annotated[int, typer.Option(min=8, help="Hidden size; a multiple of 8.")] = 640,
    layers: Annotated[int, typer.Option(min=1, help="Decoder layers.")] = 8,
    vocabulary: Annotated[int, typer.Option(min=2, help="Vocabulary size.")] = 8192,
    rounds: Annotated[int, typer.Option(min=1, help="Saves by each.")] = 5,
    json: Json = False,
) -> None:
    """Save the same model's checkpoints in turns."""
    work = Work(hidden_size, layers, vocabulary, rounds)
    output.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=output) as folder:
        found, _ = run_processes(race, PROCESSES, work, folder, timeout=3600.0)
    summary = _summary(work, found)
    table = ResultTable("saving a checkpoint of two processes", HEADINGS, _rows(summary))
    write_results(output / "bench_saving", "Saving a checkpoint", summary, table, _sentences(summary))
    if json:
        print_json(summary)
        return
    console.print(table.on_console())
    for line in _sentences(summary):
        console.print(line)


def race(work: Work, folder: str) -> dict[str, Any]:
    """Bytes of a checkpoint, and medians of what each spends on one. Runs in two processes, which agree on the times."""
    torch.set_num_threads(THREADS)
    runs = {name: _run(Path(folder) / name, background=name == BACKGROUND) for name in (AT_ONCE, BACKGROUND)}
    savers = {name: _OwnSaver(work, run) for name, run in runs.items()}
    size = savers[AT_ONCE].checkpoint_bytes()
    contestants: dict[str, Saver] = {
        COPY: _copier(size // PROCESSES),
        DISK: _flusher(size // PROCESSES, Path(folder) / "floor"),
        DEEPSPEED: _deepspeed_saver(work, runs[AT_ONCE], Path(folder) / "deepspeed"),
        **savers,
    }
    spent: dict[str, list[Spent]] = {name: [] for name in contestants}
    for turn in range(1, work.rounds + 1):
        for name, save in contestants.items():
            spent[name].append(_slowest(save(turn)))
    medians = {name: map(_median, zip(*times, strict=True)) for name, times in spent.items()}
    columns = ("waits_seconds", "complete_seconds", "step_seconds")
    return {
        "bytes": size,
        "step_seconds": savers[AT_ONCE].step_seconds(),
        "spent": {name: dict(zip(columns, times, strict=True)) for name, times in medians.items()},
    }


class _OwnSaver:
    """Saves as a run does. In the background, it trains until the checkpoint is written."""

    def __init__(self, work: Work, run: RunSettings) -> None:
        from incr_ds.train.engine import build_engine

        self._run, self._architecture = run, _architecture(work)
        self._engine = build_engine(run, self._architecture, None, None)
        self._train()  # makes Adam's moments

    def __call__(self, turn: int) -> Spent:
        began = time.perf_counter()
        pending = self._begin(turn)
        waited, steps = time.perf_counter() - began, []
        while self._run.checkpoint.background and not pending.is_written():
            steps.append(self._train())
        publishing = time.perf_counter()
        folder = pending.publish()
        ended = time.perf_counter()
        _remove(folder)
        return waited + ended - publishing, ended - began, _median(tuple(steps))

    def checkpoint_bytes(self) -> int:
        """Bytes of a checkpoint's files."""
        folder = self._begin(0).publish()
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        _remove(folder)
        return size

    def step_seconds(self) -> float:
        """Median seconds of a step while nothing is saved."""
        return median(self._train() for _ in range(5))

    def _begin(self, step: int) -> PendingSave:
        state = TrainingState(position=Position(step=step), evaluated_step=-1, data={}, settings={})
        return begin_save(self._engine, self._run, self._architecture, state)

    def _train(self) -> float:
        began = time.perf_counter()
        ids = torch.zeros(1, TOKENS, dtype=torch.long)
        self._engine.train_step(iter([(ids, ids)]), learning_rate=RATE)
        return time.perf_counter() - began


def _deepspeed_saver(work: Work, run: RunSettings, folder: Path) -> Saver:
    import deepspeed
    from transformers import AutoConfig, AutoModelForCausalLM

    from incr_ds.launch.deepspeed_config import deepspeed_config

    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**_config(work)), dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=deepspeed_config(run))
    ids = torch.zeros(1, TOKENS, dtype=torch.long)
    engine.backward(engine(input_ids=ids, labels=ids, use_cache=False).loss)
    engine.step()

    def save(turn: int) -> Spent:
        began = time.perf_counter()
        engine.save_checkpoint(str(folder), tag=f"step{turn}")
        waited = time.perf_counter() - began
        _remove(folder)
        return waited, waited, None

    return save


def _copier(size: int) -> Saver:
    """Copies as many bytes as this process saves."""
    source = torch.ones(size, dtype=torch.uint8)

    def copy(turn: int) -> Spent:
        began = time.perf_counter()
        copied = source.clone()
        waited = time.perf_counter() - began
        del copied
        return waited, waited, None

    return copy


def _flusher(size: int, folder: Path) -> Saver:
    """Writes as many bytes as this process saves into a new file, and flushes it to disk."""
    block = bytes(BLOCK)
    folder.mkdir(exist_ok=True)

    def flush(turn: int) -> Spent:
        path = folder / f"{os.getpid()}"
        began = time.perf_counter()
        with open(path, "wb") as stream:
            for start in range(0, size, BLOCK):
                stream.write(block[: size - start])
            stream.flush()
            os.fsync(stream.fileno())
        waited = time.perf_counter() - began
        path.unlink()
        return waited, waited, None

    return flush


def _slowest(spent: Spent) -> Spent:
    """The times of the process that took longest, which the others wait for."""
    waited, complete, step = (_over_processes(-1.0 if seconds is None else seconds) for seconds in spent)
    return waited, complete, None if step < 0 else step


def _over_processes(seconds: float) -> float:
    import torch.distributed as dist

    longest = torch.tensor(seconds, dtype=torch.float64)
    dist.all_reduce(longest, dist.ReduceOp.MAX)
    return longest.item()


def _remove(folder: Path) -> None:
    import torch.distributed as dist

    if dist.get_rank() == 0:
        shutil.rmtree(folder)
    dist.barrier()


def _median(seconds: tuple[float | None, ...]) -> float | None:
    known = [one for one in seconds if one is not None]
    return median(known) if known else None


def _config(work: Work) -> dict[str, Any]:
    sizes = {"hidden_size": work.hidden_size, "intermediate_size": 4 * work.hidden_size}
    heads = {"num_attention_heads": 8, "num_hidden_layers": work.layers, "vocab_size": work.vocabulary}
    return {"model_type": "llama", **sizes, **heads, "max_position_embeddings": TOKENS, "tie_word_embeddings": False}


def _architecture(work: Work) -> Architecture:
    return architecture_from_config(_config(work), "the benchmark's model")


def _run(output: Path, *, background: bool) -> RunSettings:
    content = {
        "output": str(output),
        "precision": "fp32",
        "model": {"config": "unused"},
        "layout": {"data_parallel": PROCESSES, "zero_stage": 1},
        "batch": {"sequence_length": TOKENS, "micro_batch_size": 1, "global_batch_size": PROCESSES},
        "schedule": {"train_steps": 1, "learning_rate": RATE},
        "data": {"train": [{"prefix": "unused"}]},
        "checkpoint": {"interval": 1, "background": background},
        "deepspeed": str(ROOT / "ds_configs/deepspeed/fp32_cpu.json"),
    }
    return parse_settings(content, RunSettings, "bench_saving")


def _summary(work: Work, found: Mapping[str, Any]) -> dict[str, Any]:
    waits = {name: times["waits_seconds"] for name, times in found["spent"].items()}
    return {
        "machine": machine(torch.device("cpu")) | {"threads": THREADS},
        "work": asdict(work),
        "parameters": _architecture(work).num_parameters,
        **found,
        "at_once_vs_deepspeed": waits[AT_ONCE] / waits[DEEPSPEED],
        "background_vs_at_once": waits[BACKGROUND] / waits[AT_ONCE],
        "background_vs_copy": waits[BACKGROUND] / waits[COPY],
    }


def _rows(summary: Mapping[str, Any]) -> list[tuple[str, ...]]:
    return [
        (
            name,
            f"{times['waits_seconds']:.2f}",
            f"{summary['bytes'] / times['waits_seconds'] / 1e9:.2f}",
            f"{times['complete_seconds']:.2f}",
            "" if times["step_seconds"] is None else f"{times['step_seconds']:.2f}",
        )
        for name, times in summary["spent"].items()
    ]


def _sentences(summary: Mapping[str, Any]) -> list[str]:
    return [
        f"the checkpoint: {summary['bytes'] / 1e9:.2f} GB of {summary['parameters'] / 1e6:.1f} million parameters",
        f"saved at once: {summary['at_once_vs_deepspeed']:.2f} times as long as DeepSpeed's save_checkpoint, which neither "
        "flushes nor hashes",
        f"in the background: training waits {summary['background_vs_at_once']:.2f} times as long as for a save at once, "
        f"{summary['background_vs_copy']:.2f} times as long as the copy takes; a step takes {summary['step_seconds']:.2f} s "
        "while nothing is saved",
    ]


if __name__ == "__main__":
    main()
