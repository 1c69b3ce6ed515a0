"""The optimizer's parameter groups on a rank: which parameters share a group, and in which order."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from incr_ds.arch.architecture import Architecture
from incr_ds.arch.multipliers import UNCHANGED, Multipliers
from incr_ds.arch.tensors import TensorSpec
from incr_ds.config.layout import ParallelLayout
from incr_ds.errors import ConfigError, LayoutError
from incr_ds.sharding.blocks import RankParameter
from incr_ds.sharding.placement import rank_parameters, stage_layers


def optimizer_groups(
    shards: tuple[RankParameter, ...],
    multipliers: Mapping[str, Multipliers] | None = None,
    at_least: int = 1,
    apart: Collection[str] = (),
) -> tuple[tuple[RankParameter, ...], ...]:
    """Optimizer parameter groups of one rank: weights that decay, then norms and biases that do not.

    Tensors with the same ``multipliers`` share a group, and groups are ordered by multipliers. Those that are set ``apart``
    for Muon have groups of their own, which DeepSpeed orders by shape, the largest first. Groups are halved until there are
    ``at_least`` that many. ZeRO's flat buffers follow this order, so an engine and the checkpoint that it loads need the same
    arguments. Raises LayoutError if there are fewer tensors than groups.
    """
    found: dict[tuple[bool, bool, Multipliers], list[RankParameter]] = {}
    for shard in shards:
        own = group_multipliers((shard,), multipliers)
        found.setdefault((not shard.tensor.is_matrix, shard.tensor.name in apart, own), []).append(shard)
    groups = [tuple(found[key]) for key in sorted(found)]
    if len(shards) < at_least:
        raise LayoutError(
            f"layout: a pipeline stage trains {len(shards)} tensors, and the optimizer has {at_least} parameter groups "
            "on another stage; DeepSpeed needs the same number on every stage. Train more of its layers, use fewer stages, or "
            "set optimizer.multipliers: none."
        )
    while len(groups) < at_least:
        largest = max(range(len(groups)), key=lambda index: len(groups[index]))
        middle = len(groups[largest]) // 2
        groups[largest : largest + 1] = [groups[largest][:middle], groups[largest][middle:]]
    return tuple(_by_shape(group) if group[0].tensor.name in apart else group for group in groups)


def _by_shape(group: tuple[RankParameter, ...]) -> tuple[RankParameter, ...]:
    return tuple(sorted(group, key=lambda shard: shard.shape, reverse=True))


def group_count(
    architecture: Architecture,
    layout: ParallelLayout,
    multipliers: Mapping[str, Multipliers] | None,
    frozen: Collection[str] = (),
    apart: Collection[str] = (),
) -> int:
    """Number of parameter groups on every rank of a layout.

    DeepSpeed sums gradient norms over pipeline stages group by group, so all stages get as many groups as the stage that
    needs the most. Raises LayoutError if all tensors of a stage are ``frozen``.
    """
    counts = []
    for stage, layers in enumerate(stage_layers(architecture.num_layers, layout)):
        trained = trained_shards(rank_parameters(architecture, layout, stage, 0), frozen)
        if not trained:
            decoder = [layer - 1 for layer in layers if 1 <= layer <= architecture.num_layers]
            raise LayoutError(
                f"model.freeze: pipeline stage {stage} of {layout.pipeline_parallel}, with decoder layers {decoder[0]} to "
                f"{decoder[-1]}, has nothing to train, and DeepSpeed's pipeline needs a gradient on every stage; train one of "
                "its tensors (a norm is enough), use fewer stages, or pipeline_parallel: 1."
            )
        counts.append(len(optimizer_groups(trained, multipliers, apart=apart)))
    return max(counts)


def set_apart(optimizer: str, architecture: Architecture) -> frozenset[str]:
    """The tensors that ``optimizer`` (optimizer.name) does not train by AdamW: for muon, matrices of decoder layers.

    Raises ConfigError for muon and a mixture.
    """
    if optimizer == "muon" and architecture.family.joined:
        raise ConfigError(
            f"optimizer.name: muon does not go with {architecture.family.model_type}, whose experts share one parameter of "
            "three dimensions; set adamw."
        )
    return frozenset(spec.name for spec in architecture.stored if is_apart(optimizer, spec))


def is_apart(optimizer: str, tensor: TensorSpec) -> bool:
    """Whether ``tensor`` is one of them."""
    return optimizer == "muon" and tensor.layer is not None and tensor.is_matrix


def trained_shards(shards: tuple[RankParameter, ...], frozen: Collection[str]) -> tuple[RankParameter, ...]:
    """The ``shards`` whose tensors are not ``frozen``. Raises ConfigError if some tensors of a parameter are."""
    for shard in shards:
        names = [block.name for block in shard.blocks]
        still = [name for name in names if name in frozen]
        if still and len(still) < len(names):
            moving = next(name for name in names if name not in frozen)
            raise ConfigError(
                f"model.freeze: {still[0]} is frozen and {moving} is not, but one parameter holds all experts of a layer; "
                "freeze all of them or none."
            )
    return tuple(shard for shard in shards if shard.tensor.name not in frozen)


def group_multipliers(group: tuple[RankParameter, ...], multipliers: Mapping[str, Multipliers] | None) -> Multipliers:
    """The multipliers of one group of ``optimizer_groups``.

    Raises LayoutError if tensors that are in one parameter differ: a layer's experts train alike.
    """
    known = multipliers or {}
    first = group[0]
    found = {known.get(name, UNCHANGED) for name in (first.tensor.name, *(block.name for block in first.blocks))}
    if len(found) > 1:
        raise LayoutError(
            f"{first.parameter}: its experts differ in learning-rate multipliers, and one parameter has one; "
            "set optimizer.multipliers: none."
        )
    return found.pop()
