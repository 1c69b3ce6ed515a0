"""Reads the layout of a DeepSpeed checkpoint from its file names."""

from __future__ import annotations

from pathlib import Path

from incr_ds.checkpoint.deepspeed.names import tag_files
from incr_ds.config.layout import ParallelLayout
from incr_ds.errors import CheckpointError, LayoutError


def check_checkpoint_layout(folder: Path, layout: ParallelLayout) -> None:
    """Raise CheckpointError if ``folder`` is not a DeepSpeed checkpoint, LayoutError if its layout is not ``layout``."""
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such checkpoint folder")
    found = checkpoint_layout([path.name for path in folder.iterdir()], str(folder))
    expected = {
        "tensor_parallel": layout.tensor_parallel,
        "pipeline_parallel": layout.pipeline_parallel,
        "data_parallel": layout.data_parallel if layout.zero_stage else found["data_parallel"],
        "zero_format": _zero_format(layout.zero_stage),
    }
    differing = [f"{key} {found[key]} (this run: {expected[key]})" for key in expected if found[key] != expected[key]]
    if differing:
        raise LayoutError(
            f"{folder}: written with another layout: {', '.join(differing)}. Set the layout of the run file to the "
            "checkpoint's, or rewrite the checkpoint in this layout with tools/grow_checkpoint.py."
        )


def checkpoint_layout(names: list[str], where: str) -> dict[str, int | str]:
    """Find degrees of parallelism and the ZeRO format ("none", "1 or 2", "3") from the file names of one tag.

    Without ZeRO the files do not show the data-parallel degree, and 1 is returned for it.
    """
    found = tag_files(names)
    if not found.models and not found.zero_3_models:
        raise CheckpointError(
            f"{where}: contains no mp_rank_*_model_states.pt; expected a checkpoint that DeepSpeed or "
            "tools/grow_checkpoint.py wrote"
        )
    model_ranks = len(found.models or {rank for rank, _ in found.zero_3_models})
    tensor = found.tensor_ranks or model_ranks
    return {
        "tensor_parallel": tensor,
        "pipeline_parallel": model_ranks // tensor if found.layers else 1,
        "data_parallel": max(1, len({data for _, data in found.optimizers})),
        "zero_format": _zero_format(3 if found.zero_3_models else int(bool(found.optimizers))),
    }


def _zero_format(stage: int) -> str:
    return {0: "none", 3: "3"}.get(stage, "1 or 2")
