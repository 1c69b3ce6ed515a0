"""Fits a growth's operators on a few hundred batches, after LiGO (Wang et al., arXiv 2303.00980), before the growth.

LiGO learns dense matrices B in W' = B_out W B_in^T, shared by all layers, and sums of layers in depth. Here B is the
recipe's own map of positions with a learned factor for each. A layer is a sum of the one that it copies and that one's
neighbours. So the result is an ordinary recipe, and a slice needs only the slices that it copies. Factors start at 1 and
sums at the layer map, that is, at the recipe's own operators.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from incr_ds.arch.tensors import TensorSpec
from incr_ds.checkpoint.base import LogicalCheckpoint
from incr_ds.checkpoint.finite import FiniteCheckpoint
from incr_ds.checkpoint.integrity import open_described
from incr_ds.config.fields import load_settings
from incr_ds.config.growth import FittedAxis, FittedOperators, GrowthRecipe
from incr_ds.config.training import GrowthStart, RunSettings
from incr_ds.data.samples import Samples, batches, held_out_batches
from incr_ds.errors import ConfigError
from incr_ds.growth.apply import GrownTensors
from incr_ds.growth.axis import FRESH, VALUE_RULES
from incr_ds.growth.fitted import FITTED_AXES, check_fittable
from incr_ds.growth.plan import GrowthPlan
from incr_ds.growth.planner import plan_growth
from incr_ds.model.layers import LayerFactory
from incr_ds.model.plain import LanguageModel
from incr_ds.model.tensor_parallel import TensorRanks
from incr_ds.model.weights import FreshWeights
from incr_ds.train.batches import Batch, on_device
from incr_ds.train.inputs import open_data
from incr_ds.train.optimizer import build_adamw
from incr_ds.train.schedule import learning_rate

NEIGHBOURS = (-1, 0, 1)
Report = Callable[[int, float], None]


@dataclass(frozen=True)
class Fit:
    """The recipe with its fitted operators, and the held-out loss in nats per token before and after fitting."""

    recipe: GrowthRecipe
    before: float
    after: float


def fit_growth(run: RunSettings, report: Report) -> Fit:
    """Fit the operators of ``run.model.initialize_from`` with the run's data, batches, schedule and AdamW.

    ``report`` is called with each step and its loss. Runs in one process and needs memory for several copies of the target.
    Raises ConfigError for a run file without a growth or held-out data, GrowthError for a recipe that cannot be fitted.
    """
    growth = run.model.initialize_from
    if not isinstance(growth, GrowthStart) or run.evaluation is None:
        raise ConfigError(
            "fit_growth: the run file must have model.initialize_from: {source, recipe}, the growth to fit, and evaluation with "
            "data.validation, by which it is judged."
        )
    if run.data.reset_at_document_end:
        raise ConfigError("fit_growth: data.reset_at_document_end is not supported here; remove it from this run file.")
    if run.layout.world_size > 1:
        raise ConfigError("fit_growth: runs in one process; set all degrees of layout to 1.")
    recipe = load_settings(Path(growth.recipe), GrowthRecipe).model_copy(update={"fitted": None})
    source = FiniteCheckpoint(
        open_described(Path(growth.source), run.model.tag), otherwise="no operators can be fitted to this one"
    )
    check_fittable(source.architecture, recipe, growth.recipe)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    operators = _Operators(plan_growth(source.architecture, recipe, growth.recipe), source).to(device)
    return _fit(run, recipe, operators, device, report)


def _fit(run: RunSettings, recipe: GrowthRecipe, operators: _Operators, device: torch.device, report: Report) -> Fit:
    model = _model(run, operators.plan, device)
    data = open_data(run, operators.plan.target)
    before = _held_out_loss(model, operators, data.held_out.values(), run, device)
    optimizer = build_adamw([{"params": list(operators.parameters()), "weight_decay": 0.0}], run, device)
    first = run.schedule.start_step
    start = run.data.start_sample + run.batch.samples_between(0, first)
    feed = batches(data.train, start, run.batch, 0, 1, step=first)
    for step in range(first, run.schedule.last_step):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(run.schedule, step)
        loss = _gradients(model, operators, islice(feed, run.accumulation_at(step)), device)
        if run.optimizer.gradient_clipping:
            nn.utils.clip_grad_norm_(operators.parameters(), run.optimizer.gradient_clipping)
        optimizer.step()
        optimizer.zero_grad()
        report(step - first, loss)
    after = _held_out_loss(model, operators, data.held_out.values(), run, device)
    return Fit(recipe.model_copy(update={"fitted": operators.fitted()}), before, after)


def _model(run: RunSettings, plan: GrowthPlan, device: torch.device) -> LanguageModel:
    """The target's modules. Their own values are never used."""
    alone, fresh = TensorRanks(None, 0, 1), FreshWeights(plan.target, run.seed)
    factory = LayerFactory(plan.target, alone, fresh, torch.float32, device, run.model.attention)
    return LanguageModel(factory, range(plan.target.num_layers + 3)).requires_grad_(False)


def _gradients(model: LanguageModel, operators: _Operators, micro: Iterator[Batch], device: torch.device) -> float:
    """Add up the gradients of one step and return the mean loss. The tensors are computed once for all micro-batches."""
    tensors = operators.tensors()
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in tensors.items()}
    losses = []
    for batch in micro:
        losses.append(_loss(model, leaves, batch, device))
        losses[-1].backward()
    for leaf in leaves.values():
        if leaf.grad is not None:
            leaf.grad /= len(losses)
    changing = [(tensors[name], leaf.grad) for name, leaf in leaves.items() if tensors[name].requires_grad]
    torch.autograd.backward([tensor for tensor, _ in changing], [gradient for _, gradient in changing])
    return float(torch.stack([loss.detach() for loss in losses]).mean())


def _loss(model: LanguageModel, tensors: Mapping[str, Tensor], batch: Batch, device: torch.device) -> Tensor:
    loss: Tensor = torch.func.functional_call(model, dict(tensors), on_device(batch, device)).loss
    return loss


@torch.no_grad()
def _held_out_loss(
    model: LanguageModel, operators: _Operators, sets: Iterable[Samples], run: RunSettings, device: torch.device
) -> float:
    """The mean over all held-out sets."""
    tensors, losses = operators.tensors(), []
    assert run.evaluation is not None
    for samples in sets:
        for batch in held_out_batches(samples, run.evaluation.samples, run.batch, 0, 1):
            losses.append(float(_loss(model, tensors, batch, device)))
    return float(np.mean(losses))


class _Operators(nn.Module):
    """Learned factors and weights, and the target's tensors computed from them."""

    def __init__(self, plan: GrowthPlan, source: LogicalCheckpoint) -> None:
        super().__init__()
        self.plan = plan
        grown = {name: axis for name, axis in plan.axes.items() if name in FITTED_AXES and not axis.is_identity}
        self._factors = nn.ParameterDict(
            {f"{name}_{part}": torch.ones(axis.new) for name, axis in grown.items() for part in ("amplitude", "share")}
        )
        self._weights = nn.Parameter(torch.tensor([[0.0, 1.0, 0.0]]).repeat(plan.target.num_layers, 1))
        self._axes = tuple(grown)
        reads = [GrownTensors(_shifted(plan, offset), source) for offset in NEIGHBOURS]
        for index, spec in enumerate(plan.target.stored):
            whole = tuple((0, size) for size in spec.shape)
            mixes = spec.layer is not None and plan.tensors[spec.name].start == "copy"
            read = [part.read(spec.name, "weight", whole).float() for part in (reads if mixes else reads[1:2])]
            self.register_buffer(f"_values_{index}", torch.stack(read), persistent=False)
            self.register_buffer(f"_copied_{index}", _copied(plan, spec), persistent=False)

    def tensors(self) -> dict[str, Tensor]:
        """Every stored tensor of the target."""
        return {spec.name: self._tensor(index, spec) for index, spec in enumerate(self.plan.target.stored)}

    def fitted(self) -> FittedOperators:
        """The learned values as settings."""
        axes = {
            name: FittedAxis(
                amplitude=self._factors[f"{name}_amplitude"].tolist(), share=self._factors[f"{name}_share"].tolist()
            )
            for name in self._axes
        }
        num_layers, layers = self.plan.source.num_layers, []
        for weights, mapped in zip(self._weights.tolist(), self.plan.layers, strict=True):
            summed: dict[int, float] = {}
            for offset, weight in zip(NEIGHBOURS, weights, strict=True):
                layer = _neighbour(mapped.layer, offset, num_layers)
                summed[layer] = summed.get(layer, 0.0) + weight
            layers.append(summed)
        return FittedOperators(axes=axes, layers=layers)

    def _tensor(self, index: int, spec: TensorSpec) -> Tensor:
        values, copied = getattr(self, f"_values_{index}"), getattr(self, f"_copied_{index}")
        offset = spec.offset
        if len(values) > 1:
            assert spec.layer is not None
            mixed = torch.tensordot(self._weights[spec.layer], values + offset, dims=1)
        else:
            mixed = values[0] + offset
        for dimension in range(len(spec.dims)):
            factor = self._factor(spec, dimension)
            if factor is not None:
                mixed = mixed * (factor[:, None] if dimension == 0 and len(spec.dims) > 1 else factor)
        return torch.where(copied, mixed - offset, values[len(values) // 2])

    def _factor(self, spec: TensorSpec, dimension: int) -> Tensor | None:
        """The factor along a dimension that the axes' rules (incr_ds.growth.axis) give, or None for 1."""
        use = spec.dims[dimension].use
        if spec.role == "final_norm" and self.plan.target.tied:
            use = {"scale": "tied scale", "shift": "tied shift"}[use]  # type: ignore[assignment]
        parts = []
        for part in spec.dims[dimension].parts:
            found = torch.ones(1, device=self._weights.device)
            for name in part:
                found = (found[:, None] * self._along(name, use)[None, :]).reshape(-1)
            parts.append(found)
        named = set(spec.dims[dimension].named_axes) & set(self._axes)
        return torch.cat(parts) if named else None

    def _along(self, name: str, use: str) -> Tensor:
        if name not in self._axes:
            size = int(name) if name.isdigit() else self.plan.axes[name].new
            return torch.ones(size, device=self._weights.device)
        s, w = self._factors[f"{name}_amplitude"], self._factors[f"{name}_share"]
        factor: Tensor = VALUE_RULES[use](s, w, 1.0)  # kappa stays what the recipe's own operator has
        return factor


def _shifted(plan: GrowthPlan, offset: int) -> GrowthPlan:
    """The plan with every layer copied from its source layer's neighbour."""
    count = plan.source.num_layers
    layers: Sequence[dict[int, float]] = [{_neighbour(item.layer, offset, count): 1.0} for item in plan.layers]
    recipe = plan.recipe.model_copy(update={"fitted": FittedOperators(layers=list(layers))})
    return plan_growth(plan.source, recipe)


def _neighbour(layer: int, offset: int, count: int) -> int:
    """Index of the neighbouring layer. The first and the last layer are their own neighbours beyond the ends."""
    return min(max(layer + offset, 0), count - 1)


def _copied(plan: GrowthPlan, spec: TensorSpec) -> Tensor:
    """A mask of the tensor's shape: True where an entry is copied and so changes with the learned factors."""
    if plan.tensors[spec.name].start != "copy":
        return torch.zeros(spec.shape, dtype=torch.bool)
    known = [torch.from_numpy(plan.index(spec, dimension) != FRESH) for dimension in range(len(spec.dims))]
    return known[0] if len(known) == 1 else known[0][:, None] & known[1][None, :]
