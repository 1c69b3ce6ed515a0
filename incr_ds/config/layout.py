"""How a model is distributed over processes. Growth, checkpoints and training share this declaration."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from incr_ds.config.fields import Settings

Layers = Annotated[int, Field(ge=1)]


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
    stages: Literal["even", "balanced"] | Annotated[tuple[Layers, ...], Field(strict=False)] = "even"
    """Decoder layers of each pipeline stage: even, balanced (the largest stage's FLOPs are smallest), or a list: [9, 9, 6]."""

    @model_validator(mode="after")
    def _pipeline_allows_zero_1(self) -> Self:
        if self.pipeline_parallel > 1 and self.zero_stage > 1:
            raise ValueError(
                f"zero_stage {self.zero_stage} with pipeline_parallel {self.pipeline_parallel}: DeepSpeed's pipeline "
                "supports zero_stage 0 and 1; set zero_stage: 1, or pipeline_parallel: 1"
            )
        return self

    @model_validator(mode="after")
    def _a_number_for_each_stage(self) -> Self:
        if isinstance(self.stages, tuple) and len(self.stages) != self.pipeline_parallel:
            raise ValueError(
                f"stages {list(self.stages)}: expected the decoder layers of pipeline_parallel {self.pipeline_parallel} stages, "
                f"found {len(self.stages)} numbers"
            )
        return self

    def __str__(self) -> str:
        """One word per degree, such as tp1 pp2 dp1 zero1, and unlike stages, such as stages9-6."""
        degrees = (("tp", self.tensor_parallel), ("pp", self.pipeline_parallel), ("dp", self.data_parallel))
        words = [f"{name}{size}" for name, size in (*degrees, ("zero", self.zero_stage))]
        if isinstance(self.stages, tuple):
            words.append(f"stages{'-'.join(map(str, self.stages))}")
        return " ".join(words)

    @property
    def of_teacher(self) -> ParallelLayout:
        """What a teacher beside a model in this layout must fit: the tensor ranks. Its layers are spread evenly."""
        return self.model_copy(update={"pipeline_parallel": 1, "zero_stage": 1, "stages": "even"})

    @property
    def world_size(self) -> int:
        """Number of processes."""
        return self.tensor_parallel * self.pipeline_parallel * self.data_parallel
