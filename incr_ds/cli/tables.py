"""Plans and checkpoints as readable tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich import box
from rich.table import Table
from rich.tree import Tree

from incr_ds.arch.architecture import Architecture
from incr_ds.arch.tensors import TensorSpec
from incr_ds.checkpoint.base import LogicalCheckpoint
from incr_ds.checkpoint.difference import Difference
from incr_ds.growth.axis import FRESH, AxisGrowth
from incr_ds.growth.suggest import TOKENS_PER_PARAMETER, Suggestion
from incr_ds.offline.plan import PlannedGrowth
from incr_ds.study.choices import Choice

_LAYER = "LAYER"
SIZES = ("hidden", "layers", "heads", "kv_heads", "head_dim", "ffn", "experts", "vocab")


def growth_table(planned: PlannedGrowth) -> Table:
    """What grows, from which size to which, and how."""
    plan = planned.plan
    table = Table(
        title=f"{plan.target.family.model_type}: {'' if plan.function_preserving else 'not '}function-preserving growth",
        title_justify="left",
        box=box.SIMPLE_HEAD,
    )
    for heading in ("", "source", "target", "how"):
        table.add_column(heading, justify="left" if heading in ("", "how") else "right")
    for axis in _stated_sizes(plan.target):
        old, new = plan.source.sizes.get(axis), plan.target.sizes[axis]
        table.add_row(
            plan.target.family.axes[axis], "none" if old is None else f"{old:,}", f"{new:,}", _how(planned, axis)
        )
    table.add_row("parameters", f"{plan.source.num_parameters:,}", f"{plan.target.num_parameters:,}", _ratio(planned))
    if (active := plan.target.active_parameters) != plan.target.num_parameters:
        ratio = active / plan.source.active_parameters
        table.add_row("active per token", f"{plan.source.active_parameters:,}", f"{active:,}", f"x {ratio:.2f}")
    table.add_row("layout", _layout_text(planned.source), _target_layout_text(planned), f"{planned.num_bytes:,} bytes")
    table.add_row("dtype", planned.source.facts.dtype or "", *_dtype_texts(planned))
    table.add_row("moments", ", ".join(planned.source.facts.states[1:]) or "none", "", plan.recipe.optimizer)
    return table


def _how(planned: PlannedGrowth, axis: str) -> str:
    experts = planned.plan.experts
    if axis == "layers":
        return _depth_text(planned)
    if experts is not None and axis in ("ffn", "experts"):
        return {"ffn": "of each expert", "experts": experts.method}[axis]
    return _axis_text(planned.plan.axes[axis])


def choice_table(found: Sequence[Choice], flops: float, speed: float | None) -> Table:
    """The ways to spend ``flops``, the predicted best first. ``speed`` is FLOPs per second of a GPU, for hours."""
    hours = "" if speed is None else f" ({flops / speed / 3600.0:,.0f} GPU hours)"
    table = Table(title=f"{flops:.3g} FLOPs{hours}", title_justify="left", box=box.SIMPLE_HEAD)
    for heading in ("", "parameters", "tokens", "predicted loss", "low to high"):
        table.add_column(heading, justify="left" if not heading else "right")
    for choice in found:
        sizes = "\n".join(f"{stage.model.parameters:,.0f}" for stage in choice.stages)
        tokens = "\n".join(f"{stage.tokens:,.0f}" for stage in choice.stages)
        band = "" if choice.saving is None else f"{choice.low:.3f} to {choice.high:.3f}"
        table.add_row(choice.name, sizes, tokens, f"{choice.loss:.3f}", band)
    return table


def suggestion_table(found: Sequence[Suggestion]) -> Table:
    """Suggested targets to choose from."""
    caption = (
        f"tokens: {TOKENS_PER_PARAMETER} per parameter. In publications, growth pays up to about here; later, gains shrink "
        "(arXiv 2411.07340)."
    )
    table = Table(box=box.SIMPLE_HEAD, caption=caption, caption_justify="left")
    for heading in (
        "",
        "target",
        "parameters",
        "times",
        "hidden size per layer",
        "FLOPs per token",
        "bytes per rank",
        "tokens",
        "notes",
    ):
        table.add_column(heading, justify="left" if heading in ("target", "notes") else "right")
    for row, item in enumerate(found, start=1):
        target = ", ".join(f"{field}: {size}" for field, size in item.target.items())
        numbers = (
            f"{item.parameters:,}",
            f"{item.ratio:.2f}",
            f"{item.shape:.0f}",
            f"{item.flops_per_token:.2e}",
            f"{item.bytes_per_rank:,}",
            f"{item.gain_tokens:.2e}",
        )
        table.add_row(str(row), f"{{{target}}}", *numbers, "; ".join(item.warnings))
    return table


def checkpoint_table(checkpoint: LogicalCheckpoint) -> Table:
    """A checkpoint's family, sizes, layout and state."""
    facts, architecture = checkpoint.facts, checkpoint.architecture
    table = Table(title=str(facts.path), title_justify="left", show_header=False, box=box.SIMPLE)
    rows = {
        "kind": facts.kind,
        "family": architecture.family.model_type + (", tied embeddings" if architecture.tied else ""),
        "parameters": f"{architecture.num_parameters:,}",
        **_active(architecture),
        **{architecture.family.axes[axis]: f"{architecture.sizes[axis]:,}" for axis in _stated_sizes(architecture)},
        **{f"  {name}": f"{size:,}" for name, size in component_sizes(architecture).items()},
        "layout": _layout_text(checkpoint),
        **({"layers per stage": ", ".join(map(str, facts.stages))} if facts.stages else {}),
        "states": ", ".join(facts.states) + (f" ({facts.no_moments})" if facts.no_moments else ""),
        **({"trained by Muon": f"{len(facts.momentum)} tensors, with momentum_buffer alone"} if facts.momentum else {}),
        "optimizer step": "none" if facts.step is None else str(facts.step),
        **({} if facts.dtype is None else {"dtype": facts.dtype}),
        **({"frozen": ", ".join(facts.frozen)} if facts.frozen else {}),
        **{name: str(value) for name, value in facts.recorded.known.items()},
        "files": f"{len(facts.files)}, {sum(path.stat().st_size for path in facts.files):,} bytes",
    }
    for name, value in rows.items():
        table.add_row(name, value)
    return table


def _active(architecture: Architecture) -> dict[str, str]:
    active = architecture.active_parameters
    return {} if active == architecture.num_parameters else {"active per token": f"{active:,}"}


def tensor_tree(architecture: Architecture) -> Tree:
    """Every tensor by name and shape. Tensors that are alike in several layers appear once, with the layers' numbers."""
    alike: dict[tuple[str, ...], list[TensorSpec]] = {}
    for spec in architecture.tensors:
        alike.setdefault((_without_layer(spec), str(spec.shape), str(spec.tied_to)), []).append(spec)
    tree = Tree("tensors")
    branches: dict[str, Tree] = {"": tree}
    for specs in alike.values():
        *folders, last = _without_layer(specs[0]).replace(_LAYER, _layers_text(specs)).split(".")
        at = ""
        for folder in folders:
            below = f"{at}.{folder}"
            if below not in branches:
                branches[below] = branches[at].add(folder)
            at = below
        tied = f", tied to {specs[0].tied_to}" if specs[0].tied_to else ""
        branches[at].add(f"{last} {list(specs[0].shape)}{tied}", highlight=False)
    return tree


def _without_layer(spec: TensorSpec) -> str:
    return spec.name if spec.layer is None else spec.name.replace(f".{spec.layer}.", f".{_LAYER}.", 1)


def _layers_text(specs: Sequence[TensorSpec]) -> str:
    layers = [spec.layer for spec in specs]
    return str(layers[0]) if len(layers) == 1 else f"{layers[0]} to {layers[-1]}"


def _stated_sizes(architecture: Architecture) -> list[str]:
    return [axis for axis in SIZES if axis in architecture.family.axes]


def component_sizes(architecture: Architecture) -> dict[str, int]:
    """Number of parameters of each kind of component: embedding, attention, feed-forward, norms, head."""
    sizes: dict[str, int] = {}
    for spec in architecture.stored:
        sizes[_component(spec)] = sizes.get(_component(spec), 0) + spec.numel
    return sizes


def difference_table(found: Sequence[Difference]) -> Table:
    """The differences between two checkpoints."""
    table = Table(box=box.SIMPLE_HEAD)
    for heading in ("tensor", "state", "differs in", "elements", "by up to"):
        table.add_column(heading, justify="right" if heading in ("elements", "by up to") else "left")
    for item in found:
        counts = (f"{item.elements:,}", f"{item.largest:.6g}") if item.elements else ("", "")
        table.add_row(item.name, item.state, item.what, *counts)
    return table


def _component(spec: TensorSpec) -> str:
    if "norm" in spec.role:
        return "norms"
    if spec.layer is None:
        return "embedding" if spec.role in ("embedding", "positions") else "head"
    return "attention" if "att" in spec.local_name else "feed-forward"


def _dtype_texts(planned: PlannedGrowth) -> tuple[str, str]:
    """The dtype of the target's weights, and the reason for it."""
    asked, name = planned.plan.recipe.layout.dtype, str(planned.dtype).removeprefix("torch.")
    if asked != "auto":
        return name, "from the recipe"
    if planned.plan.recipe.layout.format == "huggingface":
        return name, "auto: Hugging Face folders keep fp32"
    return name, "auto: the source's; fp32 masters beside it"


def _axis_text(axis: AxisGrowth) -> str:
    if axis.is_identity:
        return "same"
    fresh = sum(index == FRESH for index in axis.index)
    return axis.method + (f", {fresh} new" if fresh else f", up to {max(axis.copies)} copies")


def _depth_text(planned: PlannedGrowth) -> str:
    new = sum(layer.is_new for layer in planned.plan.layers)
    if [layer.layer for layer in planned.plan.layers] == list(range(planned.plan.source.num_layers)):
        return "same"
    depth = planned.plan.recipe.depth
    return f"{depth.method}, {new} new ({depth.new}): {' '.join(str(layer.layer) for layer in planned.plan.layers)}"


def _ratio(planned: PlannedGrowth) -> str:
    return f"x {planned.plan.target.num_parameters / planned.plan.source.num_parameters:.2f}"


def _layout_text(checkpoint: LogicalCheckpoint) -> str:
    return _degrees(checkpoint.facts.layout) or "whole"


def _degrees(layout: Mapping[str, int]) -> str:
    short = {"tensor_parallel": "tp", "pipeline_parallel": "pp", "data_parallel": "dp", "zero_stage": "zero"}
    return " ".join(f"{name} {layout[key]}" for key, name in short.items() if key in layout)


def _target_layout_text(planned: PlannedGrowth) -> str:
    layout = planned.plan.recipe.layout
    return _degrees(layout.model_dump()) if layout.format == "deepspeed" else layout.format
