"""Estimates the memory of activations, of the loss and of the teacher on a rank. Pure arithmetic.

A layer's activations are what PyTorch's autograd keeps of transformers' layers: the input of every matrix product, what
norms, attention and the activation function need for their gradients, and nothing twice.
"""

from __future__ import annotations

from dataclasses import dataclass

from incr_ds.arch.architecture import Architecture
from incr_ds.config.layout import ParallelLayout
from incr_ds.config.training import RunSettings
from incr_ds.launch.model_states import ELEMENT, FP32
from incr_ds.losses.planner import LossShape, default_budget, plan_loss, plan_recompute
from incr_ds.sharding.placement import rank_parameters

_TORCH_ROWS_TEMPORARIES = 7  # incr_ds.kernels.torch_rows; the fused kernels have none


@dataclass(frozen=True)
class Shape:
    """What one micro-batch is on a rank: its tokens, sequence length, bytes of an element, and how attention runs."""

    tokens: int
    sequence_length: int
    element: int
    tensor_parallel: int
    stores_scores: bool


def shape_of(run: RunSettings) -> Shape:
    """The shape of the run's micro-batches."""
    batch = run.batch
    return Shape(
        tokens=batch.micro_batch_size * batch.sequence_length // batch.sequence_parallel,
        sequence_length=batch.sequence_length,
        element=ELEMENT[run.precision],
        tensor_parallel=run.layout.tensor_parallel,
        stores_scores=run.model.attention == "eager",
    )


def layer_activations(architecture: Architecture, shape: Shape) -> int:
    """Bytes that one decoder layer keeps for its backward pass."""
    hidden, element = architecture.sizes["hidden"], shape.element
    specs = [spec for spec in architecture.stored if spec.layer == 0]
    scales = [spec for spec in specs if spec.dims[0].use in ("scale", "post") and not spec.is_matrix]
    before = sum(spec.role == "norm" for spec in scales)
    norms = before + sum(spec.role == "post_norm" for spec in scales)
    inside = any(spec.role == "inner_norm" for spec in scales)
    # RMSNorm keeps its input in fp32 and the normalized values; LayerNorm keeps its input.
    per_norm = FP32 + element if architecture.family.norm == "rms" else element
    whole = hidden * ((before or 2) * element + norms * per_norm)
    return shape.tokens * (
        whole
        + _attention(architecture, shape, per_norm if inside else 0)
        + _ffn(architecture, shape)
        + _routing(architecture, shape)
    )


def stage_activations(
    architecture: Architecture, shape: Shape, *, layers: int, in_flight: int, recompute: bool, is_last: bool
) -> int:
    """Bytes that a pipeline stage of ``layers`` decoder layers keeps for ``in_flight`` micro-batches.

    With ``recompute`` it keeps the input of every layer, and during the backward pass what one layer keeps.
    """
    hidden, one = architecture.sizes["hidden"], layer_activations(architecture, shape)
    ends = shape.tokens * hidden * (FP32 + 2 * shape.element) if is_last else 0
    inputs = shape.tokens * hidden * shape.element
    if recompute:
        return in_flight * (layers * inputs + ends) + (one if layers else 0)
    return in_flight * (layers * one + ends)


def loss_workspace(architecture: Architecture, run: RunSettings, shape: Shape, teacher: Architecture | None) -> int:
    """Bytes of logits, and of the gradients of hidden states and output head, while the loss is computed on a GPU."""
    width, columns = architecture.sizes["hidden"], -(-architecture.sizes["vocab"] // shape.tensor_parallel)
    plain, recompute = run.loss.backend == "torch", run.loss.backend == "recompute"
    problem = LossShape(
        tokens=shape.tokens,
        vocabulary=columns,
        student_width=width,
        teacher_width=0 if teacher is None else teacher.sizes["hidden"],
        logits_bytes=FP32 if plain else shape.element,
        copy_bytes=shape.element if plain and shape.element < FP32 else 0,
        temporaries=_TORCH_ROWS_TEMPORARIES * plain + (architecture.logit_softcap is not None),
    )
    budget = default_budget(True, recompute=recompute)
    if recompute:
        return plan_recompute(problem, budget, accumulates=shape.element < FP32).buffer_bytes + columns * width * FP32
    plan = plan_loss(problem, budget)
    rounded_later = plan.chunks > 1
    head = columns * width * (FP32 if rounded_later else shape.element)
    return plan.buffer_bytes + head + shape.tokens * width * (FP32 if shape.tensor_parallel > 1 else shape.element)


def teacher_bytes(teacher: Architecture, layout: ParallelLayout, shape: Shape, stage: int, tensor_rank: int) -> int:
    """Bytes of the teacher's weights on a rank, and of one of its layers while it runs forward."""
    plain = layout.model_copy(update={"data_parallel": 1, "zero_stage": 1})
    weights = sum(one.numel for one in rank_parameters(teacher, plain, stage, tensor_rank)) * shape.element
    return weights + layer_activations(teacher, shape)


def _attention(architecture: Architecture, shape: Shape, per_norm: int) -> int:
    """Bytes per token: queries, keys, values, the output and the softmax's denominators, or eager attention's scores."""
    sizes, element = architecture.sizes, shape.element
    heads = -(-sizes["heads"] // shape.tensor_parallel)
    kv_heads = -(-sizes["kv_heads"] // shape.tensor_parallel)
    width = sizes["head_dim"]
    scores = heads * FP32
    if shape.stores_scores:  # the softmax in fp32, and rounded
        scores = heads * shape.sequence_length * (FP32 + (element if element < FP32 else 0))
    return 2 * (heads + kv_heads) * width * element + (heads + kv_heads) * width * per_norm + scores


def _ffn(architecture: Architecture, shape: Shape) -> int:
    """Bytes per token: what the first matrices give, the activation function's result, and the product of a gated FFN."""
    widest = architecture.sizes["ffn"]
    first = sum(
        dim.size // widest
        for spec in architecture.stored
        if spec.layer == 0 and spec.is_matrix and architecture.is_active(spec)
        for dim in spec.dims
        if dim.use == "out" and set(dim.named_axes) == {"ffn"}
    )
    return 2 * first * -(-widest // shape.tensor_parallel) * shape.element


def _routing(architecture: Architecture, shape: Shape) -> int:
    """Bytes per token that a mixture adds: the router's probabilities, and each chosen expert's input and output."""
    picked = architecture.active_experts
    if not picked:
        return 0
    return FP32 * architecture.sizes["experts"] + 2 * picked * architecture.sizes["hidden"] * shape.element
