"""Which rank holds which slice of which tensor, under which parameter name. Pure: no process, no file, no device.

Training modules and checkpoint writers follow the same declaration, so a grown checkpoint matches the engine that loads
it. Ranks are numbered as in DeepSpeed's PipeModelDataParallelTopology: pipe outermost, then data, then tensor.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import accumulate

from incr_ds.arch.architecture import Architecture
from incr_ds.arch.tensors import TensorSpec
from incr_ds.config.layout import ParallelLayout
from incr_ds.errors import LayoutError
from incr_ds.sharding.blocks import Block, RankParameter
from incr_ds.sharding.joined import JoinedParameter, joined_parameters
from incr_ds.sharding.megatron_modules import CUT_AXES

SHARDED_AXES = CUT_AXES
WHOLE_UNITS = ("heads", "kv_heads")
TIED_KEY = "embedding"


def split_bounds(total: int, parts: int) -> tuple[tuple[int, int], ...]:
    """Split ``total`` into nearly even parts, larger ones first (DeepSpeed's rule): split_bounds(5, 2) -> (0,3),(3,5)."""
    base, extra = divmod(total, parts)
    stops = list(accumulate(base + (part < extra) for part in range(parts)))
    return tuple(zip([0, *stops[:-1]], stops, strict=True))


def check_layout(architecture: Architecture, layout: ParallelLayout, where: str = "layout") -> None:
    """Raise LayoutError if the model cannot be cut this way. It lists every problem and what would work.

    ``where`` names what states the layout.
    """
    problems, family = [], architecture.family
    if not family.training_supported and layout.tensor_parallel * layout.pipeline_parallel > 1:
        raise LayoutError(
            f"{where}: {family.model_type} does not support tensor or pipeline parallelism here; use tensor_parallel: 1 "
            "and pipeline_parallel: 1, or format: huggingface."
        )
    if family.uncut and layout.tensor_parallel > 1:
        problems.append(
            f"  tensor_parallel {layout.tensor_parallel}: {family.model_type} is not cut over tensor ranks: {family.uncut}; "
            "use pipeline_parallel, or data_parallel with zero_stage 3"
        )
    for axis in filter(family.axes.__contains__, WHOLE_UNITS):
        size, field = architecture.sizes[axis], family.axes[axis]
        if size % layout.tensor_parallel:
            fitting = [degree for degree in range(1, size + 1) if size % degree == 0]
            problems.append(
                f"  tensor_parallel {layout.tensor_parallel}: {field} {size} does not divide; "
                f"tensor_parallel can be {', '.join(map(str, fitting))}"
            )
    for axis in ("vocab", "ffn"):
        if architecture.sizes[axis] < layout.tensor_parallel:
            problems.append(f"  tensor_parallel {layout.tensor_parallel}: larger than {family.axes[axis]}")
    if architecture.num_layers < layout.pipeline_parallel:
        problems.append(
            f"  pipeline_parallel {layout.pipeline_parallel}: the model has {architecture.num_layers} layers; "
            f"pipeline_parallel can be 1 to {architecture.num_layers}"
        )
    if isinstance(layout.stages, tuple) and sum(layout.stages) != architecture.num_layers:
        problems.append(
            f"  stages {list(layout.stages)}: {sum(layout.stages)} decoder layers, and the model has {architecture.num_layers}"
        )
    if problems:
        raise LayoutError("\n".join([f"{where}: the model cannot be cut this way", *problems]))


def even_stages(num_layers: int, pipeline_parallel: int) -> tuple[int, ...]:
    """Decoder layers of each stage if they are spread evenly."""
    return tuple(stop - start for start, stop in split_bounds(num_layers, pipeline_parallel))


def stage_layers(num_layers: int, layout: ParallelLayout) -> tuple[range, ...]:
    """Pipeline layers of each stage. Layer 0 is the embedding, 1..L the decoder, L+1 the final norm, L+2 the head.

    ``layout.stages`` must be even or a list: launch/balance.py turns balanced into one.
    """
    assert layout.stages != "balanced"
    counts = layout.stages if isinstance(layout.stages, tuple) else even_stages(num_layers, layout.pipeline_parallel)
    starts = [0, *(1 + stop for stop in accumulate(counts[:-1]))]
    return tuple(range(start, stop) for start, stop in zip(starts, [*starts[1:], num_layers + 3], strict=True))


def pipeline_layer(spec: TensorSpec, num_layers: int) -> int:
    """The pipeline layer that owns a tensor."""
    if spec.layer is not None:
        return spec.layer + 1
    return {"embedding": 0, "positions": 0, "final_norm": num_layers + 1, "reader": num_layers + 2}[spec.role]


def layer_local_name(spec: TensorSpec) -> str:
    """Parameter name inside its pipeline layer's module."""
    return f"block.{spec.local_name}" if spec.layer is not None else spec.local_name


def pipeline_name(spec: TensorSpec, architecture: Architecture) -> str:
    """A tensor's parameter in a PipelineModule: ``<pipeline layer>.<local name>``, ``tied_modules.embedding.<local name>`` for
    the modules that are tied."""
    layer = pipeline_layer(spec, architecture.num_layers)
    if architecture.tied and layer == 0:
        return f"tied_modules.{TIED_KEY}.{spec.local_name}"
    return f"{layer}.{layer_local_name(spec)}"


def names_in_pipelines(architecture: Architecture) -> dict[str, str]:
    """The tensor for each name that a pipeline may have for it: its parameter's, and ``<layer>.<name in the layer's file>``.
    The last stage saves a tied embedding once more, in the head's layer."""
    head = architecture.num_layers + 2
    found: dict[str, str] = {}
    for spec in architecture.stored:
        layers = [pipeline_layer(spec, architecture.num_layers)]
        if architecture.tied and spec.role == "embedding":
            layers.append(head)
        found |= {f"{layer}.{layer_local_name(spec)}": spec.name for layer in layers}
        found[pipeline_name(spec, architecture)] = spec.name
    found |= {
        f"{one.layer + 1}.block.{one.local_name}": one.parameter for one in joined_parameters(architecture).values()
    }
    return found


def rank_parameters(
    architecture: Architecture, layout: ParallelLayout, stage: int, tensor_rank: int
) -> tuple[RankParameter, ...]:
    """The parameters of the ranks of (stage, tensor_rank), in the order of their module's ``named_parameters``.

    With pipeline_parallel 1 the module is the Hugging Face one, with its names. Otherwise the names are those of
    ``pipeline_name``, tied ones first. Learned positions are part of the embedding's module on the first stage. Experts'
    tensors are blocks of the parameters that hold all experts of a layer.
    """
    shards = _tensor_parameters(architecture, layout, stage, tensor_rank)
    joined = joined_parameters(architecture).values()
    first = {parameter.members[0].name: parameter for parameter in joined}
    inside = {spec.name for parameter in joined for spec in parameter.members} - set(first)
    kept = [shard for shard in shards if shard.tensor.name not in inside]
    return tuple(
        _join(shard, first[shard.tensor.name], layout, tensor_rank) if shard.tensor.name in first else shard
        for shard in kept
    )


def _tensor_parameters(
    architecture: Architecture, layout: ParallelLayout, stage: int, tensor_rank: int
) -> tuple[RankParameter, ...]:
    """A parameter for each tensor that the ranks hold."""
    if layout.pipeline_parallel == 1:
        return tuple(
            _shard(spec, spec.name, layout, tensor_rank, architecture.num_layers) for spec in architecture.stored
        )
    num_layers = architecture.num_layers
    layers = stage_layers(num_layers, layout)[stage]
    tied, own = [], []
    for spec in sorted(architecture.stored, key=lambda spec: pipeline_layer(spec, num_layers)):
        layer = pipeline_layer(spec, num_layers)
        if architecture.tied and layer == 0:
            if 0 in layers or (num_layers + 2 in layers and spec.role == "embedding"):
                tied.append(_shard(spec, pipeline_name(spec, architecture), layout, tensor_rank, num_layers))
        elif layer in layers:
            own.append(_shard(spec, pipeline_name(spec, architecture), layout, tensor_rank, num_layers))
    return (*tied, *own)


def _join(shard: RankParameter, joined: JoinedParameter, layout: ParallelLayout, tensor_rank: int) -> RankParameter:
    local_name = f"block.{joined.local_name}"
    parameter = f"{shard.pipeline_layer}.{local_name}" if layout.pipeline_parallel > 1 else joined.parameter
    part = joined.part(*split_bounds(joined.size, layout.tensor_parallel)[tensor_rank])
    return replace(
        shard,
        parameter=parameter,
        shape=part.shape,
        blocks=part.blocks,
        local_name=local_name,
        cut=joined.dimension + 1,
        sub_parameters=joined.per_expert,
    )


def sharded_dimension(spec: TensorSpec) -> int | None:
    """The dimension that tensor parallelism cuts, or None if every tensor rank holds the whole tensor."""
    cut = [index for index, dim in enumerate(spec.dims) if dim.outer_axis in SHARDED_AXES]
    return cut[0] if cut else None


def _shard(
    spec: TensorSpec, parameter: str, layout: ParallelLayout, tensor_rank: int, num_layers: int
) -> RankParameter:
    bounds = [(0, size) for size in spec.shape]
    cut = sharded_dimension(spec)
    if cut is not None:
        bounds[cut] = split_bounds(spec.shape[cut], layout.tensor_parallel)[tensor_rank]
    block = Block(spec.name, tuple(bounds))
    return RankParameter(
        parameter, block.shape, (block,), spec, pipeline_layer(spec, num_layers), layer_local_name(spec), cut
    )
