"""Places decoder layers on pipeline stages so that the stage with the most work has as little as possible."""

from __future__ import annotations

from incr_ds.arch.architecture import Architecture
from incr_ds.arch.flops import head_flops_per_token, layer_flops_per_token
from incr_ds.config.training import RunSettings
from incr_ds.sharding.placement import check_layout, even_stages


def placed(run: RunSettings, architecture: Architecture) -> RunSettings:
    """``run`` with the stages of its layout as a list, or as even if they are so.

    Raises LayoutError if the model cannot be cut this way.
    """
    layout, stages = run.layout, run.layout.stages
    if stages == "even":
        return run
    check_layout(architecture, layout)
    counts = _balanced(run, architecture) if stages == "balanced" else stages
    even = even_stages(architecture.num_layers, layout.pipeline_parallel)
    chosen = layout.model_copy(update={"stages": "even" if counts == even else counts})
    return run.model_copy(update={"layout": chosen})


def stage_flops(run: RunSettings, architecture: Architecture) -> tuple[int, ...]:
    """Operations of every pipeline stage for a token, forward and backward, recomputation included.

    The output projection belongs to the last stage. The embedding's lookup and the teacher are not counted.
    """
    stages, depth = run.layout.stages, run.layout.pipeline_parallel
    counts = stages if isinstance(stages, tuple) else even_stages(architecture.num_layers, depth)
    layer, head = _costs(run, architecture)
    return tuple(count * layer + (head if stage == depth - 1 else 0) for stage, count in enumerate(counts))


def _balanced(run: RunSettings, architecture: Architecture) -> tuple[int, ...]:
    """All decoder layers cost the same, so only the number of the last stage's is a choice. Among equals, the most even."""
    depth, total = run.layout.pipeline_parallel, architecture.num_layers
    if depth == 1:
        return (total,)
    layer, head = _costs(run, architecture)

    def largest(last: int) -> int:
        return max(even_stages(total - last, depth - 1)[0] * layer, last * layer + head)

    best = min(range(-(-total // depth), 0, -1), key=largest)
    return (*even_stages(total - best, depth - 1), best)


def _costs(run: RunSettings, architecture: Architecture) -> tuple[int, int]:
    """Operations for a token of one decoder layer, and of the output projection, whose logits are not recomputed."""
    passes = 4 if run.model.activation_checkpointing else 3
    layer = layer_flops_per_token(architecture, run.batch.sequence_length)
    return passes * layer, 3 * head_flops_per_token(architecture)
