"""The training engine: optimizer steps, evaluation, saving and loading in any layout."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.utils import safe_set_full_fp32_param
from torch import Tensor

from incr_ds.arch.architecture import Architecture
from incr_ds.arch.freezing import frozen_tensors
from incr_ds.arch.multipliers import NEW_RATIO, Multipliers, without_marks
from incr_ds.arch.training import router_factor
from incr_ds.checkpoint.base import LogicalCheckpoint
from incr_ds.config.training import RunSettings
from incr_ds.data.facts import document_end
from incr_ds.data.importing import without_compiler
from incr_ds.errors import CheckpointError, ConfigError
from incr_ds.launch.balance import placed
from incr_ds.launch.deepspeed_config import deepspeed_config
from incr_ds.losses.distillation import distillation_loss
from incr_ds.losses.head import Loss
from incr_ds.model.build import ModelRequest, RankModel, build_rank_model
from incr_ds.model.routing import RoutingResult, routing_result
from incr_ds.model.weights import CheckpointWeights, FreshWeights
from incr_ds.sharding.blocks import RankParameter
from incr_ds.sharding.optimizer_groups import (
    group_count,
    group_multipliers,
    optimizer_groups,
    set_apart,
    trained_shards,
)
from incr_ds.train.batches import Batch, LossRecord, PipelineRunner, PlainRunner
from incr_ds.train.checkpoint_layout import check_checkpoint_layout
from incr_ds.train.distributed import end_processes, initialize_distributed
from incr_ds.train.loading import check_files, own_settings, safe_loading
from incr_ds.train.moments import fill_optimizer
from incr_ds.train.optimizer import adapt_steps, build_optimizer, rate_ratio
from incr_ds.train.ranks import on_every_rank
from incr_ds.train.releasing import forget_modules
from incr_ds.train.skew import ForwardClock, has_own_work
from incr_ds.train.writer import install_writer

__all__ = ["HeldOutMeans", "StepResult", "TrainingEngine", "build_engine", "initialize_distributed"]

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class StepResult:
    """One optimizer step, the same on every rank.

    ``loss``, ``ce`` and ``divergence`` are means over the step's micro-batches on all data-parallel ranks.
    ``gradient_norm`` is the global norm before clipping. ``skipped`` is True if the gradients were not finite and the
    weights did not change. ``loss_scale`` is the factor of the step's loss in fp16, None otherwise. ``routing`` describes a
    mixture's routers.
    """

    loss: float
    ce: float
    divergence: float
    gradient_norm: float
    skipped: bool
    loss_scale: float | None = None
    routing: RoutingResult | None = None


@dataclass(frozen=True)
class HeldOutMeans:
    """Means over held-out tokens in nats, the same on every rank: cross entropy, and KL(teacher || student) at temperature 1.

    ``teacher_kl`` is None if the teacher was not asked.
    """

    ce: float
    teacher_kl: float | None


def build_engine(
    run: RunSettings,
    architecture: Architecture,
    weights: LogicalCheckpoint | None,
    teacher: LogicalCheckpoint | None,
    multipliers: Mapping[str, Multipliers] | None = None,
) -> TrainingEngine:
    """Build this process's engine. Every process of the run calls this with the same arguments.

    ``weights`` are the initial ones (None: fresh, drawn from run.seed). ``multipliers`` are learning-rate multipliers per
    tensor, which become parameter groups. Tensors frozen by run.model.freeze get no gradient and no optimizer state. Raises
    ConfigError or LayoutError if the run file, the number of processes, the model and the teacher are not consistent.
    """
    run = placed(run, architecture)
    frozen = frozen_tensors(architecture, run.model.freeze)
    # New parameters have groups of their own only in a run that trains them at a rate of their own.
    multipliers = (multipliers or {}) if run.optimizer.new_parameters else without_marks(multipliers or {})
    apart = set_apart(run.optimizer.name, architecture)
    num_groups = group_count(architecture, run.layout, multipliers, frozen, apart)
    config = deepspeed_config(run)
    device = initialize_distributed(run.layout)
    _check_precision(run)
    source = FreshWeights(architecture, run.seed) if weights is None else CheckpointWeights(weights)
    record = LossRecord()
    dtype = DTYPES[run.precision]
    request = ModelRequest(
        architecture,
        source,
        teacher,
        run.layout,
        run.model,
        dtype,
        device,
        _loss(run),
        document_end(run),
        router_factor(run.loss, architecture),
        run.batch.sequence_parallel,
        _cut_early(config),
    )
    model = build_rank_model(request, record.add)
    trained = trained_shards(model.shards, frozen)
    _freeze(model, trained)
    optimizer = _optimizer(model, trained, run, device, _Groups(multipliers, num_groups, apart))
    staged = run.layout.pipeline_parallel > 1
    with without_compiler():  # DeepSpeed imports its Muon to see whether this optimizer is one
        engine, *_ = deepspeed.initialize(
            model=model.module, optimizer=optimizer, config=config, mpu=None if staged else model.grid
        )
    if run.precision == "fp16":
        # A run at the smallest scale ends as one that diverges, and not with DeepSpeed's exception.
        engine.optimizer.loss_scaler.raise_error_at_min_scale = False
    if weights is not None and run.precision != "fp32":
        _keep_masters(model, trained, source)
    runner = PipelineRunner(engine) if staged else PlainRunner(engine, model.teacher, record, model.shared)
    return TrainingEngine(engine, runner, record, model, trained, run)


def _cut_early(config: dict[str, Any]) -> dict[str, Any] | None:
    """DeepSpeed's config if its ZeRO-3 can cut modules as they are built: it quantizes only what is frozen by then."""
    zero = config["zero_optimization"]
    return config if zero["stage"] == 3 and not zero.get("zero_quantized_nontrainable_weights") else None


def _check_precision(run: RunSettings) -> None:
    accelerator = get_accelerator()
    if run.precision == "fp16" and not accelerator.is_fp16_supported():
        raise ConfigError(
            f"precision: fp16: DeepSpeed does not train in fp16 on this device ({accelerator.device_name()}); set bf16 or fp32."
        )


def _loss(run: RunSettings) -> Loss:
    divergence = "forward_kl" if run.distillation is None else run.distillation.divergence
    return partial(distillation_loss, z_loss=run.loss.z_loss, backend=run.loss.backend, divergence=divergence)


class TrainingEngine:
    """Drives DeepSpeed. All methods are collective: every rank calls them in the same order."""

    def __init__(
        self,
        engine: deepspeed.DeepSpeedEngine,
        runner: PlainRunner | PipelineRunner,
        record: LossRecord,
        model: RankModel,
        trained: tuple[RankParameter, ...],
        run: RunSettings,
    ) -> None:
        self._engine, self._runner, self._record, self._run = engine, runner, record, run
        self._grid = model.grid
        self._shards, self._trained = model.shards, trained
        self._clock = ForwardClock(engine.module) if has_own_work(run.layout, run.batch.sequence_parallel) else None
        self._writer = install_writer(engine, background=run.checkpoint.background)
        self._multipliers = [Multipliers(**group["multipliers"]) for group in engine.optimizer.param_groups]

    @property
    def data_parallel_rank(self) -> int:
        """Index of the part of the global batch that this rank's model sees."""
        return int(self._grid.get_data_parallel_rank())

    @property
    def reads_data(self) -> bool:
        """True on the first and last pipeline stage, which need the batches. Other stages never ask for one."""
        return self._grid.get_stage_id() in (0, self._run.layout.pipeline_parallel - 1)

    @property
    def computes_loss(self) -> bool:
        """True on the last pipeline stage, which needs the labels and what comes with them."""
        return bool(self._grid.get_stage_id() == self._run.layout.pipeline_parallel - 1)

    @property
    def module(self) -> torch.nn.Module:
        """This rank's part of the model."""
        module: torch.nn.Module = self._engine.module
        return module

    @property
    def shards(self) -> tuple[RankParameter, ...]:
        """Descriptions of the parameters of ``module``, in the same order."""
        return self._shards

    def train_step(
        self,
        batches: Iterator[Batch],
        *,
        learning_rate: float,
        alpha: float = 0.0,
        temperature: float = 1.0,
        new_ratio: float = 1.0,
        global_batch_size: int | None = None,
    ) -> StepResult:
        """Take one optimizer step over the micro-batches of a global batch: (input_ids [B, S], labels [B, S]).

        ``labels`` holds the token after each input token, or -100 to ignore it. ``alpha`` > 0 needs a teacher, the engine's own
        or one that comes with the labels (``Targets``). ``new_ratio`` multiplies the learning rate of new parameters.
        ``global_batch_size`` is that of this step and of those after it (None: as before).
        """
        if alpha > 0 and self._run.distillation is None:
            raise ConfigError(f"alpha is {alpha}, but the run file has no section distillation that names a teacher")
        for group, multiplier in zip(self._engine.optimizer.param_groups, self._multipliers, strict=True):
            group["lr"] = learning_rate * multiplier.lr * rate_ratio(group, self._run.optimizer)
            if multiplier.new:
                group["lr"] *= new_ratio
                group[NEW_RATIO] = new_ratio
        if global_batch_size is not None:
            self._resize(global_batch_size)
        skipped_before = self._engine.skipped_steps
        scale = float(self._engine.optimizer.loss_scale) if self._run.precision == "fp16" else None
        samples = self._engine.global_samples
        self._runner.train(batches, alpha, temperature)
        self._engine.global_samples = samples + self._engine.train_batch_size() // self._run.batch.sequence_parallel
        loss, ce, divergence, *_ = self._over_ranks().tolist()
        layout = self._run.layout
        shares = layout.data_parallel * layout.tensor_parallel
        norm = float(self._engine.get_global_grad_norm())
        skipped = self._engine.skipped_steps > skipped_before
        return StepResult(loss / shares, ce / shares, divergence / shares, norm, skipped, scale, self._routing())

    def _resize(self, global_batch_size: int) -> None:
        """Change the number of micro-batches of the steps from here on."""
        seen = global_batch_size * self._run.batch.sequence_parallel  # as DeepSpeed counts samples
        if seen == self._engine.train_batch_size():
            return
        self._engine.set_train_batch_size(seen)
        # DeepSpeed ends a step where its count of all micro-batches so far divides by the number per step.
        self._engine.micro_steps = 0

    def forget_teacher(self) -> bool:
        """Free the teacher's memory. From now on ``alpha`` must be 0. Returns whether there was a teacher."""
        return self._runner.forget_teacher()

    def evaluate(self, batches: Iterator[Batch], num_micro_batches: int, *, taught: bool = False) -> HeldOutMeans:
        """Means over the tokens of ``num_micro_batches`` per data-parallel rank.

        ``taught`` needs a teacher of the engine's own, and adds the student's distance to it.
        """
        self._runner.evaluate(batches, num_micro_batches, taught=taught)
        *_, ce, kl, tokens = self._over_ranks().tolist()
        count = max(tokens, 1.0)
        return HeldOutMeans(ce / count, kl / count if taught else None)

    def save(self, folder: Path, tag: str, client_state: Mapping[str, Any]) -> None:
        """Write DeepSpeed's checkpoint files into folder/tag, without a ``latest`` file.

        With ``checkpoint.background`` they are only copied to memory, and ``finish_save`` waits for them.
        """
        self._writer.abandon()
        self._engine.save_checkpoint(str(folder), tag=tag, client_state=dict(client_state), save_latest=False)
        self._writer.check()

    @property
    def stage(self) -> int:
        """This rank's pipeline stage."""
        return int(self._grid.get_stage_id())

    def forward_seconds(self) -> float | None:
        """Mean seconds of a step's forward passes since the last call. None if they wait for other ranks (train/skew.py)."""
        return None if self._clock is None else self._clock.take() * self._engine.gradient_accumulation_steps()

    @property
    def is_writing(self) -> bool:
        """Whether files of the last save are still being written."""
        return self._writer.is_writing

    def finish_save(self) -> dict[Path, dict[str, Any]]:
        """Wait until they are. Returns the size and xxh3 of the files that were written in the background."""
        return self._writer.finish()

    def load(self, folder: Path, tag: str) -> dict[str, Any]:
        """Continue from folder/tag, which was written in this run's layout. Returns its client_state.

        Weights, masters, moments and step counts are the checkpoint's. The run file's clipping threshold, betas, eps and
        weight decay stay in force. So do the multipliers that the engine was built with, which must be the checkpoint's.
        Raises CheckpointError if there is nothing to load or a file holds more than DeepSpeed writes, LayoutError if the
        checkpoint has another layout.
        """
        check_checkpoint_layout(folder / tag, self._run.layout)
        on_every_rank(
            lambda: check_files(folder / tag, dist.get_rank(), dist.get_world_size()),
            f"{folder / tag}: not loaded: refused",
            "Nothing was loaded.",
        )
        with safe_loading(), own_settings(self._engine.optimizer):
            path, client_state = self._engine.load_checkpoint(str(folder), tag=tag, load_lr_scheduler_states=False)
        if path is None:
            raise CheckpointError(f"{folder / tag}: DeepSpeed found no checkpoint to load")
        adapt_steps(self._engine.optimizer.optimizer, self._run)
        return dict(client_state)

    def fill_optimizer(self, checkpoint: LogicalCheckpoint) -> None:
        """Read this rank's part of masters, moments and step from ``checkpoint``, and DeepSpeed's own counters."""
        named = dict(self._engine.module.named_parameters())
        parameters = {shard: named[shard.parameter] for shard in self._trained}
        fill_optimizer(self._engine.optimizer, parameters, checkpoint)
        adapt_steps(self._engine.optimizer.optimizer, self._run)
        recorded = checkpoint.facts.recorded
        self._engine.global_steps = recorded.global_steps or 0
        self._engine.global_samples = recorded.global_samples or 0
        self._engine.skipped_steps = recorded.skipped_steps or 0

    def release(self) -> None:
        """Free what DeepSpeed holds. The engine cannot be used afterwards; the processes stay connected."""
        if self._run.layout.zero_stage == 3:
            forget_modules(self._engine.module)
        self._writer.release()
        self._engine.destroy()

    def close(self) -> None:
        """Release the engine and end the process groups."""
        self.release()
        end_processes()

    def _routing(self) -> RoutingResult | None:
        routing = self._engine.module.routing
        if not routing.is_mixture:
            return None
        record = routing.take_record(self._engine.device)
        dist.all_reduce(record)
        layout = self._run.layout
        seen = layout.data_parallel * layout.tensor_parallel
        return routing_result(record, self._engine.gradient_accumulation_steps() * seen)

    def _over_ranks(self) -> Tensor:
        totals = self._record.take(self._engine.device)
        dist.all_reduce(totals)
        return totals


def _freeze(model: RankModel, trained: tuple[RankParameter, ...]) -> None:
    """Let only the ``trained`` parameters have gradients. Call this before DeepSpeed takes over the module."""
    names = {shard.parameter for shard in trained}
    for name, parameter in model.module.named_parameters():
        parameter.requires_grad_(name in names)


def _optimizer(
    model: RankModel,
    trained: tuple[RankParameter, ...],
    run: RunSettings,
    device: torch.device,
    chosen: _Groups,
) -> torch.optim.Optimizer:
    parameters = dict(model.module.named_parameters())
    groups = []
    for shards in optimizer_groups(trained, chosen.multipliers, chosen.number, chosen.apart):
        decay = run.optimizer.weight_decay if shards[0].tensor.is_matrix else 0.0
        settings = {"lr": run.schedule.learning_rate, "eps": run.optimizer.eps, "weight_decay": decay}
        own = group_multipliers(shards, chosen.multipliers)
        members = [parameters[shard.parameter] for shard in shards]
        # Stored in the checkpoint's groups, so that a later growth finds the run file's values.
        group = {"params": members, **own.applied(settings), "multipliers": own.stated()}
        groups.append(group | ({"use_muon": shards[0].tensor.name in chosen.apart} if chosen.apart else {}))
    return build_optimizer(groups, run, device)


@dataclass(frozen=True)
class _Groups:
    """What decides on the parameter groups: see optimizer_groups."""

    multipliers: Mapping[str, Multipliers]
    number: int
    apart: frozenset[str]


def _keep_masters(
    model: RankModel, trained: tuple[RankParameter, ...], weights: CheckpointWeights | FreshWeights
) -> None:
    """Set the fp32 masters to the checkpoint's own values. DeepSpeed made them from weights rounded to 16 bits."""
    parameters = dict(model.module.named_parameters())
    for shard in trained:
        safe_set_full_fp32_param(parameters[shard.parameter], weights.read(shard).float())
