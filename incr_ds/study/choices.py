"""The ways to spend a number of FLOPs: train the source further, train the target from fresh weights, or grow it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from incr_ds.errors import ConfigError
from incr_ds.study.forecast import FLOPS_PER_PARAMETER, PredictedSaving, best_size, evidence, law_loss, predict_saving


@dataclass(frozen=True)
class Model:
    """A model's size, its training FLOPs per token, and the ``tokens`` that it was trained on."""

    parameters: float
    flops_per_token: float
    tokens: float = 0.0

    @property
    def flops(self) -> float:
        """What its training has cost."""
        return self.tokens * self.flops_per_token


@dataclass(frozen=True)
class OptionStage:
    """A part of an option: which model is trained on how many tokens."""

    model: Model
    tokens: float

    @property
    def flops(self) -> float:
        """What it costs."""
        return self.tokens * self.model.flops_per_token


@dataclass(frozen=True)
class Choice:
    """One way to spend the FLOPs, its stages in order, and the predicted loss.

    ``low`` and ``high`` follow from the band of ``saving``, which is None without growth. ``equivalent`` is what training the
    last stage's model from scratch would cost to the same loss.
    """

    name: str
    stages: tuple[OptionStage, ...]
    loss: float
    low: float
    high: float
    equivalent: float | None = None
    saving: PredictedSaving | None = None

    @property
    def tokens_per_parameter(self) -> float:
        """Tokens of all stages per parameter of the last one."""
        return sum(stage.tokens for stage in self.stages) / self.stages[-1].model.parameters

    @property
    def spent(self) -> float:
        """FLOPs that it takes from now on."""
        return sum(stage.flops for stage in self.stages)


def choices(flops: float, source: Model | None, target: Model | None) -> tuple[Choice, ...]:
    """The ways to spend ``flops``, those with the lowest predicted loss first.

    Without a ``target`` it is twice the source, or, without a source either, the best size for ``flops``. Raises ConfigError
    if the target is not larger than the source, or if ``flops`` are less than one token of the target.
    """
    goal = target or _default_target(flops, source)
    if source is not None and goal.parameters <= source.parameters:
        raise ConfigError(
            f"the target has {goal.parameters:,.0f} parameters, the source {source.parameters:,.0f}; growth only adds. Give a "
            "larger --target."
        )
    if flops < goal.flops_per_token:
        raise ConfigError(
            f"{flops:.3g} FLOPs are less than one token of the target costs ({goal.flops_per_token:.3g}); give more."
        )
    return tuple(sorted(_choices(flops, source, goal), key=lambda choice: choice.loss))


def _default_target(flops: float, source: Model | None) -> Model:
    if source is None:
        size = best_size(flops)
        return Model(size, FLOPS_PER_PARAMETER * size)
    factor = evidence().layers_factor
    return Model(source.parameters * factor, source.flops_per_token * factor)


def _choices(flops: float, source: Model | None, goal: Model) -> Iterator[Choice]:
    yield _trained("train the target from scratch", goal, flops)
    size = best_size(flops)
    if not 0.9 < size / goal.parameters < 1.1:
        yield _trained("train the best size from scratch", Model(size, FLOPS_PER_PARAMETER * size), flops)
    if source is None:
        yield _grown_anew(flops, goal)
    else:
        yield _trained("train the source further", source, flops)
        yield _grown_from(flops, source, goal)


def _trained(name: str, model: Model, flops: float) -> Choice:
    tokens = flops / model.flops_per_token
    loss = law_loss(model.parameters, model.tokens + tokens)
    return Choice(name, (OptionStage(model, tokens),), loss, loss, loss)


def _grown_anew(flops: float, goal: Model) -> Choice:
    """A small model first, as the evidence did: ``source_share`` of the tokens in a model of a part of the layers."""
    known = evidence()
    small = Model(goal.parameters / known.layers_factor, goal.flops_per_token / known.layers_factor)
    per_token = known.source_share * small.flops_per_token + (1 - known.source_share) * goal.flops_per_token
    tokens = flops / per_token
    stages = (OptionStage(small, known.source_share * tokens), OptionStage(goal, (1 - known.source_share) * tokens))
    return _grown("train a small model, then grow it", stages, goal, flops)


def _grown_from(flops: float, source: Model, goal: Model) -> Choice:
    """The source counts at most with the share of the whole that the evidence's sources had: more was not measured."""
    share = evidence().source_share
    counted = min(source.flops, flops * share * source.flops_per_token / ((1 - share) * goal.flops_per_token))
    return _grown("grow the source", (OptionStage(goal, flops / goal.flops_per_token),), goal, flops + counted)


def _grown(name: str, stages: tuple[OptionStage, ...], goal: Model, whole: float) -> Choice:
    saving = predict_saving(whole)
    loss, low, high = (
        law_loss(goal.parameters, whole / ratio / goal.flops_per_token)
        for ratio in (saving.ratio, saving.low, saving.high)
    )
    return Choice(name, stages, loss, low, high, whole / saving.ratio, saving)
