"""Which rank holds which numbers, written out: tensor and pipeline ranks, and ZeRO's partitions."""

import torch
from tiny import DOWN, UP, tiny_architecture

from incr_ds.checkpoint.deepspeed.partition import (
    FlatShards,
    contiguous_parameters,
    scattered_parameters,
)
from incr_ds.config.layout import ParallelLayout
from incr_ds.sharding.partition_sizes import partition_size
from incr_ds.sharding.placement import rank_parameters


def test_two_tensor_ranks_cut_up_proj_by_rows_and_down_proj_by_columns():
    """Rank 0 has the first neuron, rank 1 the second: rows of up_proj [2, 3], columns of down_proj [3, 2]."""
    layout = ParallelLayout(tensor_parallel=2)
    held = [
        {shard.tensor.name: shard.bounds for shard in rank_parameters(tiny_architecture(), layout, 0, rank)}
        for rank in (0, 1)
    ]
    assert [rank[UP] for rank in held] == [((0, 1), (0, 3)), ((1, 2), (0, 3))]
    assert [rank[DOWN] for rank in held] == [((0, 3), (0, 1)), ((0, 3), (1, 2))]
    assert [rank["model.norm.weight"] for rank in held] == [((0, 3),), ((0, 3),)], "both hold the whole norm"


def test_two_pipeline_stages_have_a_layer_each():
    layout = ParallelLayout(pipeline_parallel=2)
    names = [
        {shard.tensor.name for shard in rank_parameters(tiny_architecture(layers=2), layout, stage, 0)}
        for stage in (0, 1)
    ]
    assert {"model.embed_tokens.weight", UP} <= names[0] and {UP.replace("0", "1"), "lm_head.weight"} <= names[1]
    assert not names[0] & names[1]


def test_zero_1_cuts_five_elements_into_partitions_of_four():
    """A partition has an even number of elements. Zeros fill the last one."""
    assert partition_size(5, num_ranks=2) == 4
    partitions = [torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([5.0, 0.0, 0.0, 0.0])]
    shards = FlatShards(
        contiguous_parameters([{"w": (5,)}], [[0]], [4]), {"weight": [[partition] for partition in partitions]}
    )
    assert shards.read("w", "weight", 0, 5).tolist() == [1, 2, 3, 4, 5]
    assert [gap.tolist() for gap in shards.padding("weight")] == [[0, 0, 0]]


def test_zero_3_cuts_each_parameter_into_equal_shares():
    """Five elements over two ranks: three and two, and a zero. The next parameter follows on both ranks."""
    ranks = [torch.tensor([1.0, 2.0, 3.0, 6.0]), torch.tensor([4.0, 5.0, 0.0, 7.0])]
    shards = FlatShards(scattered_parameters([{"w": (5,), "b": (2,)}], 2), {"weight": [[flat] for flat in ranks]})
    assert shards.read("w", "weight", 0, 5).tolist() == [1, 2, 3, 4, 5]
    assert shards.read("b", "weight", 0, 2).tolist() == [6, 7]
