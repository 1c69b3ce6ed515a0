"""The run file: one YAML file that states a whole training run.

DeepSpeed's own JSON (key ``deepspeed``) holds only what no key here covers. Batch sizes, precision, the ZeRO stage,
clipping and the optimizer are stated here and derived for DeepSpeed. A JSON that states one of them differently is an
error.
"""

from __future__ import annotations

import math
import re
from fractions import Fraction
from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from incr_ds.config.distillation import DistillationSettings
from incr_ds.config.fields import Seed, Settings
from incr_ds.config.layout import ParallelLayout
from incr_ds.config.stages import GrowthStep, check_growth_steps, check_teacher

_SHARE = re.compile(r"(\d{1,3}(?:\.\d{1,6})?) ?%")


def _in_steps(stated: Any, train_steps: Any) -> Any:
    """Convert a percentage of ``train_steps``, like 1%, to steps, rounded up; leave everything else for validation."""
    share = _SHARE.fullmatch(stated) if isinstance(stated, str) and isinstance(train_steps, int) else None
    return stated if share is None else math.ceil(Fraction(share[1]) * train_steps / 100)


class GrowthStart(Settings):
    """A source checkpoint folder of any kind, and the growth recipe to apply to it as it is loaded."""

    source: str
    recipe: str


class ModelSettings(Settings):
    """What to train: a fresh model of a Hugging Face config.json (``config``), or the weights of a checkpoint folder.

    ``initialize_from`` takes a Hugging Face folder (weights only), a DeepSpeed checkpoint in this run's layout (in any
    layout with ``resume.reshard``), grown or not, or a source in any layout together with a recipe, by which it is grown in
    memory. Optimizer state is kept unless ``load_optimizer`` is false. ``tag`` is the DeepSpeed tag to read.

    ``attention: cudnn`` is sdpa that tries cuDNN's kernel first. With ``layer_kernels: liger``, Liger's kernels compute
    norms, gated FFNs and rotary positions. ``freeze`` lists patterns of tensor names that do not train. The last pattern
    that matches decides, and one that starts with ``!`` lets the tensor train (arch/freezing.py).
    """

    config: str | None = None
    initialize_from: str | GrowthStart | None = None
    tag: str | None = None
    load_optimizer: bool = True
    attention: Literal["sdpa", "eager", "cudnn"] = "sdpa"
    layer_kernels: Literal["transformers", "liger"] = "transformers"
    activation_checkpointing: bool = False
    freeze: list[str] = Field(default_factory=list)

    @model_validator(mode="after")
    def _one_origin(self) -> Self:
        if (self.config is None) == (self.initialize_from is None):
            raise ValueError("name exactly one of config (a fresh model) and initialize_from (a checkpoint folder)")
        return self


class ObjectiveSettings(Settings):
    """The training loss beside its distillation part. z_loss * (log sum exp of the logits)^2 is added to it.

    ``backend`` names the row kernels. auto picks the one known to be fastest on the device. recompute stores no logits.
    """

    z_loss: float = Field(default=0.0, ge=0.0)
    backend: Literal["auto", "torch", "triton", "cuda", "recompute"] = "auto"

    @field_validator("backend", mode="before")
    @classmethod
    def _renamed(cls, value: Any) -> Any:
        if value == "lean":
            raise ValueError("lean is recompute now")
        return value


class BatchSettings(Settings):
    """Sizes in samples and tokens. The number of micro-batches per step follows from them."""

    sequence_length: int = Field(ge=1)
    micro_batch_size: int = Field(ge=1)
    global_batch_size: int = Field(ge=1)


class ScheduleSettings(Settings):
    """The learning rate over the optimizer steps of this run.

    Linear warm-up starts at ``warmup_from`` (a fraction of the peak; above 0 it is a re-warm-up after growth). Then
    comes ``cosine`` or ``linear`` to ``min_learning_rate``, ``wsd`` (constant, then ``decay_steps`` of linear decay at the
    end) or ``constant``. ``warmup_steps`` and ``decay_steps`` may be percentages of ``train_steps``, like 1%.

    ``start_step`` and ``end_step`` cut this run out of a longer schedule of ``train_steps``: the steps taken before it,
    and those taken when it ends (None: train_steps). Its learning rate, data and dropout are those of the same steps of
    the whole. Over its first ``rewarmup_steps`` steps the rate rises linearly, from ``rewarmup_from`` times the
    schedule's rate to the schedule's rate.
    """

    train_steps: int = Field(ge=1)
    learning_rate: float = Field(gt=0.0)
    min_learning_rate: float = Field(default=0.0, ge=0.0)
    warmup_steps: int = Field(default=0, ge=0)
    warmup_from: float = Field(default=0.0, ge=0.0, le=1.0)
    decay: Literal["cosine", "linear", "wsd", "constant"] = "cosine"
    decay_steps: int = Field(default=0, ge=0)
    start_step: int = Field(default=0, ge=0)
    end_step: int | None = None
    rewarmup_steps: int = Field(default=0, ge=0)
    rewarmup_from: float = Field(default=0.0, ge=0.0, le=1.0)

    @model_validator(mode="before")
    @classmethod
    def _shares_of_steps(cls, content: Any) -> Any:
        if not isinstance(content, dict):
            return content
        stated = {key: content[key] for key in ("warmup_steps", "decay_steps") if key in content}
        return {**content, **{key: _in_steps(value, content.get("train_steps")) for key, value in stated.items()}}

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.warmup_steps + self.decay_steps > self.train_steps:
            raise ValueError(
                f"warmup_steps {self.warmup_steps} + decay_steps {self.decay_steps} exceed "
                f"train_steps {self.train_steps}"
            )
        if self.decay == "wsd" and self.decay_steps == 0:
            raise ValueError("decay: wsd needs decay_steps, the length of the final decay")
        if self.decay != "wsd" and self.decay_steps:
            raise ValueError(f"decay_steps belongs to decay: wsd, not to decay: {self.decay}")
        if self.min_learning_rate > self.learning_rate:
            raise ValueError(f"min_learning_rate {self.min_learning_rate} is above learning_rate {self.learning_rate}")
        return self

    @model_validator(mode="after")
    def _part_fits(self) -> Self:
        if not self.start_step < self.last_step <= self.train_steps:
            raise ValueError(
                f"start_step {self.start_step} and end_step {self.last_step} are not a part of the schedule's {self.train_steps} "
                "steps: expected 0 <= start_step < end_step <= train_steps"
            )
        if self.rewarmup_steps and not self.start_step:
            raise ValueError(
                f"rewarmup_steps {self.rewarmup_steps} belongs to a run with a start_step; at step 0 it is warmup_steps"
            )
        if self.rewarmup_steps > self.last_step - self.start_step:
            raise ValueError(
                f"rewarmup_steps {self.rewarmup_steps} exceed the {self.last_step - self.start_step} steps from "
                f"{self.start_step} to {self.last_step}"
            )
        return self

    @property
    def last_step(self) -> int:
        """The number of steps of the whole schedule that are taken when this run ends."""
        return self.train_steps if self.end_step is None else self.end_step


class OptimizerSettings(Settings):
    """AdamW, torch's own or DeepSpeed's FusedAdam (built on first use). Norms and biases do not decay.

    ``multipliers: checkpoint`` applies the checkpoint's learning-rate multipliers per tensor (multipliers.json) to
    learning rate, eps and weight decay. With ``none`` all tensors train with the same settings.
    """

    betas: tuple[float, float] = Field(default=(0.9, 0.95), strict=False)
    eps: float = Field(default=1e-8, gt=0.0)
    weight_decay: float = Field(default=0.1, ge=0.0)
    gradient_clipping: float = Field(default=1.0, ge=0.0)
    implementation: Literal["torch", "deepspeed"] = "torch"
    multipliers: Literal["checkpoint", "none"] = "checkpoint"


class CorpusSettings(Settings):
    """One Megatron data set: the path of its .bin and .idx without the extension, and its share of the mix."""

    prefix: str
    weight: float = Field(default=1.0, gt=0.0)


class DataSettings(Settings):
    """Training and held-out data, and the tokenizer folder that made them."""

    train: list[CorpusSettings] = Field(min_length=1)
    validation: str | None = None
    tokenizer: str | None = None
    start_sample: int = Field(default=0, ge=0)


class EvaluationSettings(Settings):
    """Held-out evaluation every ``interval`` steps over ``samples`` samples, and at the first and last step."""

    interval: int = Field(ge=1)
    samples: int = Field(ge=1)


class CheckpointSettings(Settings):
    """Saving every ``interval`` steps, at ``keep_steps`` and at the end.

    The newest ``keep_last`` are kept (0 keeps all), and those of ``keep_steps`` are never deleted. In the ``background``,
    each rank copies its part to memory, and writes it while training goes on. A save that fails twice is left out; after
    ``max_failures`` of them in a row, the next one ends the run.
    """

    interval: int = Field(ge=1)
    keep_last: int = Field(default=2, ge=0)
    keep_steps: list[Annotated[int, Field(ge=1)]] = Field(default_factory=list)
    background: bool = False
    max_failures: int = Field(default=2, ge=0)


class ResumeSettings(Settings):
    """How a run continues from its newest checkpoint.

    With ``reshard``, that may have another layout than the run, as may the DeepSpeed checkpoint that a run is initialized
    from. Each rank then reads its own slices of weights, masters and moments from the files.
    """

    reshard: bool = False


class DivergenceSettings(Settings):
    """When a run counts as diverged, and what happens then.

    It does after ``max_skipped_steps`` steps in a row whose gradients were not finite. It also does once the cross
    entropy, averaged over about ten steps, was more than ``max_loss_rise`` nats above its lowest value for
    ``rise_steps`` steps in a row or at the last step. With ``max_loss_rise: null`` it never does for the latter reason.

    With ``action: stop`` a diverged run ends with an error. With ``roll_back`` it goes back to its newest healthy
    checkpoint and skips the samples that it had read since, at most ``max_roll_backs`` times in all.
    """

    action: Literal["stop", "roll_back"] = "stop"
    max_roll_backs: int = Field(default=3, ge=1)

    max_skipped_steps: int = Field(default=10, ge=1)
    max_loss_rise: float | None = Field(default=2.0, gt=0.0)
    rise_steps: int = Field(default=20, ge=1)


class WandbSettings(Settings):
    """Weights & Biases: without this section nothing goes there. ``name`` is the output folder's by default.

    ``offline`` only writes into the output folder, for `wandb sync` later. ``online`` sends every row and the run file's
    content.
    """

    project: str = Field(min_length=1)
    entity: str | None = None
    name: str | None = None
    mode: Literal["offline", "online"] = "offline"


class RunSettings(Settings):
    """A training run. ``growth`` lists the steps at which its model grows, also as percentages of ``schedule.train_steps``.

    ``peak_flops`` is one device's peak per second, for ``mfu``; null uses the GPU's data sheet. A run that makes no progress
    for ``watchdog_seconds`` writes all stacks of all ranks and ends; null lets it wait. ``report`` writes report.html when
    the run is finished or has diverged.
    """

    output: str
    seed: Seed = 0
    precision: Literal["fp32", "bf16"] = "bf16"
    model: ModelSettings
    loss: ObjectiveSettings = ObjectiveSettings()
    layout: ParallelLayout = ParallelLayout()
    batch: BatchSettings
    schedule: ScheduleSettings
    optimizer: OptimizerSettings = OptimizerSettings()
    data: DataSettings
    evaluation: EvaluationSettings | None = None
    checkpoint: CheckpointSettings
    resume: ResumeSettings = ResumeSettings()
    distillation: DistillationSettings | None = None
    growth: list[GrowthStep] = Field(default_factory=list)
    divergence: DivergenceSettings = DivergenceSettings()
    deepspeed: str | None = None
    peak_flops: float | None = Field(default=None, gt=0.0)
    watchdog_seconds: float | None = Field(default=3600.0, gt=0.0)
    log_interval: int = Field(default=10, ge=1)
    tensorboard: bool = True
    wandb: WandbSettings | None = None
    report: bool = True

    @model_validator(mode="before")
    @classmethod
    def _shares_of_steps(cls, content: Any) -> Any:
        """Convert the percentages in ``growth`` to steps."""
        growth, schedule = (content.get(key) if isinstance(content, dict) else None for key in ("growth", "schedule"))
        if not isinstance(growth, list) or not isinstance(schedule, dict):
            return content
        steps = [
            {**step, "at_step": _in_steps(step["at_step"], schedule.get("train_steps"))}
            if isinstance(step, dict) and "at_step" in step
            else step
            for step in growth
        ]
        return {**content, "growth": steps}

    @model_validator(mode="after")
    def _batches_divide(self) -> Self:
        per_pass = self.batch.micro_batch_size * self.layout.data_parallel
        if self.batch.global_batch_size % per_pass:
            lower = self.batch.global_batch_size // per_pass * per_pass
            nearest = " or ".join(str(size) for size in (lower, lower + per_pass) if size)
            raise ValueError(
                f"batch.global_batch_size {self.batch.global_batch_size} is not a multiple of micro_batch_size "
                f"{self.batch.micro_batch_size} x data_parallel {self.layout.data_parallel}; nearest: {nearest}"
            )
        if self.evaluation and self.data.validation is None:
            raise ValueError("evaluation needs data.validation, the prefix of the held-out data set")
        if self.evaluation and self.evaluation.samples % per_pass:
            lower = self.evaluation.samples // per_pass * per_pass
            nearest = " or ".join(str(size) for size in (lower, lower + per_pass) if size)
            raise ValueError(
                f"evaluation.samples {self.evaluation.samples} is not a multiple of micro_batch_size x data_parallel "
                f"{per_pass}; nearest: {nearest}"
            )
        return self

    @model_validator(mode="after")
    def _growths_fit(self) -> Self:
        first, last = self.schedule.start_step, self.schedule.last_step
        check_growth_steps(self.growth, first, last, self.layout)
        starts_grown = isinstance(self.model.initialize_from, GrowthStart)
        check_teacher(self.distillation, self.growth, first, starts_grown=starts_grown, tag=self.model.tag)
        return self

    @model_validator(mode="after")
    def _cache_fits(self) -> Self:
        if self.distillation and self.distillation.cache is not None and self.divergence.action == "roll_back":
            raise ValueError(
                f"distillation.cache {self.distillation.cache}: a run that goes back skips samples and then needs others than a "
                "cache holds; set divergence.action: stop, or remove cache"
            )
        return self

    @property
    def accumulation_steps(self) -> int:
        """Micro-batches that each data-parallel rank sees per optimizer step."""
        return self.batch.global_batch_size // (self.batch.micro_batch_size * self.layout.data_parallel)
