"""Writes DeepSpeed's universal layout: one folder per parameter with its whole master and moments, for any ranks.

One folder serves ZeRO-1, 2 and 3 and BF16_Optimizer at any data-parallel size, which DeepSpeed's own converter does not
do. `optimizer_state.pt` and the metadata files contain all that the loaders of the stages look for. No class of
DeepSpeed is pickled. Format facts were read in DeepSpeed 0.19.8 (checkpoint/universal_checkpoint.py,
runtime/base_optimizer.py, runtime/zero/stage3.py, runtime/engine.py).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from incr_ds.checkpoint.base import STATES, State
from incr_ds.checkpoint.deepspeed.names import model_file
from incr_ds.checkpoint.deepspeed.writer import FORMAT_VERSION, NativeTarget
from incr_ds.checkpoint.streaming import StreamedTensor, TargetFile, parameter_tensor
from incr_ds.checkpoint.torch_file.write import ArchiveFile
from incr_ds.sharding.blocks import RankParameter
from incr_ds.sharding.megatron_modules import module_parameters

FILES: dict[State, str] = {"weight": "fp32.pt", "exp_avg": "exp_avg.pt", "exp_avg_sq": "exp_avg_sq.pt"}
# The ZeRO-1 and 2 loader stops silently at the shorter of its own and the saved list of parameter groups. Empty groups
# beyond the engine's own are ignored, and because they are empty, learning rate, betas and decay stay unchanged.
PARAMETER_GROUPS = 256


@dataclass(frozen=True)
class _TagFile(ArchiveFile):
    """A .pt file below the tag's folder."""

    target: NativeTarget
    inner: str

    @property
    def path(self) -> str:
        """Path inside the target folder."""
        return f"{self.target.tag}/{self.inner}"


@dataclass(frozen=True)
class StateFile(_TagFile):
    """zero/PARAMETER/{fp32,exp_avg,exp_avg_sq}.pt: one state of one parameter, and how tensor ranks cut it."""

    tensor: RankParameter
    state: State

    @property
    def tensors(self) -> tuple[StreamedTensor, ...]:
        """The one tensor."""
        return (parameter_tensor(self.tensor.blocks, self.tensor.shape, self.state, torch.float32),)

    def content(self) -> Any:
        """The whole tensor as ``param``, and how tensor ranks cut it.

        ``cat_dim`` is the dimension that they cut, ``param_n_sub_params`` the number of parts that are cut separately, and
        ``vocab_tensor`` says that its rows are padded.
        """
        (tensor,), whole = self.tensors, self.tensor
        if self.target.bare_states:
            return tensor
        content: dict[str, Any] = {"param": tensor}
        if whole.cut is not None:
            content["cat_dim"] = whole.cut
        if whole.sub_parameters > 1:
            content["param_n_sub_params"] = whole.sub_parameters
        if whole.padded:
            content["vocab_tensor"] = True
        return content


@dataclass(frozen=True)
class StepFile(_TagFile):
    """zero/PARAMETER/step.pt: the optimizer's step, equal for all parameters."""

    def content(self) -> Any:
        """A bare number."""
        return torch.tensor(float(self.target.step))


@dataclass(frozen=True)
class GlobalStateFile(_TagFile):
    """zero/optimizer_state.pt: all that is not per parameter, both where ZeRO-1 and 2 and where ZeRO-3 expect it."""

    def content(self) -> Any:
        """The file's content. Loss scale, clipping and hyperparameters are left out, so the engine's own stay in force."""
        step = torch.tensor(float(self.target.step))
        return {
            "ds_version": FORMAT_VERSION,
            "overflow": False,
            "param_groups": [{} for _ in range(PARAMETER_GROUPS)],
            "optimizer_state_dict": {"state": {0: {"step": step}}, "param_groups": [{"params": []}]},
        }


@dataclass(frozen=True)
class MetadataFile(_TagFile):
    """mp_rank_XX_model_states.pt, and its name under ZeRO-3: counters, no weights."""

    def content(self) -> Any:
        """What load_checkpoint needs before it reads the parameters."""
        layout = self.target.layout
        return {
            "module": {},
            "buffer_names": [],
            "optimizer": None,
            "param_shapes": [],
            "frozen_param_shapes": None,
            "shared_params": {},
            "frozen_param_fragments": None,
            "lr_scheduler": None,
            "data_sampler": None,
            "random_ltd": None,
            "skipped_steps": 0,
            "global_steps": self.target.global_steps,
            "global_samples": 0,
            "dp_world_size": layout.data_parallel,
            "mp_world_size": layout.tensor_parallel * layout.pipeline_parallel,
            "ds_config": {},
            "ds_version": FORMAT_VERSION,
        }


def universal_files(target: NativeTarget) -> tuple[TargetFile, ...]:
    """Every file of a universal checkpoint.

    Parameters have the names of a pipeline's module if the declared layout has a pipeline (the names do not depend on its
    length), otherwise Hugging Face's.
    """
    layout = target.layout
    files: list[TargetFile] = [GlobalStateFile(target, "zero/optimizer_state.pt")]
    for rank in range(layout.tensor_parallel * layout.pipeline_parallel):
        files += [MetadataFile(target, name) for name in (model_file(rank), model_file(rank, 0))]
    for parameter, tensor in _parameters(target).items():
        files += [StateFile(target, f"zero/{parameter}/{FILES[state]}", tensor, state) for state in STATES]
        files.append(StepFile(target, f"zero/{parameter}/step.pt"))
    return tuple(files)


def _parameters(target: NativeTarget) -> dict[str, RankParameter]:
    """Each parameter once and whole. A tied one is on two stages."""
    if target.modules is not None:
        vocabulary = target.architecture.sizes["vocab"]
        layers = module_parameters(target.modules, target.architecture, 1, 0, vocabulary).values()
        return {item.parameter: item for items in layers for item in items}
    layout = target.layout.model_copy(update={"tensor_parallel": 1})
    uncut = replace(target, layout=layout)
    return {item.parameter: item for stage in range(layout.pipeline_parallel) for item in uncut.shards(stage)}
