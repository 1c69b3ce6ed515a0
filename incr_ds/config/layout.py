"""How a model is distributed over processes. Growth, checkpoints and training share this declaration."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from incr_ds.config.fields import Settings


class ParallelLayout(Settings):
    """Degrees of tensor, pipeline and data parallelism, and the ZeRO stage."""

    tensor_parallel: int = Field(default=1, ge=1)
    """Ranks that share each layer."""
    pipeline_parallel: int = Field(default=1, ge=1)
    """Stages that the layers are cut into."""
    data_parallel: int = Field(default=1, ge=1)
    """Ranks with the same weights and other samples."""
    zero_stage: Literal[0, 1, 2, 3] = 1
    """What ZeRO partitions over data-parallel ranks: 1 optimizer states, 2 gradients too, 3 weights too."""

    @model_validator(mode="after")
    def _pipeline_allows_zero_1(self) -> Self:
        if self.pipeline_parallel > 1 and self.zero_stage > 1:
            raise ValueError(
                f"zero_stage {self.zero_stage} with pipeline_parallel {self.pipeline_parallel}: DeepSpeed's pipeline "
                "supports zero_stage 0 and 1; set zero_stage: 1, or pipeline_parallel: 1"
            )
        return self

    def __str__(self) -> str:
        """One word per degree, such as tp1 pp2 dp1 zero1."""
        degrees = (("tp", self.tensor_parallel), ("pp", self.pipeline_parallel), ("dp", self.data_parallel))
        return " ".join(f"{name}{size}" for name, size in (*degrees, ("zero", self.zero_stage)))

    @property
    def world_size(self) -> int:
        """Number of processes."""
        return self.tensor_parallel * self.pipeline_parallel * self.data_parallel
