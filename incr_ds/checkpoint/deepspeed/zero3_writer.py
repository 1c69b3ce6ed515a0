"""Writes DeepSpeed's native layout under ZeRO-3, in which every parameter is cut over the data-parallel ranks.

Format facts were read in DeepSpeed 0.19.8 (runtime/zero/stage3.py, runtime/engine.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from incr_ds.checkpoint.base import State
from incr_ds.checkpoint.deepspeed.names import model_file, optimizer_file
from incr_ds.checkpoint.deepspeed.writer import FORMAT_VERSION, ModelFile, NativeTarget
from incr_ds.checkpoint.streaming import Part, StreamedTensor, TargetFile, block_parts
from incr_ds.checkpoint.torch_file.write import ArchiveFile, LossScaler
from incr_ds.sharding.blocks import RankParameter
from incr_ds.sharding.optimizer_groups import optimizer_groups
from incr_ds.sharding.partition_sizes import share_bounds, share_size

Groups = tuple[tuple[RankParameter, ...], ...]


def zero3_files(target: NativeTarget, sub_group_size: int) -> tuple[TargetFile, ...]:
    """The model file and the optimizer file of every rank."""
    ranks = [
        (model_rank, data_rank)
        for model_rank in range(target.layout.tensor_parallel)
        for data_rank in range(target.layout.data_parallel)
    ]
    models: list[TargetFile] = [ShareModelFile(target, *rank, sub_group_size) for rank in ranks]
    return (*models, *(ShareOptimizerFile(target, *rank, sub_group_size) for rank in ranks))


def sub_groups(target: NativeTarget, model_rank: int, sub_group_size: int) -> list[Groups]:
    """Split each parameter group of a rank into sub-groups. One is full once its shares reach ``sub_group_size`` elements."""
    return [
        _cut(group, target.layout.data_parallel, sub_group_size)
        for group in optimizer_groups(target.shards(model_rank))
    ]


def _cut(group: tuple[RankParameter, ...], num_data: int, sub_group_size: int) -> Groups:
    shares = [share_size(shard.numel, num_data) for shard in group]
    if sub_group_size >= sum(shares):
        return (group,)
    found: list[tuple[RankParameter, ...]] = []
    held: list[RankParameter] = []
    size = 0
    for shard, share in zip(group, shares, strict=True):
        held.append(shard)
        size += share
        if size >= sub_group_size or shard is group[-1]:
            found.append(tuple(held))
            held, size = [], 0
    return tuple(found)


@dataclass(frozen=True)
class ShareModelFile(ArchiveFile):
    """zero_pp_rank_D_mp_rank_XX_model_states.pt: metadata, and an empty placeholder for every weight."""

    target: NativeTarget
    model_rank: int
    data_rank: int
    sub_group_size: int

    @property
    def path(self) -> str:
        """Path inside the target folder."""
        return f"{self.target.tag}/{model_file(self.model_rank, self.data_rank)}"

    @property
    def tensors(self) -> tuple[StreamedTensor, ...]:
        """Empty, since the optimizer files hold the weights."""
        return ()

    def content(self) -> dict[str, Any]:
        """The metadata, the shapes of the parameters by sub-group, and empty placeholders."""
        content = ModelFile(self.target, self.model_rank).metadata()
        groups = [group for groups in sub_groups(self.target, self.model_rank, self.sub_group_size) for group in groups]
        names = [shard.parameter for group in groups for shard in group] + list(content["shared_params"])
        content["module"] = {name: torch.empty(0, dtype=self.target.dtype) for name in names}
        content["param_shapes"] = [{shard.parameter: torch.Size(shard.shape) for shard in group} for group in groups]
        return content


@dataclass(frozen=True)
class ShareOptimizerFile(ArchiveFile):
    """[bf16_]zero_pp_rank_D_mp_rank_XX_optim_states.pt: one rank's share of every master and moment."""

    target: NativeTarget
    model_rank: int
    data_rank: int
    sub_group_size: int

    @property
    def path(self) -> str:
        """Path inside the target folder."""
        return f"{self.target.tag}/{optimizer_file(self.model_rank, self.data_rank, self.target.dtype_name)}"

    def content(self) -> dict[str, Any]:
        """The file's content. This loader, unlike those of other stages, reads the loss scale from the file."""
        masters: list[StreamedTensor] = []
        moments: dict[int, dict[str, Any]] = {}
        hyperparameters = []
        for groups in sub_groups(self.target, self.model_rank, self.sub_group_size):
            first = len(masters)
            for group in groups:
                moments[len(masters)] = {
                    "step": torch.tensor(float(self.target.step)),
                    "exp_avg": self._shares(group, "exp_avg"),
                    "exp_avg_sq": self._shares(group, "exp_avg_sq"),
                }
                masters.append(self._shares(group, "weight"))
            kept = self.target.groups[0 if groups[0][0].tensor.is_matrix else -1]
            hyperparameters.append({**kept, "params": list(range(first, len(masters)))})
        state = {
            "zero_stage": 3,
            "loss_scaler": LossScaler(),
            "dynamic_loss_scale": False,
            "overflow": False,
            "partition_count": self.target.layout.data_parallel,
            "optimizer_state_dict": {"state": moments, "param_groups": hyperparameters},
            "fp32_flat_groups": masters,
        }
        return {"optimizer_state_dict": state, "ds_config": {}, "ds_version": FORMAT_VERSION}

    def _shares(self, group: tuple[RankParameter, ...], state: State) -> StreamedTensor:
        parts: list[Part] = []
        num_data, length = self.target.layout.data_parallel, 0
        for shard in group:
            share = share_size(shard.numel, num_data)
            first, stop = share_bounds(shard.numel, num_data, self.data_rank)
            parts += block_parts(shard.blocks, shard.shape, state, first, stop)
            if stop - first < share:
                parts.append(Part("", state, (), 0, share - (stop - first)))
            length += share
        return StreamedTensor((length,), torch.float32, tuple(parts))
