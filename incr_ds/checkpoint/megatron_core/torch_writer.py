"""Writes Megatron-LM's older checkpoints (--ckpt-format torch): a file for each tensor rank of each pipeline stage.

Format facts were read in Megatron-LM (megatron/training/checkpointing.py, 2026-08-22), in megatron-core 0.12 to 0.19
(optimizer/) and in Transformer Engine 2.18 (pytorch/optimizers/fused_adam.py, whose loader stops at any state of a parameter
that is not one of its own, such as torch's step).
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from incr_ds.checkpoint.base import STATES, State
from incr_ds.checkpoint.megatron_core.rank_files import DISTRIBUTED_FILE, FILE, rank_folder
from incr_ds.checkpoint.megatron_core.rank_optimizer import IN_BUFFER
from incr_ds.checkpoint.megatron_core.target import MegatronCoreTarget
from incr_ds.checkpoint.streaming import Part, StreamedTensor, TargetFile, block_parts, parameter_tensor
from incr_ds.checkpoint.torch_file.write import ArchiveFile
from incr_ds.sharding.blocks import RankParameter
from incr_ds.sharding.megatron_modules import MEGATRON_CORE, check_modules, check_stages, modules_of
from incr_ds.sharding.megatron_ranks import ALIGNED, GPTModelRank, buffer_starts, decays


@dataclass(frozen=True, eq=False)
class _RankFile(ArchiveFile):
    """A file in the folder of one rank."""

    target: MegatronCoreTarget
    model: GPTModelRank
    file: str

    @property
    def path(self) -> str:
        """Path inside the target folder."""
        folder = rank_folder(self.model.tensor_rank, self.model.stage, self.target.layout.pipeline_parallel)
        return f"{self.target.folder}/{folder}/{self.file}"


class RankStateFile(_RankFile):
    """model_optim_rng.pt: the model, the run, and the optimizer unless that is distributed."""

    def content(self) -> dict[str, Any]:
        """The file's content."""
        target, layout = self.target, self.target.layout
        own = {
            "transformer_impl": layout.transformer_impl,
            "moe_grouped_gemm": False,
            "use_distributed_optimizer": layout.distributed_optimizer,
        }
        weights = {name: _tensor(held, "weight", target.dtype) for name, held in self.model.parameters.items()}
        content = {
            "args": Namespace(**target.arguments(FILE) | own),
            "checkpoint_version": 3.0,
            "iteration": target.iteration if target.has_moments else 0,
            "num_floating_point_operations_so_far": 0,
            "model": {**weights, **dict.fromkeys(self.model.extra_states)},
        }
        if not target.has_moments:
            return content
        return {**content, "optimizer": self._optimizer(weights), "opt_param_scheduler": target.scheduler()}

    def _optimizer(self, weights: Mapping[str, StreamedTensor]) -> dict[str, Any]:
        """The state of the distributed optimizer without tensors, of the one with fp32 masters, or of the one in fp32."""
        groups = self._groups(weights)
        described = [self.target.group(decays=kind) | {"is_expert_parallel": False} for kind in groups]
        if self.target.layout.distributed_optimizer:
            return {"optimizer": {"param_groups": described}}
        numbers = {name: number for number, name in enumerate(name for group in groups.values() for name in group)}
        for group, names in zip(described, groups.values(), strict=True):
            group["params"] = [numbers[name] for name in names]
        states = {number: self._moments(name) for name, number in numbers.items()}
        inner = {"state": states, "param_groups": described}
        if self.target.dtype == torch.float32:
            return inner
        masters = [[_tensor(self.model.parameters[name], "weight") for name in group] for group in groups.values()]
        return {"optimizer": inner, "fp32_from_fp16_params": masters}

    def _groups(self, weights: Mapping[str, StreamedTensor]) -> Mapping[bool, Sequence[str]]:
        """The parameters that decay, and those that do not, in the order of the optimizer's groups.

        From Megatron-core 0.16 on, those that decay come first. Before, the group of a rank's first parameter does. The
        distributed optimizer of 0.13 and before takes groups by their places, later ones by their settings.
        """
        of = {name: decays(name, weight.shape) for name, weight in weights.items()}
        order = dict.fromkeys(of.values()) if self.target.layout.distributed_optimizer else (True, False)
        return {kind: [name for name in weights if of[name] == kind] for kind in order}

    def _moments(self, name: str) -> dict[str, StreamedTensor]:
        return {state: _tensor(self.model.parameters[name], state) for state in STATES[1:]}


class RankBufferFile(_RankFile):
    """distrib_optim.pt: the state of the distributed optimizer, as one buffer of masters, and one of each moment."""

    def content(self) -> dict[Any, Any]:
        """The file's content. The buffer is Megatron-core's only one, for parameters and gradients of these dtypes."""
        parameters, dtype = self.model.parameters, self.target.dtype
        sizes = {name: held.numel for name, held in parameters.items()}
        starts, total = buffer_starts(sizes, ALIGNED, self.model.shared)
        order = sorted(parameters, key=starts.__getitem__)
        buffers: dict[str, Any] = {
            key: StreamedTensor(
                (total,), torch.float32, tuple(_buffer_parts([(starts[n], parameters[n]) for n in order], state))
            )
            for state, key in IN_BUFFER.items()
        }
        gradients = torch.float16 if dtype == torch.float16 else torch.float32
        return {"buckets_coalesced": True, 0: {(dtype, gradients): buffers | {"numel_unpadded": total}}}


def _tensor(held: RankParameter, state: State, dtype: torch.dtype = torch.float32) -> StreamedTensor:
    return parameter_tensor(held.blocks, held.shape, state, dtype)


def _buffer_parts(placed: Sequence[tuple[int, RankParameter]], state: State) -> Iterator[Part]:
    """The parameters one after the other, each from its start on, with zeros between them."""
    end = 0
    for start, held in placed:
        if start > end:
            yield Part("", state, ((0, 1), (0, start - end)), 0, start - end)
        yield from block_parts(held.blocks, held.shape, state, 0, held.numel)
        end = start + held.numel


def megatron_torch_files(target: MegatronCoreTarget, where: str) -> tuple[TargetFile, ...]:
    """Every file of a checkpoint. Raises LayoutError if Megatron-core does not have this model or cannot cut it so."""
    layout = target.layout
    check_modules(modules_of(MEGATRON_CORE), target.architecture, layout.tensor_parallel, where)
    check_stages(target.architecture, layout.pipeline_parallel, where)
    target.arguments(where)
    degrees = layout.tensor_parallel, layout.pipeline_parallel
    models = [
        GPTModelRank(target.architecture, degrees, rank, stage, target.vocabulary, layout.transformer_impl)
        for stage in range(degrees[1])
        for rank in range(degrees[0])
    ]
    files: list[TargetFile] = [RankStateFile(target, model, FILE) for model in models]
    if layout.distributed_optimizer and target.has_moments:
        files += [RankBufferFile(target, model, DISTRIBUTED_FILE) for model in models]
    return tuple(files)
