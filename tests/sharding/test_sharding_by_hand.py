"""Which rank holds which numbers, written out: tensor and pipeline ranks, and ZeRO's partitions."""

import torch
from tiny import DOWN, UP, tiny_architecture

from incr_ds.arch.architecture import architecture_from_config
from incr_ds.checkpoint.deepspeed.partition import (
    FlatShards,
    contiguous_parameters,
    scattered_parameters,
)
from incr_ds.config.layout import ParallelLayout
from incr_ds.sharding.megatron_modules import MEGATRON_CORE, module_parameters, modules_of
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


def test_a_gpt2_s_query_key_and_value_go_to_megatron_s_ranks_head_by_head():
    """c_attn is [in 4, out 12]: the queries of two heads of size 2, then keys, then values. Rank 1 has the second head.

    Megatron-core's matrix is [out, in], so columns of c_attn are rows there: 0 to 2 the query, then the key and the value.
    """
    config = {"model_type": "gpt2", "n_embd": 4, "n_head": 2, "n_layer": 1, "vocab_size": 8, "n_positions": 4}
    architecture, modules = architecture_from_config(config, "tiny"), modules_of(MEGATRON_CORE)
    held = {item.local_name: item for item in module_parameters(modules, architecture, 2, 1, 8)[1]}
    fused = held["self_attention.linear_qkv.weight"]
    assert (fused.shape, fused.cut) == ((6, 4), 0)
    assert [block.bounds[1] for block in fused.blocks] == [(2, 4), (6, 8), (10, 12)]
    assert [(block.row, block.stored_shape) for block in fused.blocks] == [(0, (2, 4)), (2, (2, 4)), (4, (2, 4))]
    assert [block.bounds for block in held["self_attention.linear_qkv.bias"].blocks] == [
        ((2, 4),),
        ((6, 8),),
        ((10, 12),),
    ]
    down = held["mlp.linear_fc2.weight"]  # c_proj is [in 16, out 4]: its second half of rows are columns there
    assert (down.shape, down.cut, down.bounds) == ((4, 8), 1, ((8, 16), (0, 4)))


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
