"""Which rank holds which slice: cuts, names and order, checked by joining the slices to whole tensors."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from incr_ds.arch.multipliers import Multipliers
from incr_ds.config.layout import ParallelLayout
from incr_ds.errors import LayoutError
from incr_ds.sharding.optimizer_groups import group_count, group_multipliers, optimizer_groups
from incr_ds.sharding.placement import check_layout, rank_parameters, sharded_dimension, split_bounds, stage_layers
from incr_ds.testing.pico import pico_architecture


def test_split_bounds_gives_larger_parts_first():
    assert split_bounds(250, 4) == ((0, 63), (63, 126), (126, 188), (188, 250))
    assert split_bounds(2, 3) == ((0, 1), (1, 2), (2, 2))


@given(st.integers(0, 300), st.integers(1, 17))
def test_split_bounds_is_a_partition(total, parts):
    bounds = split_bounds(total, parts)
    assert len(bounds) == parts and bounds[0][0] == 0 and bounds[-1][1] == total
    assert all(before[1] == after[0] for before, after in zip(bounds, bounds[1:], strict=False))
    sizes = [stop - start for start, stop in bounds]
    assert max(sizes) - min(sizes) <= 1 and sizes == sorted(sizes, reverse=True)


def test_stage_layers():
    assert stage_layers(3, ParallelLayout()) == (range(0, 6),)
    # 0 embedding, 1-2 | 3 decoder, 4 final norm, 5 head
    assert stage_layers(3, ParallelLayout(pipeline_parallel=2)) == (range(0, 3), range(3, 6))
    assert stage_layers(3, ParallelLayout(pipeline_parallel=2, stages=(1, 2))) == (range(0, 2), range(2, 6))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("tensor", "pipeline"), [(1, 1), (3, 1), (1, 3), (3, 2)])
def test_every_element_is_held_as_often_as_it_should(tied: bool, tensor, pipeline):
    """Cut tensors once over the tensor ranks, others once on each, a tied embedding on the first and the last stage."""
    architecture = pico_architecture("qwen3", tied=tied)
    layout = ParallelLayout(tensor_parallel=tensor, pipeline_parallel=pipeline)
    held = {spec.name: np.zeros(spec.shape, int) for spec in architecture.stored}
    for stage in range(pipeline):
        for rank in range(tensor):
            shards = rank_parameters(architecture, layout, stage, rank)
            assert len({shard.parameter for shard in shards}) == len(shards)
            for shard in shards:
                held[shard.tensor.name][tuple(slice(*part) for part in shard.bounds)] += 1
    for spec in architecture.stored:
        copies = 1 if sharded_dimension(spec) is not None else tensor
        if tied and spec.role == "embedding" and pipeline > 1:
            copies *= 2
        assert (held[spec.name] == copies).all(), spec.name


def test_pipeline_names():
    layout = ParallelLayout(pipeline_parallel=2)
    architecture = pico_architecture(tied=True)
    first, last = ([s.parameter for s in rank_parameters(architecture, layout, stage, 0)] for stage in (0, 1))
    assert first[:2] == ["tied_modules.embedding.embed_tokens.weight", "1.block.self_attn.q_proj.weight"]
    assert last[0] == first[0] and last[-1] == "4.norm.weight"
    untied = rank_parameters(pico_architecture(), layout, 1, 0)
    assert untied[-1].parameter == "5.lm_head.weight" and untied[-1].shape == untied[-1].tensor.shape


def test_optimizer_groups_keep_the_order():
    shards = rank_parameters(pico_architecture("qwen3"), ParallelLayout(), 0, 0)
    decay, rest = optimizer_groups(shards)
    assert {len(shard.shape) for shard in decay} == {2} and {len(shard.shape) for shard in rest} == {1}
    assert [s for s in shards if s in decay] == list(decay) and len(decay) + len(rest) == len(shards)


def test_impossible_layouts_are_listed_together():
    layout = ParallelLayout(tensor_parallel=4, pipeline_parallel=5)
    with pytest.raises(LayoutError, match=r"the model cannot be cut this way") as caught:
        check_layout(pico_architecture(), layout)
    for line in (
        "tensor_parallel 4: num_attention_heads 6 does not divide; tensor_parallel can be 1, 2, 3, 6",
        "tensor_parallel 4: num_key_value_heads 3 does not divide; tensor_parallel can be 1, 3",
        "pipeline_parallel 5: the model has 3 layers; pipeline_parallel can be 1 to 3",
    ):
        assert line in str(caught.value)
    with pytest.raises(LayoutError, match=r"tensor_parallel 60: larger than intermediate_size"):
        check_layout(pico_architecture(), ParallelLayout(tensor_parallel=60))


def test_every_stage_has_as_many_optimizer_groups():
    """DeepSpeed sums norms over stages group by group; the stage with fewer kinds of tensors halves some groups."""
    architecture = pico_architecture(num_hidden_layers=4)
    layout = ParallelLayout(pipeline_parallel=2)
    multipliers = {
        "model.layers.0.mlp.up_proj.weight": Multipliers(0.5, 0.5, 2.0),
        "lm_head.weight": Multipliers(0.1, 1.0, 10.0),
    }
    multipliers |= {"model.layers.1.mlp.up_proj.weight": Multipliers(0.25, 0.5, 4.0)}
    count = group_count(architecture, layout, multipliers)
    assert count == 4
    for stage in range(2):
        shards = rank_parameters(architecture, layout, stage, 0)
        groups = optimizer_groups(shards, multipliers, count)
        assert len(groups) == 4 and sorted(map(id, sum(groups, ()))) == sorted(map(id, shards))
        for group in groups:
            assert len({(shard.tensor.is_matrix, group_multipliers((shard,), multipliers)) for shard in group}) == 1
    with pytest.raises(
        LayoutError, match="a pipeline stage trains 3 tensors, and the optimizer has 4 parameter groups"
    ):
        optimizer_groups(shards[:3], multipliers, 4)
