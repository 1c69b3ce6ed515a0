"""What all files of a checkpoint for Megatron-core have in common, in both formats: arguments, parameter groups, scheduler."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from incr_ds.arch.architecture import Architecture
from incr_ds.checkpoint.megatron_core.arguments import arguments_of
from incr_ds.checkpoint.megatron_core.common import HYPERPARAMETERS
from incr_ds.config.growth import TargetLayout


@dataclass(frozen=True)
class MegatronCoreTarget:
    """A model, its layout and its optimizer's state without tensors.

    ``step`` is the optimizer's step, ``iteration`` and ``samples`` are the run's. ``groups`` are the AdamW hyperparameters of
    the decaying and the non-decaying parameter group. ``vocabulary`` is the number of rows of the embedding, padding
    included. Without ``has_moments`` there are weights alone, in a folder that Megatron-LM starts a run from.
    """

    architecture: Architecture
    layout: TargetLayout
    dtype: torch.dtype
    step: int
    iteration: int
    samples: int
    groups: tuple[Mapping[str, Any], ...]
    vocabulary: int
    has_moments: bool = True

    @property
    def tag(self) -> str:
        """What latest_checkpointed_iteration.txt says: the iteration, or that there are weights alone."""
        return str(self.iteration) if self.has_moments else "release"

    @property
    def folder(self) -> str:
        """The folder that it names."""
        return f"iter_{self.iteration:07d}" if self.has_moments else "release"

    def arguments(self, where: str) -> dict[str, Any]:
        """The run's arguments. Raises LayoutError with ``where`` if Megatron-core does not have the model."""
        layout = self.layout
        return arguments_of(self.architecture, where) | {
            "padded_vocab_size": self.vocabulary,
            "make_vocab_size_divisible_by": layout.vocabulary_multiple,
            "tensor_model_parallel_size": layout.tensor_parallel,
            "pipeline_model_parallel_size": layout.pipeline_parallel,
            "expert_model_parallel_size": layout.expert_parallel,
            "params_dtype": self.dtype,
            "bf16": self.dtype == torch.bfloat16,
            "fp16": self.dtype == torch.float16,
            "ckpt_format": layout.format,
            "consumed_train_samples": self.samples if self.has_moments else 0,
            "consumed_valid_samples": 0,
            # Otherwise Megatron-LM would look for the generators' states under equal degrees.
            "no_save_rng": True,
            "no_save_optim": not self.has_moments,
        }

    def group(self, *, decays: bool) -> dict[str, Any]:
        """A parameter group of the optimizer, without its parameters."""
        saved, rates = self.groups[0 if decays else -1], self.layout.learning_rates
        # Without a recipe's learning_rates neither max_lr nor min_lr: they would replace those of the run that loads this.
        return {
            **({} if rates is None else dict(zip(("max_lr", "min_lr"), rates, strict=True))),
            **{name: saved[name] for name in (*HYPERPARAMETERS, "betas")},
            "bias_correction": True,
            "wd_mult": float(decays),
            "lr_mult": 1.0,
            "is_decoupled_lr": False,
            "default_config": True,
            "step": self.step,
        }

    def scheduler(self) -> dict[str, Any]:
        """A constant rate from the run's samples on, for OptimizerParamScheduler."""
        group, samples = self.groups[0], self.samples
        return {
            "max_lr": group["lr"],
            "min_lr": 0.0,
            "lr_warmup_steps": 0,
            "lr_decay_steps": max(samples, 1),
            "lr_decay_style": "constant",
            "num_steps": samples,
            "start_wd": group["weight_decay"],
            "end_wd": group["weight_decay"],
            "wd_incr_steps": max(samples, 1),
            "wd_incr_style": "constant",
        }
