"""Time and memory of decoder layers, dense and with experts, and of AdamW's step, under each kernel setting of the run file."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import torch
import typer

from incr_ds.arch.architecture import architecture_from_config, read_config
from incr_ds.bench.measure import WARM_UP, machine, milliseconds, pass_memory
from incr_ds.bench.results import ResultTable, write_results
from incr_ds.cli.command import command, console, print_json
from incr_ds.cli.options import Json
from incr_ds.config.fields import parse_settings
from incr_ds.config.training import RunSettings
from incr_ds.errors import ConfigError, IncrError
from incr_ds.model.attention import check_attention
from incr_ds.model.layers import LayerFactory
from incr_ds.model.liger import use_liger
from incr_ds.model.plain import LanguageModel
from incr_ds.model.tensor_parallel import TensorRanks
from incr_ds.model.weights import FreshWeights
from incr_ds.sharding.expert_products import grouped_experts
from incr_ds.train.optimizer import build_adamw

HEADINGS = ("measured", "setting", "ms", "extra GB")
# What is measured, and the run file's settings that it is measured under; the first of each kind is the default.
VARIANTS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "sdpa": ("layers", {}),
    "cudnn": ("layers", {"model": {"attention": "cudnn"}}),
    "liger": ("layers", {"model": {"layer_kernels": "liger"}}),
    "cudnn-liger": ("layers", {"model": {"attention": "cudnn", "layer_kernels": "liger"}}),
    "grouped": ("layers of experts", {"model": {"experts": "grouped"}}),
    "eager": ("layers of experts", {"model": {"experts": "eager"}}),
    "torch": ("AdamW step", {}),
    "deepspeed": ("AdamW step", {"optimizer": {"implementation": "deepspeed"}}),
}
SIZES = {
    "cuda": {"hidden_size": 2048, "num_attention_heads": 32, "num_key_value_heads": 8},
    "cpu": {"hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2},
}
# Of each token's FLOPs, experts have as many as a dense layer's FFN has: 8 of 64 experts of an eighth of its width.
DENSE = {"model_type": "llama"}
MIXTURE: Mapping[str, Any] = {
    "model_type": "qwen3_moe",
    "num_experts": 64,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
}


@dataclass(frozen=True)
class Work:
    """Sizes of the measured work."""

    config: Path | None
    layers: int
    batch: int
    sequence_length: int
    repeats: int


@command
def main(
    output: Annotated[Path, typer.Option(help="Folder for layers.json and layers.md.")],
    config: Annotated[
        Path | None, typer.Option(help="Hugging Face config.json; default: a Llama of 1B's width.")
    ] = None,
    layers: Annotated[int, typer.Option(min=1, help="Decoder layers.")] = 4,
    batch: Annotated[int, typer.Option(min=1, help="Samples.")] = 2,
    sequence_length: Annotated[int, typer.Option(min=1, help="Tokens per sample.")] = 4096,
    repeats: Annotated[int, typer.Option(min=1, help="Timed passes.")] = 20,
    only: Annotated[list[str] | None, typer.Option(help="These variants.")] = None,
    json: Json = False,
) -> None:
    """Measure each setting in a process of its own, since Liger changes transformers for a whole process."""
    unknown = [name for name in only or [] if name not in VARIANTS]
    if unknown:
        raise ConfigError(f"--only {', '.join(unknown)}: unknown; the variants are {', '.join(VARIANTS)}")
    work = Work(config, layers, batch, sequence_length, repeats)
    with ProcessPoolExecutor(1, mp_context=get_context("spawn"), max_tasks_per_child=1) as fresh:
        found = [fresh.submit(measure, name, work).result() for name in only or VARIANTS]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    summary = {"machine": machine(device), "work": asdict(work) | {"config": str(config)}, "measurements": found}
    table = ResultTable("decoder layers forward and backward; optimizer step", HEADINGS, [*map(_cells, found)])
    heading = "Decoder layers forward and backward, and the optimizer's step"
    write_results(output / "layers", heading, summary, table)
    if json:
        print_json(summary)
        return
    console.print(table.on_console())


def measure(name: str, work: Work) -> dict[str, Any]:
    """Median milliseconds and extra bytes of variant ``name`` on this machine: CUDA in bf16, else the CPU in fp32."""
    what, sections = VARIANTS[name]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    run = _run(sections)
    try:
        step = (_optimizer_step if what == "AdamW step" else _layers_step)(run, work, device)
    except IncrError as error:
        return {"measured": what, "setting": name, "absent": str(error)}
    extra, _ = pass_memory(step, device)
    for _ in range(WARM_UP):
        step()
    times = [milliseconds(step, device) for _ in range(work.repeats)]
    return {"measured": what, "setting": name, "milliseconds": median(times), "extra_bytes": extra}


def _run(sections: Mapping[str, Any]) -> RunSettings:
    content: dict[str, Any] = {
        "output": "unused",
        "model": {"config": "unused"},
        "batch": {"sequence_length": 1, "micro_batch_size": 1, "global_batch_size": 1},
        "schedule": {"train_steps": 1, "learning_rate": 1e-4},
        "data": {"train": [{"prefix": "unused"}]},
        "checkpoint": {"interval": 1},
    }
    for section, values in sections.items():
        content[section] = content.get(section, {}) | values
    return parse_settings(content, RunSettings, "bench_layers")


def _model(run: RunSettings, work: Work, device: torch.device, dtype: torch.dtype) -> LanguageModel:
    if work.config is not None:
        config, where = dict(read_config(work.config)), str(work.config)
    else:
        config, where = _default_config(run, device), "the default"
    config = config | {"num_hidden_layers": work.layers, "max_position_embeddings": work.sequence_length}
    architecture = architecture_from_config(config, where)
    check_attention(run.model.attention, device)
    grouped_experts(run.model.experts, architecture, 1, dtype.itemsize)  # refuses what has no experts
    if run.model.layer_kernels == "liger":
        use_liger(architecture.family.model_type, device)
    alone, weights = TensorRanks(None, 0, 1), FreshWeights(architecture, 0)
    factory = LayerFactory(architecture, alone, weights, dtype, device, run.model.attention, experts=run.model.experts)
    return LanguageModel(factory, range(1, work.layers + 1))


def _default_config(run: RunSettings, device: torch.device) -> dict[str, Any]:
    """A Llama, or a mixture with the same FLOPs per token if ``run`` says how experts are multiplied."""
    sizes = SIZES[device.type]
    ffn = 4 * sizes["hidden_size"]
    if run.model.experts == "auto":
        return {**DENSE, **sizes, "vocab_size": 64, "intermediate_size": ffn}
    width = ffn // MIXTURE["num_experts_per_tok"]
    return {**MIXTURE, **sizes, "vocab_size": 64, "intermediate_size": ffn, "moe_intermediate_size": width}


def _layers_step(run: RunSettings, work: Work, device: torch.device) -> Callable[[], int]:
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model = _model(run, work, device, dtype)
    width: int = model.get_submodule("model.layers.0").hidden_size  # type: ignore[assignment]
    stream = torch.randn(work.batch, work.sequence_length, width, device=device, dtype=dtype, requires_grad=True)

    def step() -> int:
        model.hidden_states(stream).sum().backward()
        for parameter in (stream, *model.parameters()):
            parameter.grad = None
        return 0

    return step


def _optimizer_step(run: RunSettings, work: Work, device: torch.device) -> Callable[[], int]:
    parameters = list(_model(run, work, device, torch.float32).parameters())
    for parameter in parameters:
        parameter.grad = torch.full_like(parameter, 1e-3)
    optimizer = build_adamw([{"params": parameters, "weight_decay": run.optimizer.weight_decay}], run, device)

    def step() -> int:
        optimizer.step()
        return 0

    return step


def _cells(found: Mapping[str, Any]) -> tuple[str, ...]:
    if "absent" in found:
        return found["measured"], found["setting"], found["absent"], ""
    extra = "" if found["extra_bytes"] is None else f"{found['extra_bytes'] / 1e9:.2f}"
    return found["measured"], found["setting"], f"{found['milliseconds']:.2f}", extra


if __name__ == "__main__":
    main()
