"""Check a checkpoint's files, that its shards belong together, and its logits against the source it was grown from."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import torch
import typer

from incr_ds.arch.logical import LogicalCheckpoint
from incr_ds.command import command, console, print_json
from incr_ds.integrity import check_folder, open_described
from incr_ds.source import open_source
from incr_ds.target.commit import MANIFEST
from incr_ds.verify import compare, data_batches, random_batches, usual_length

EXACT, ROUNDED = 1e-4, 2e-2  # relative; the second where weights are stored in 16 bits


@command
def main(
    folder: Annotated[Path, typer.Argument(help="Checkpoint to verify.")],
    tag: Annotated[str | None, typer.Option(help="DeepSpeed tag; default: what `latest` names.")] = None,
    config: Annotated[Path | None, typer.Option(help="Hugging Face config.json, if not in FOLDER.")] = None,
    against: Annotated[Path | None, typer.Option(help="Source checkpoint whose logits should be kept.")] = None,
    data: Annotated[Path | None, typer.Option(help="Megatron data set prefix; default: random tokens.")] = None,
    samples: Annotated[int, typer.Option(min=1)] = 8,
    length: Annotated[
        int | None, typer.Option(min=2, help="Tokens per sample; default 128, or all learned positions if fewer.")
    ] = None,
    tolerance: Annotated[
        float | None,
        typer.Option(
            min=0.0,
            help=f"Largest relative logit difference of an exact growth; default {EXACT}, {ROUNDED} in bf16 or fp16.",
        ),
    ] = None,
    trust: Annotated[bool, typer.Option("--trust", help="Let pickles in the checkpoints run code.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print JSON only.")] = False,
) -> None:
    """Exit with 0 if FOLDER is sound (and computes what --against computes), 2 if a file is wrong, 1 if logits differ."""
    manifest = check_folder(folder)
    checkpoint = open_source(folder, tag, config, trust=trust)
    if manifest is None:
        check_folder(folder, checkpoint)
    checked = sum(1 for _ in checkpoint.self_check())
    report: dict[str, object] = {"files": len(manifest["files"]) if manifest else None, "tensors": checked}
    passed = True
    if against:
        source = open_described(against, trust=trust)
        vocab = source.architecture.sizes["vocab"]
        size = length or usual_length(source)
        batches = data_batches(data, samples, size) if data else random_batches(vocab, samples, size)
        comparison = compare(source, checkpoint, batches)
        exact = bool(manifest["facts"].get("exact", True)) if manifest else True
        allowed = max(_tolerance(source), _tolerance(checkpoint)) if tolerance is None else tolerance
        passed = comparison.relative_difference <= allowed or not exact
        report |= {**asdict(comparison), "exact": exact, "tolerance": allowed, "passed": passed}
    if json:
        print_json(report)
    else:
        _print(report, folder, stated=tolerance is not None)
    sys.exit(0 if passed else 1)


def _tolerance(checkpoint: LogicalCheckpoint) -> float:
    """What rounding of the stored weights leaves of the logits (docs/exactness.md)."""
    first = checkpoint.read(checkpoint.architecture.stored[0].name, rows=slice(0, 1))
    return ROUNDED if first.dtype in (torch.bfloat16, torch.float16) else EXACT


def _print(report: dict[str, object], folder: Path, *, stated: bool) -> None:
    files = report["files"]
    console.print(
        f"{folder}: {files} files as in {MANIFEST}"
        if files
        else f"{folder}: no {MANIFEST}; of .pt and .bin files, the checksums that torch.save left are right"
    )
    console.print(f"shards belong together: {report['tensors']} tensors checked")
    if "source_loss" in report:
        console.print(
            f"loss {report['source_loss']:.6f} (source) and {report['target_loss']:.6f} over {report['tokens']} tokens; largest "
            f"logit difference {report['max_difference']:.3g}, {report['relative_difference']:.3g} of the largest logit"
        )
        if report["tolerance"] == ROUNDED and not stated:
            console.print(f"tolerance {report['tolerance']}: weights are stored in 16 bits")
        console.print("logits kept" if report["passed"] else "LOGITS DIFFER: this is not the source's function")


if __name__ == "__main__":
    main()
