"""Check a checkpoint's files, that its shards belong together, and its logits against the source that it was grown from."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from incr_ds.cli.command import command, console, loading, print_json
from incr_ds.cli.options import Config, Json, Tag, Trust
from incr_ds.offline.tolerance import EXACT, ROUNDING_FACTOR

if TYPE_CHECKING:
    from incr_ds.offline.compare import Comparison


@command
def main(
    folder: Annotated[Path, typer.Argument(help="Checkpoint to verify.")],
    tag: Tag = None,
    config: Config = None,
    against: Annotated[Path | None, typer.Option(help="Source checkpoint with the expected logits.")] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            help="Megatron data set prefix; default: sentences if a folder has a tokenizer, otherwise random tokens."
        ),
    ] = None,
    samples: Annotated[int | None, typer.Option(min=1, help="Samples; default 8, or all sentences if fewer.")] = None,
    length: Annotated[
        int | None, typer.Option(min=2, help="Tokens per sample; default 128, or all learned positions if fewer.")
    ] = None,
    tolerance: Annotated[
        float | None,
        typer.Option(
            min=0.0,
            help=f"Largest relative logit difference; default {EXACT}, or {ROUNDING_FACTOR:g} times the effect of rounding on "
            "the source if FOLDER has 16-bit weights. If given, it also applies to growths that are not function-preserving.",
        ),
    ] = None,
    trust: Trust = False,
    json: Json = False,
) -> None:
    """Check FOLDER. Exit codes: 0 if it is sound (and computes what --against computes, if its recipe is
    function-preserving), 2 if a file is wrong, 1 if logits differ or cannot be compared."""
    with loading():
        from incr_ds.checkpoint.integrity import check_folder, open_described
        from incr_ds.checkpoint.opening import open_source
        from incr_ds.cli.run_folder import located
        from incr_ds.offline.compare import compare, usual_tokens
    folder = located(folder)
    manifest = check_folder(folder)
    checkpoint = open_source(folder, tag, config, trust=trust)
    if manifest is None:
        check_folder(folder, checkpoint)
    checked = sum(1 for _ in checkpoint.self_check())
    report: dict[str, Any] = {"files": len(manifest["files"]) if manifest else None, "tensors": checked}
    if against:
        against = located(against)
        source = open_described(against, trust=trust)
        tokens = usual_tokens(source, [against, folder], data, samples, length, trust=trust)
        preserving = bool(manifest["facts"].get("function_preserving", True)) if manifest else True
        report |= judged(compare(source, checkpoint, tokens.batches), preserving, tolerance) | {"origin": tokens.origin}
    if json:
        print_json(report)
    else:
        _print(report, folder)
    sys.exit(0 if report.get("passed", True) else 1)


def judged(comparison: Comparison, function_preserving: bool, tolerance: float | None) -> dict[str, Any]:
    """The comparison, the allowed difference, whether it passes, and a verdict in words.

    A function-preserving growth must keep the logits. Others pass, unless they exceed a given ``tolerance``.
    """
    allowed = comparison.allowed if tolerance is None else tolerance
    within = comparison.problem is None and comparison.relative_difference <= allowed
    passed = within or (comparison.problem is None and not function_preserving and tolerance is None)
    if comparison.problem is not None:
        verdict = f"LOGITS CANNOT BE COMPARED: {comparison.problem}"
    elif within:
        verdict = "logits kept"
    elif function_preserving:
        verdict = "LOGITS DIFFER: this is not the source's function"
    else:
        change = f"loss {comparison.source_loss:.4g} -> {comparison.target_loss:.4g}"
        verdict = f"not function-preserving by its recipe: {change}"
    facts = {
        "function_preserving": function_preserving,
        "tolerance": allowed,
        "stated": tolerance is not None,
        "passed": passed,
        "verdict": verdict,
    }
    return asdict(comparison) | facts


def _print(report: dict[str, Any], folder: Path) -> None:
    from incr_ds.checkpoint.publish import MANIFEST

    files = report["files"]
    console.print(
        f"{folder}: {files} files as in {MANIFEST}"
        if files
        else f"{folder}: no {MANIFEST}; the checksums of torch.save in its .pt and .bin files are right"
    )
    console.print(f"shards belong together: {report['tensors']} tensors checked")
    if "verdict" in report:
        console.print(
            f"loss {report['source_loss']:.6f} (source) and {report['target_loss']:.6f} over {report['tokens']} tokens "
            f"{report['origin']}"
        )
        if report["problem"] is None:
            console.print(
                f"largest logit difference {report['max_difference']:.3g}, {report['relative_difference']:.3g} of the largest "
                f"logit; allowed {report['tolerance']:.3g}: {_why(report)}"
            )
        console.print(report["verdict"])


def _why(report: dict[str, Any]) -> str:
    if report["stated"]:
        return "--tolerance"
    if report["rounding"] is None:
        return "rounding of fp32 arithmetic"
    return f"{ROUNDING_FACTOR:g} times the effect of rounding its weights to 16 bits on the source, {report['rounding']:.3g}"
