"""What to train for a number of FLOPs or GPU hours: grow, train from scratch, or train the small model further."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from incr_ds.cli.command import command, console, loading, print_json
from incr_ds.cli.options import Config, Json, Tag, Trust
from incr_ds.errors import ConfigError

if TYPE_CHECKING:
    from incr_ds.study.choices import Choice, Model

SECONDS_PER_HOUR = 3600.0
DEFAULT_MFU = 0.4
HOW = (
    "The measured growth: copies of the layers (depth: {method: stack, new: copy}) and optimizer: reset-new, from a checkpoint "
    "whose learning rate has not decayed, at half of the tokens. docs/progressive.md does it in one run."
)


@command
def main(
    source: Annotated[
        Path | None, typer.Option(help="Checkpoint or Hugging Face folder to grow; default: none.")
    ] = None,
    source_tokens: Annotated[
        float | None, typer.Option(help="Tokens that SOURCE was trained on, if the folder does not state them.")
    ] = None,
    target: Annotated[Path | None, typer.Option(help="config.json of the model to reach; default: chosen.")] = None,
    flops: Annotated[float | None, typer.Option(help="Training FLOPs to spend, like 1e20.")] = None,
    gpu_hours: Annotated[float | None, typer.Option(help="GPU hours to spend, instead of --flops.")] = None,
    gpu: Annotated[str | None, typer.Option(help="For --gpu-hours: the GPU's name, like H100.")] = None,
    mfu: Annotated[
        float | None, typer.Option(help="For --gpu-hours: the share of the GPU's peak that is assumed; default 0.4.")
    ] = None,
    sequence_length: Annotated[int, typer.Option(min=1, help="Tokens per sample, for the FLOPs of attention.")] = 2048,
    tag: Tag = None,
    config: Config = None,
    trust: Trust = False,
    json: Json = False,
) -> None:
    """Compare the ways to spend FLOPS. All losses and savings are predictions; their basis is printed with them."""
    if (flops is None) == (gpu_hours is None):
        raise ConfigError("--flops and --gpu-hours: state one of the two, what you want to spend.")
    if gpu_hours is None and (gpu is not None or mfu is not None):
        raise ConfigError("--gpu and --mfu: they have no effect without --gpu-hours.")
    if source is None and source_tokens is not None:
        raise ConfigError("--source-tokens: has no effect without --source.")
    speed = None if gpu_hours is None else _speed(gpu, DEFAULT_MFU if mfu is None else mfu)
    spend = flops if flops is not None else (gpu_hours or 0.0) * SECONDS_PER_HOUR * (speed or 0.0)
    if not 0.0 < spend < 1e40:
        raise ConfigError(f"{'--flops' if flops is not None else '--gpu-hours'}: expected a number above 0.")
    with loading():
        from incr_ds.study.choices import choices
    small = None if source is None else _source(source, source_tokens, sequence_length, (tag, config, trust))
    found = choices(spend, small, None if target is None else _model(target, sequence_length))
    if json:
        print_json({"flops": spend, "choices": [_as_dict(choice) for choice in found]})
        return
    _print(found, spend, speed)


def _speed(gpu: str | None, mfu: float) -> float:
    """FLOPs per second of one GPU."""
    from incr_ds.train.flops import KNOWN_PEAKS

    peak = next((value for name, value in KNOWN_PEAKS.items() if gpu and gpu.upper() in name.upper()), None)
    if peak is None:
        raise ConfigError(
            f"--gpu {gpu or 'is missing'}: expected one of {', '.join(KNOWN_PEAKS)}; or state --flops instead of hours."
        )
    if not 0.0 < mfu <= 1.0:
        raise ConfigError(f"--mfu {mfu:g}: expected a share of the peak, above 0 and at most 1.")
    return peak * mfu


def _source(
    folder: Path, tokens: float | None, sequence_length: int, opening: tuple[str | None, Path | None, bool]
) -> Model:
    from incr_ds.arch.flops import training_flops_per_token
    from incr_ds.checkpoint.integrity import open_described
    from incr_ds.cli.run_folder import located
    from incr_ds.study.choices import Model

    tag, config, trust = opening
    checkpoint = open_described(located(folder), tag, config, trust=trust)
    seen = tokens if tokens is not None else checkpoint.facts.recorded.tokens
    if seen is not None and not seen > 0:
        raise ConfigError(f"{folder}: trained on {seen:g} tokens: expected a number above 0; correct --source-tokens.")
    if seen is None:
        raise ConfigError(
            f"{folder}: it does not state on how many tokens it was trained; add --source-tokens, like 300e9."
        )
    architecture = checkpoint.architecture
    return Model(architecture.num_parameters, training_flops_per_token(architecture, sequence_length), seen)


def _model(path: Path, sequence_length: int) -> Model:
    from incr_ds.arch.architecture import saved_architecture
    from incr_ds.arch.flops import training_flops_per_token
    from incr_ds.study.choices import Model

    architecture = saved_architecture(path)
    return Model(architecture.num_parameters, training_flops_per_token(architecture, sequence_length))


def _as_dict(choice: Choice) -> dict[str, Any]:
    return {**asdict(choice), "spent": choice.spent}


def _print(found: tuple[Choice, ...], spend: float, speed: float | None) -> None:
    from incr_ds.cli.tables import choice_table
    from incr_ds.study.forecast import LAW, evidence

    known = evidence()
    console.print(choice_table(found, spend, speed))
    grown = next(choice for choice in found if choice.saving is not None)
    saving, equivalent = grown.saving, grown.equivalent
    assert saving is not None and equivalent is not None
    scratch = f"training the same model from scratch to that loss would cost {equivalent:.3g} FLOPs"
    console.print(
        f"{grown.name}: {scratch}, {equivalent / spend:.2f} times as much. Predicted ratio with the source's training counted: "
        f"{saving.ratio:.2f} ({saving.low:.2f} to {saving.high:.2f}), {saving.basis}."
    )
    if not known.tokens_per_parameter[0] <= (length := grown.tokens_per_parameter) <= known.tokens_per_parameter[1]:
        low, high = known.tokens_per_parameter
        console.print(
            f"The ratio was measured at {low:g} to {high:g} tokens per parameter; these are {length:.3g}: less is known."
        )
    console.print(HOW)
    console.print(f"Losses are predictions by {LAW}, in nats per token of its data: compare them with each other only.")
