"""Settings of the optimizer, of rates of its own for new layers, and of the loss's scale in fp16."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from incr_ds.config.fields import Settings
from incr_ds.config.layout import ParallelLayout


class NewParameterSettings(Settings):
    """The learning rate of the layers that the newest growth in depth added. All other tensors keep the schedule's.

    Counted from the step at which the run, or the stage of a run that grows, begins.
    """

    learning_rate_ratio: float = Field(default=1.0, gt=0.0)
    """The factor of their learning rate."""
    warmup_steps: int = Field(default=0, ge=0)
    """Steps in which that factor rises linearly from warmup_from times its value."""
    warmup_from: float = Field(default=0.0, ge=0.0, le=1.0)
    """The fraction of the factor at which the warm-up starts."""


class MuonSettings(Settings):
    """Muon (DeepSpeed's) for the matrices of the decoder layers. AdamW trains everything else."""

    learning_rate_ratio: float = Field(default=1.0, gt=0.0)
    """The factor of the schedule's learning rate for these matrices. A step has the spectral norm of the rate."""
    momentum: float = Field(default=0.95, ge=0.0, lt=1.0)
    """The decay factor of the gradients' average."""


class OptimizerSettings(Settings):
    """AdamW, torch's own or DeepSpeed's, alone or beside Muon."""

    name: Literal["adamw", "muon"] = "adamw"
    """adamw for all tensors, or muon for the matrices of the decoder layers and AdamW for the others."""
    muon: MuonSettings | None = None
    """Muon's own settings; null takes their defaults. Only with name: muon."""
    betas: tuple[float, float] = Field(default=(0.9, 0.95), strict=False)
    """AdamW's two decay factors."""
    eps: float = Field(default=1e-8, gt=0.0)
    """AdamW's epsilon."""
    weight_decay: float = Field(default=0.1, ge=0.0)
    """Decoupled weight decay of matrices. Norms and biases do not decay."""
    gradient_clipping: float = Field(default=1.0, ge=0.0)
    """The largest global gradient norm; 0 clips nothing."""
    implementation: Literal["torch", "deepspeed"] = "torch"
    """AdamW of torch, or DeepSpeed's FusedAdam (with offload its CPUAdam), which is compiled on first use."""
    offload: Literal["none", "cpu"] = "none"
    """cpu keeps masters and moments in the host's memory and takes the step there. none leaves it to the DeepSpeed JSON."""
    multipliers: Literal["checkpoint", "none"] = "checkpoint"
    """Whether the checkpoint's learning-rate multipliers per tensor (multipliers.json) apply."""
    new_parameters: NewParameterSettings | None = None
    """The learning rate of layers that the newest growth added; null: that of all tensors."""

    @model_validator(mode="after")
    def _muon_fits(self) -> Self:
        if self.name != "muon":
            if self.muon is not None:
                raise ValueError(f"muon: its settings belong to name: muon, not to name: {self.name}; remove them")
            return self
        if self.gradient_clipping:
            raise ValueError(
                f"gradient_clipping {self.gradient_clipping:g} does not go with name: muon: DeepSpeed takes the norm over "
                "Muon's orthogonalized updates, and clipping would shrink these; set gradient_clipping: 0"
            )
        if self.offload != "none":
            raise ValueError(f"offload: {self.offload} does not go with name: muon here; set offload: none")
        return self

    def check_layout(self, layout: ParallelLayout) -> None:
        """Raise ValueError if the optimizer cannot train in ``layout``."""
        if self.name == "muon" and layout.tensor_parallel > 1:
            raise ValueError(
                f"optimizer.name: muon with layout.tensor_parallel {layout.tensor_parallel}: Muon needs whole matrices, and "
                "tensor ranks hold parts of them; use pipeline_parallel or data_parallel"
            )
        if self.name == "muon" and layout.zero_stage == 3:
            raise ValueError("optimizer.name: muon goes with layout.zero_stage 1 and 2 here, not with 3")


class LossScalingSettings(Settings):
    """The factor of the loss in fp16, by which small gradients stay above 0.

    A dynamic factor is halved when gradients are not finite, and such a step is skipped. It doubles after a number of steps
    without that.
    """

    scale: float | None = Field(default=None, gt=0.0)
    """A constant factor; null is a dynamic one, to which the other keys belong."""
    initial_power: int = Field(default=16, ge=0, le=64)
    """The power of 2 at which the factor begins."""
    window: int = Field(default=1000, ge=1)
    """Steps without a skipped one after which the factor doubles."""
    hysteresis: int = Field(default=2, ge=1)
    """The skipped step from which on each one halves the factor. The count begins anew after it has doubled."""
    min_scale: int = Field(default=1, ge=1)
    """The smallest factor."""
