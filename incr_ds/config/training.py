"""The run file: one YAML file that states a whole training run.

DeepSpeed's own JSON (key ``deepspeed``) holds only what no key here covers. Batch sizes, precision, the ZeRO stage,
clipping and the optimizer are stated here and derived for DeepSpeed. A JSON that states one of them differently is an
error.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from incr_ds.config.batch import BatchSettings
from incr_ds.config.distillation import DistillationSettings
from incr_ds.config.fields import Seed, Settings
from incr_ds.config.layout import ParallelLayout
from incr_ds.config.optimizer import LossScalingSettings, OptimizerSettings
from incr_ds.config.schedule import ScheduleSettings, in_steps
from incr_ds.config.stages import GrowthStep, check_growth_steps, check_teacher


class GrowthStart(Settings):
    """A source, and the growth recipe to apply to it as it is loaded."""

    source: str
    """A source checkpoint folder of any kind."""
    recipe: str
    """The growth recipe to apply to it as it is loaded."""


class ModelSettings(Settings):
    """What to train: a fresh model of a config.json, or the weights of a checkpoint folder.

    That may be a Hugging Face folder (weights only), a DeepSpeed checkpoint in this run's layout (in any layout with
    ``resume.reshard``), grown or not, or a source in any layout together with a recipe.
    """

    config: str | None = None
    """A Hugging Face config.json: train a fresh model."""
    initialize_from: str | GrowthStart | None = None
    """A checkpoint folder whose weights to start from, or {source, recipe}: a source to grow as it is loaded."""
    tag: str | None = None
    """The DeepSpeed tag to read from it; null takes the one that its file latest names."""
    load_optimizer: bool = True
    """Whether to keep the checkpoint's optimizer state."""
    attention: Literal["sdpa", "eager", "cudnn"] = "sdpa"
    """Attention's implementation. cudnn is sdpa that tries cuDNN's kernel first."""
    experts: Literal["auto", "grouped", "eager"] = "auto"
    """How a mixture's experts are multiplied: by one grouped product per layer, or one after the other. auto groups where the
    sizes allow it."""
    layer_kernels: Literal["transformers", "liger"] = "transformers"
    """Who computes norms, gated FFNs and rotary positions. liger needs CUDA."""
    activation_checkpointing: bool = False
    """Whether to compute each layer's activations again in the backward pass, which saves memory."""
    freeze: list[str] = Field(default_factory=list)
    """Patterns of tensor names that do not train. The last match decides; a leading ! lets a tensor train."""

    @model_validator(mode="after")
    def _one_origin(self) -> Self:
        if (self.config is None) == (self.initialize_from is None):
            raise ValueError("name exactly one of config (a fresh model) and initialize_from (a checkpoint folder)")
        return self


class ObjectiveSettings(Settings):
    """The training loss beside its distillation part."""

    z_loss: float = Field(default=0.0, ge=0.0)
    """The factor of (log sum exp of the logits)^2 in the loss."""
    router: float | None = Field(default=None, ge=0.0)
    """The factor of the router loss, which spreads a mixture's tokens over its experts; null: 0.001. Only for mixtures."""
    backend: Literal["auto", "torch", "triton", "cuda", "recompute"] = "auto"
    """The loss's row kernels. auto takes the one known to be fastest on the device; recompute stores no logits."""

    @field_validator("backend", mode="before")
    @classmethod
    def _renamed(cls, value: Any) -> Any:
        if value == "lean":
            raise ValueError("lean is recompute now")
        return value


class CorpusSettings(Settings):
    """One Megatron data set of the mix."""

    prefix: str
    """The path of a Megatron data set without .bin and .idx."""
    weight: float = Field(default=1.0, gt=0.0)
    """Its share of the mix, relative to the other weights."""


Precision = Literal["fp32", "bf16", "fp16"]
SetName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")]


class DataSettings(Settings):
    """Training and held-out data, and the tokenizer that made them."""

    train: list[CorpusSettings] = Field(min_length=1)
    """The data sets to train on, mixed by weight."""
    validation: str | Annotated[dict[SetName, str], Field(min_length=1)] | None = None
    """The prefix of the held-out data set, or the prefixes of several by name."""
    tokenizer: str | None = None
    """The folder of the tokenizer that made the data. It is copied into checkpoints and exports."""
    start_sample: int = Field(default=0, ge=0)
    """The first sample to read: those before it belong to an earlier run."""
    reset_at_document_end: bool = False
    """Whether a token attends to its own document only, with positions from 0 in each document."""

    @property
    def held_out(self) -> dict[str, str]:
        """Prefixes of the held-out data sets by name. A single one has the name validation."""
        if self.validation is None:
            return {}
        return {"validation": self.validation} if isinstance(self.validation, str) else self.validation


class EvaluationSettings(Settings):
    """Evaluation on held-out data."""

    interval: int = Field(ge=1)
    """Steps from one evaluation to the next. The first and the last step are evaluated, too."""
    samples: int = Field(ge=1)
    """Samples of each held-out set."""


class CheckpointSettings(Settings):
    """Saving. A save that fails is tried once more before it is left out."""

    interval: int = Field(ge=1)
    """Steps from one save to the next. The end is saved, too."""
    keep_last: int = Field(default=2, ge=0)
    """How many of the newest checkpoints to keep; 0 keeps all."""
    keep_steps: list[Annotated[int, Field(ge=1)]] = Field(default_factory=list)
    """Further steps at which to save. These checkpoints are never deleted."""
    background: bool = False
    """Whether ranks copy their part to memory, which they keep for the next save, and write it while training goes on."""
    max_failures: int = Field(default=2, ge=0)
    """How many saves in a row may fail twice and be left out, before the next one ends the run."""


class ResumeSettings(Settings):
    """How a run continues from its newest checkpoint.

    ``reshard`` also applies to the DeepSpeed checkpoint that a run is initialized from.
    """

    reshard: bool = False
    """Whether the checkpoint may have another layout; each rank then reads its own slices of the files."""
    change_data: bool = False
    """Whether the run may have other data. The new mix begins after the samples that were read."""


class DivergenceSettings(Settings):
    """When a run counts as diverged, and what happens then."""

    action: Literal["stop", "roll_back"] = "stop"
    """What a diverged run does: end with an error, or go back to its newest healthy checkpoint and skip samples."""
    max_roll_backs: int = Field(default=3, ge=1)
    """How often it may go back."""

    max_skipped_steps: int = Field(default=10, ge=1)
    """Steps in a row with gradients that are not finite that make a divergence."""
    max_loss_rise: float | None = Field(default=2.0, gt=0.0)
    """Nats above its lowest value at which the cross entropy, over about ten steps, is too high; null: never."""
    rise_steps: int = Field(default=20, ge=1)
    """Steps in a row with too high a cross entropy that make a divergence. At the last step, one is enough."""


class WandbSettings(Settings):
    """Weights & Biases: without this section nothing goes there."""

    project: str = Field(min_length=1)
    """The project on Weights & Biases."""
    entity: str | None = None
    """The user or team; null is the default of the account."""
    name: str | None = None
    """The run's name; null is the name of the output folder."""
    mode: Literal["offline", "online"] = "offline"
    """offline only writes into the output folder, for wandb sync later. online sends every row and the run file."""


class RunSettings(Settings):
    """A training run."""

    output: str
    """The folder of everything that the run writes."""
    seed: Seed = 0
    """The seed of fresh weights, of the order of samples and of dropout."""
    precision: Precision = "bf16"
    """The dtype of weights and activations. Masters and moments are fp32. fp16 scales the loss."""
    loss_scaling: LossScalingSettings | None = None
    """How fp16 scales the loss; null takes the defaults below. Only with precision: fp16."""
    model: ModelSettings
    """What to train."""
    loss: ObjectiveSettings = ObjectiveSettings()
    """The training loss, beside its distillation part."""
    layout: ParallelLayout = ParallelLayout()
    """How the model is distributed over processes."""
    batch: BatchSettings
    """Sizes of a step."""
    schedule: ScheduleSettings
    """The learning rate, and the number of steps."""
    optimizer: OptimizerSettings = OptimizerSettings()
    """The optimizer and its settings."""
    data: DataSettings
    """What to read."""
    evaluation: EvaluationSettings | None = None
    """When to evaluate on held-out data; null: never."""
    checkpoint: CheckpointSettings
    """When to save, and what to keep."""
    resume: ResumeSettings = ResumeSettings()
    """What may differ between the run and its newest checkpoint."""
    distillation: DistillationSettings | None = None
    """The teacher; null: none."""
    growth: list[GrowthStep] = Field(default_factory=list)
    """The growths on the way, each with its step."""
    divergence: DivergenceSettings = DivergenceSettings()
    """When the run counts as diverged, and what happens then."""
    deepspeed: str | None = None
    """A JSON file of settings that only DeepSpeed has."""
    peak_flops: float | None = Field(default=None, gt=0.0)
    """One device's peak in FLOP/s, for mfu; null takes the GPU's data sheet."""
    slow_rank_ratio: float = Field(default=1.5, gt=1.0)
    """A rank whose own work takes so many times the median rank's is named."""
    watchdog_seconds: float | None = Field(default=3600.0, gt=0.0)
    """After so long without progress, all ranks write their stacks and end; null: never."""
    log_interval: int = Field(default=10, ge=1)
    """Steps from one row of metrics to the next."""
    tensorboard: bool = True
    """Whether to write event files for TensorBoard."""
    wandb: WandbSettings | None = None
    """Weights & Biases; null sends nothing and imports nothing."""
    report: bool = True
    """Whether to write report.html at the end, also of a diverged run."""

    @model_validator(mode="before")
    @classmethod
    def _shares_of_steps(cls, content: Any) -> Any:
        """Convert the percentages in ``growth`` and ``batch.ramp`` to steps."""
        if not isinstance(content, dict) or not isinstance(content.get("schedule"), dict):
            return content
        train_steps, batch = content["schedule"].get("train_steps"), content.get("batch")
        if isinstance(batch, dict) and "ramp" in batch:
            content = {**content, "batch": {**batch, "ramp": _in_steps(batch["ramp"], train_steps)}}
        return {**content, "growth": _in_steps(content["growth"], train_steps)} if "growth" in content else content

    @model_validator(mode="after")
    def _sequences_fit(self) -> Self:
        ranks = self.batch.sequence_parallel
        for key, size in (
            ("layout.data_parallel", self.layout.data_parallel),
            ("batch.sequence_length", self.batch.sequence_length),
        ):
            if size % ranks:
                raise ValueError(
                    f"batch.sequence_parallel {ranks} does not divide {key} {size}; that many of the data-parallel ranks share "
                    "each sample, in equal slices"
                )
        unfit = {
            "layout.tensor_parallel above 1": self.layout.tensor_parallel > 1,
            "layout.pipeline_parallel above 1": self.layout.pipeline_parallel > 1,
            "data.reset_at_document_end: true": self.data.reset_at_document_end,
            "model.attention: eager": self.model.attention == "eager",
        }
        for setting, stated in unfit.items():
            if ranks > 1 and stated:
                raise ValueError(f"batch.sequence_parallel {ranks} does not go with {setting}; change one of them")
        return self

    @property
    def sample_ranks(self) -> int:
        """Data-parallel ranks that read different samples."""
        return self.layout.data_parallel // self.batch.sequence_parallel

    @model_validator(mode="after")
    def _batches_divide(self) -> Self:
        per_pass = self.batch.micro_batch_size * self.sample_ranks
        shared = f" / sequence_parallel {self.batch.sequence_parallel}" if self.batch.sequence_parallel > 1 else ""
        # Growths may change layout and micro-batch. Each stage is checked as a run of its own.
        first, last = self.schedule.start_step, self.growth[0].at_step if self.growth else self.schedule.last_step
        for number, change in enumerate(self.batch.ramp):
            if change.at_step >= self.schedule.train_steps:
                raise ValueError(
                    f"batch.ramp.{number}.at_step {change.at_step}: no step would have this size, because "
                    f"schedule.train_steps is {self.schedule.train_steps}"
                )
        for _, size in self.batch.spans(first, last):
            if size % per_pass:
                lower = size // per_pass * per_pass
                nearest = " or ".join(str(near) for near in (lower, lower + per_pass) if near)
                raise ValueError(
                    f"batch.global_batch_size {size}{' (of batch.ramp)' if self.batch.ramp else ''} is not a multiple of "
                    f"micro_batch_size {self.batch.micro_batch_size} x data_parallel {self.layout.data_parallel}{shared}; "
                    f"nearest: {nearest}"
                )
        if self.evaluation and self.data.validation is None:
            raise ValueError(
                "evaluation needs data.validation, the prefix of the held-out data set, or several by name"
            )
        if self.evaluation and self.evaluation.samples % per_pass:
            lower = self.evaluation.samples // per_pass * per_pass
            nearest = " or ".join(str(size) for size in (lower, lower + per_pass) if size)
            raise ValueError(
                f"evaluation.samples {self.evaluation.samples} is not a multiple of micro_batch_size x data_parallel{shared} "
                f"{per_pass}; nearest: {nearest}"
            )
        return self

    @model_validator(mode="after")
    def _scaling_fits(self) -> Self:
        if self.loss_scaling is not None and self.precision != "fp16":
            raise ValueError(
                f"loss_scaling belongs to precision: fp16, not to {self.precision}, whose gradients need no scale; remove it"
            )
        return self

    @model_validator(mode="after")
    def _optimizer_fits(self) -> Self:
        self.optimizer.check_layout(self.layout)
        if self.optimizer.name == "muon" and self.precision == "fp16":
            raise ValueError(
                "optimizer.name: muon does not go with precision: fp16: DeepSpeed averages gradients with the loss's scale in "
                "them, and the scale changes; set bf16"
            )
        return self

    @model_validator(mode="after")
    def _documents_fit(self) -> Self:
        if self.data.reset_at_document_end:
            if self.model.attention == "cudnn":
                raise ValueError("data.reset_at_document_end does not work with model.attention: cudnn; set sdpa")
            if self.model.layer_kernels == "liger":
                raise ValueError(
                    "data.reset_at_document_end does not work with model.layer_kernels: liger; set transformers"
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
        if self.distillation is None or self.distillation.cache is None:
            return self
        unfit = {
            "divergence.action: roll_back": self.divergence.action == "roll_back",
            "resume.change_data: true": self.resume.change_data,
            "data.reset_at_document_end: true": self.data.reset_at_document_end,
        }
        for setting, stated in unfit.items():
            if stated:
                raise ValueError(
                    f"distillation.cache {self.distillation.cache}: does not go with {setting}, by which the run needs other "
                    "samples, or other contexts, than a cache holds; change that, or remove cache"
                )
        return self

    def accumulation_at(self, step: int) -> int:
        """Micro-batches that each data-parallel rank sees in optimizer step number ``step`` of the schedule."""
        return self.batch.size_at(step) // (self.batch.micro_batch_size * self.sample_ranks)

    @property
    def accumulations(self) -> list[int]:
        """Micro-batches per step and data-parallel rank, for every size of the global batch that the run's steps have."""
        per_pass = self.batch.micro_batch_size * self.sample_ranks
        return [size // per_pass for _, size in self.batch.spans(self.schedule.start_step, self.schedule.last_step)]

    @property
    def accumulation_steps(self) -> int:
        """Micro-batches that each data-parallel rank sees in the run's first step."""
        return self.accumulations[0]


def _in_steps(changes: Any, train_steps: Any) -> Any:
    """Convert the percentages in the key at_step of every item to steps, and leave everything else for validation."""
    if not isinstance(changes, list):
        return changes
    return [
        {**change, "at_step": in_steps(change["at_step"], train_steps)}
        if isinstance(change, dict) and "at_step" in change
        else change
        for change in changes
    ]
