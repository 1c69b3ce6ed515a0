"""The study file: arms that are compared, their budgets and seeds, and the run-file sections that they share."""

from __future__ import annotations

from collections.abc import Collection
from itertools import pairwise
from typing import Annotated, Any, Self

from pydantic import Field, field_validator, model_validator

from incr_ds.config.batch import BatchSettings
from incr_ds.config.fields import Seed, Settings

Budget = Annotated[int, Field(ge=1)]
Rate = Annotated[float, Field(gt=0.0)]
SHARED = ("batch", "data")  # sections that common must have
DECIDED = ("output", "seed", "model", "layout", "schedule", "growth", "distillation")  # keys that it must not have
MOST_OF_BUDGET = 2  # a grown arm may need more tokens than scratch, since each of its tokens costs less


class TaughtSettings(Settings):
    """Distillation by the source over the first ``share`` of an arm's steps after growth, annealed linearly."""

    weight: float = Field(default=0.5, gt=0.0, le=1.0)
    final_weight: float = Field(default=0.0, ge=0.0, le=1.0)
    share: float = Field(default=0.2, gt=0.0, le=1.0)


class GrowthArm(Settings):
    """Where an arm's model comes from: arm ``source``, at the fraction ``at`` of the budget's tokens.

    ``recipe`` is a growth recipe without ``target``, which follows from the two models. With ``decayed`` the source's learning
    rate has fallen before growth, as in a model that was published; otherwise growth starts from the trunk.
    """

    source: str
    at: float = Field(ge=0.0, lt=1.0)
    recipe: dict[str, Any]
    decayed: bool = False


class ArmSettings(Settings):
    """One way to train ``model``, from fresh weights or, with ``growth``, from a smaller arm.

    ``budgets`` are data positions in tokens per parameter of the study's target (None: the study's own). For each budget, the
    learning rate is decayed at the fractions ``branches`` of it, which may be past it, and a loss is measured after each
    decay. ``learning_rates`` are all tried with the first seed; the best at the largest budget serves the other seeds.
    ``seeds`` (None: the study's) limits an arm to fewer. ``warmup_steps`` and ``warmup_from`` are a re-warm-up in a grown arm.
    """

    model: str
    purpose: str
    learning_rates: list[Rate] = Field(min_length=1)
    growth: GrowthArm | None = None
    budgets: list[Budget] | None = None
    branches: list[float] = Field(default_factory=lambda: [1.0])
    seeds: list[Seed] | None = None
    warmup_steps: int = Field(default=0, ge=0)
    warmup_from: float = Field(default=0.0, ge=0.0, le=1.0)
    distillation: TaughtSettings | None = None

    @field_validator("branches")
    @classmethod
    def _ascending_fractions(cls, value: list[float]) -> list[float]:
        if not value or value[0] <= 0 or value[-1] > MOST_OF_BUDGET or any(a >= b for a, b in pairwise(value)):
            raise ValueError(f"expected ascending fractions of the budget, above 0 and at most {MOST_OF_BUDGET}")
        return value


class StudySettings(Settings):
    """A study of growth. The arm ``scratch`` trains the target from fresh weights; costs are relative to it.

    ``models`` are Hugging Face configs by name, and ``target`` is one of them. ``tokens_per_parameter`` are the budgets, in
    tokens per parameter of the target (embeddings counted). The last ``decay`` of a branch's tokens are linear decay to 0.
    ``common`` holds sections of a run file. ``held_out`` names data sets by domain; the loss of the study is the mean of
    theirs over ``held_out_samples`` each. ``known`` are summaries of the same study that were written elsewhere, on another
    machine or before the study had more seeds: their branches, at the learning rates that were chosen, are not run again.
    ``frontier`` lists the arms whose cheapest is the frontier. ``processes`` runs train side by side, with ``threads``
    threads each.
    """

    output: str
    target: str
    models: dict[str, str]
    seeds: list[Seed] = Field(min_length=1)
    tokens_per_parameter: list[Budget] = Field(min_length=1)
    decay: float = Field(default=0.2, gt=0.0, lt=1.0)
    common: dict[str, Any]
    held_out: dict[str, str] = Field(min_length=1)
    held_out_samples: int = Field(default=256, ge=4)
    known: list[str] = Field(default_factory=list)
    frontier: list[str] = Field(default_factory=lambda: ["scratch"])
    processes: int = Field(default=1, ge=1)
    threads: int = Field(default=1, ge=1)
    arms: dict[str, ArmSettings]

    @field_validator("common")
    @classmethod
    def _states_what_is_shared(cls, value: dict[str, Any]) -> dict[str, Any]:
        if lacking := [name for name in SHARED if not isinstance(value.get(name), dict)]:
            raise ValueError(f"no section {' and '.join(lacking)}; expected the run-file sections that all runs share")
        if decided := [name for name in DECIDED if name in value]:
            raise ValueError(f"{', '.join(decided)}: the study decides this for every run; remove it")
        if BatchSettings.model_validate(value["batch"]).ramp:
            raise ValueError("common.batch.ramp: a study counts its budgets in steps of one size; remove it")
        return value

    @model_validator(mode="after")
    def _names_exist(self) -> Self:
        if "scratch" not in self.arms or self.arms["scratch"].model != self.target or self.arms["scratch"].growth:
            raise ValueError(f"arms.scratch: expected an arm that trains {self.target} without growth")
        named: list[tuple[str, str, Collection[str]]] = [("target", self.target, self.models)]
        named += [(f"arms.{arm}.model", own.model, self.models) for arm, own in self.arms.items()]
        named += [("frontier", arm, self.arms) for arm in self.frontier]
        for key, name, among in named:
            if name not in among:
                raise ValueError(f"{key}: {name!r} is not defined; known: {', '.join(among)}")
        return self

    @model_validator(mode="after")
    def _sources_come_first(self) -> Self:
        before: set[str] = set()
        for name, arm in self.arms.items():
            if unknown := set(arm.seeds or ()) - set(self.seeds):
                raise ValueError(f"arms.{name}.seeds: {sorted(unknown)} are not among the study's seeds {self.seeds}")
            if arm.growth and arm.growth.source not in before:
                raise ValueError(f"arms.{name}.growth.source: {arm.growth.source!r} is not an arm above {name}")
            if arm.growth and (lacking := set(self.arm_seeds(name)) - set(self.arm_seeds(arm.growth.source))):
                raise ValueError(
                    f"arms.{name}.seeds: {sorted(lacking)} are not seeds of its source {arm.growth.source}"
                )
            before.add(name)
        return self

    @model_validator(mode="after")
    def _growth_before_decay(self) -> Self:
        for name, arm in self.arms.items():
            if arm.growth and arm.growth.at >= arm.branches[0] * (1 - self.decay):
                raise ValueError(
                    f"arms.{name}: growth.at {arm.growth.at} is not before the decay of the first branch, which starts at "
                    f"{arm.branches[0] * (1 - self.decay):.3g} of the budget"
                )
        return self

    def budgets(self, arm: str) -> list[int]:
        """The budgets of ``arm`` in ascending order."""
        return sorted(self.arms[arm].budgets or self.tokens_per_parameter)

    def arm_seeds(self, arm: str) -> list[int]:
        """The seeds of ``arm``, in the study's order."""
        own = self.arms[arm].seeds or self.seeds
        return [seed for seed in self.seeds if seed in own]
