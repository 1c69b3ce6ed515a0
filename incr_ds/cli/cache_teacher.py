"""Write the teacher's most probable entries for every token that a run trains on, so that the run need not run it."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from incr_ds.cli.command import command, console, loading, print_json, progress_bar
from incr_ds.cli.options import Json
from incr_ds.launch.packages import require


class StoredAs(StrEnum):
    """How log-probabilities are stored."""

    fp16 = "fp16"
    fp32 = "fp32"


@command
def main(
    config: Annotated[list[Path], typer.Option(help="Run file with a section distillation. Repeatable.")],
    output: Annotated[Path, typer.Option(help="Cache to write, for distillation.cache in the run file.")],
    top_k: Annotated[int, typer.Option("--top-k", min=1, help="Entries to keep for each token.")] = 64,
    stored: Annotated[StoredAs, typer.Option(help="Format of the log-probabilities.")] = StoredAs.fp16,
    shard_samples: Annotated[
        int | None, typer.Option(min=1, help="Samples in a shard; default: as many as fit 256 MiB.")
    ] = None,
    override: Annotated[list[str] | None, typer.Option("--set", help="key.path=value over the run file.")] = None,
    json: Json = False,
    local_rank: Annotated[int | None, typer.Option("--local_rank", hidden=True)] = None,
) -> None:
    """Run the teacher of a run file over the samples that it teaches. Interrupted, the same command goes on.

    Under torchrun or deepspeed, the processes hold the teacher together, as tensor ranks.
    """
    from incr_ds.config.fields import load_settings
    from incr_ds.config.training import RunSettings

    run = load_settings(config, RunSettings, override)
    require("deepspeed", "megatron.core")
    with loading():
        from incr_ds.train.caching import CacheRequest, join_ranks, write_cache
        from incr_ds.train.distributed import end_processes
        from incr_ds.train.ranks import is_first_rank
    # The deepspeed launcher adds --local_rank to every command. The environment has the same value.
    join_ranks()
    first = is_first_rank()
    request = CacheRequest(run, output, top_k, stored.value, shard_samples)
    with progress_bar(quiet=json or not first) as progress:
        found = write_cache(request, lambda done, total: progress("caching shards", done, total) if progress else None)
    end_processes()
    if not first:
        return
    facts = found.facts
    if json:
        content = facts.model_dump(mode="json")
        print_json(
            {"cache": str(output), "bytes": found.num_bytes, "flops": found.flops, "resumed": found.resumed_shards}
            | {"facts": content}
        )
        return
    if found.resumed_shards:
        console.print(f"{found.resumed_shards} shards of an interrupted command were kept", markup=False)
    console.print(
        f"wrote {output}: {facts.top_k} of {facts.vocabulary:,} entries for {facts.samples:,} samples of "
        f"{facts.sequence_length:,} tokens, {found.num_bytes:,} bytes; the teacher took {found.flops:.3e} FLOPs",
        markup=False,
    )
    console.print(f"distillation.cache: {output} in the run file reads it", markup=False)
