"""Collects the results of a study that are there, and computes its numbers."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from incr_ds.checkpoint.runs import step_of
from incr_ds.study.design import Design, StudyJob, identity, jobs
from incr_ds.study.execution import best_rate, is_done, result_of
from incr_ds.study.savings import Band, Branch, Currency, band, ratios
from incr_ds.train.metrics import FILE, read_metrics

EARLY_STEPS = (1, 16, 128, 1000)
SPIKE_STEPS, WINDOW = 200, 8  # steps after growth in which a spike is looked for; steps that are averaged
RATIOS = ("r_target", "r_sunk", "r_frontier")


@dataclass(frozen=True)
class Results:
    """The results of a study: the branches at the chosen learning rates, and all of them with what was measured."""

    design: Design
    chosen: tuple[Branch, ...]
    measured: tuple[tuple[StudyJob, dict[str, Any]], ...]

    def of(self, arm: str, seed: int | None = None, budget: int | None = None) -> list[Branch]:
        """Branches of ``arm`` at its chosen rate, in order of position."""
        found = [
            branch
            for branch in self.chosen
            if branch.arm == arm and seed in (None, branch.seed) and budget in (None, branch.budget)
        ]
        return sorted(found, key=lambda branch: (branch.seed, branch.budget, branch.position))


def collect(design: Design) -> Results:
    """Read every result that exists."""
    measured = tuple((job, result) for job in jobs(design) if job.measured and (result := result_of(job)))
    chosen = tuple(
        _branch(job, result)
        for job, result in measured
        if job.measured and "loss" in result and best_rate(design, job.trunk.arm) == job.trunk.rate
    )
    return Results(design, chosen, measured)


def bands(results: Results, arm: str, budget: int, currency: Currency = "flops") -> dict[str, Band]:
    """The three ratios of ``arm`` at ``budget`` over the seeds that it has in common with scratch."""
    study, found = results.design.study, defaultdict(list)
    for seed in study.arm_seeds(arm):
        own = results.of(arm, seed, budget if study.arms[arm].growth else None)
        scratch = [
            branch for branch in results.of("scratch", seed, budget) if branch.position == results.design.steps(budget)
        ]
        if own and scratch and _is_complete(results, arm, seed, budget, own):
            frontier = {name: results.of(name, seed) for name in study.frontier}
            for name, ratio in ratios(own, scratch[0], frontier, currency).items():
                found[name].append(ratio)
    return {name: made for name, over in found.items() if (made := band(over))}


def summary(results: Results) -> dict[str, Any]:
    """The numbers of a study as JSON content. ``r_*`` at the top are the best arm's, by tokens per parameter."""
    study, design = results.design.study, results.design
    arms = {arm: _arm(results, arm) for arm in study.arms if results.of(arm)}
    best = best_arm(results)
    top = {name: {} if best is None else arms[best][name] for name in RATIOS}
    return {
        "settings": identity(study, design.models),
        "target_parameters": design.models[study.target].num_parameters,
        "best_arm": best,
        "seeds": [] if best is None else [seed for seed in study.arm_seeds(best) if results.of(best, seed)],
        **top,
        "arms": arms,
        "complete": sum(1 for _ in results.measured),
        "branches": [asdict(branch) for branch in results.chosen],
        "learning_rate_search": _search(results),
        "probe": probe_agreement(results),
    }


def best_arm(results: Results) -> str | None:
    """The grown arm with the lowest R_target at the largest budget that any grown arm was measured at.

    Only the arms with the most seeds are compared: a band of fewer seeds may be low by luck. Among them, an arm that reaches
    scratch's loss with every seed comes before one that does not.
    """
    study = results.design.study
    for budget in sorted(study.tokens_per_parameter, reverse=True):
        found = {
            arm: made["r_target"]
            for arm, own in study.arms.items()
            if own.growth and budget in study.budgets(arm) and (made := bands(results, arm, budget))
        }
        if found:
            most = max(made.seeds for made in found.values())
            compared = [arm for arm, made in found.items() if made.seeds == most]
            return min(compared, key=lambda arm: (found[arm].bound == "above", found[arm].value))
    return None


def probe_agreement(results: Results) -> dict[str, Any]:
    """How well early losses after growth rank the arms: Spearman's correlation with R_target at the largest budget."""
    study = results.design.study
    budget = max(study.tokens_per_parameter)
    final = {
        arm: made["r_target"].value
        for arm, own in study.arms.items()
        if own.growth and (made := bands(results, arm, budget))
    }
    agreement = {}
    for step in EARLY_STEPS:
        early = {arm: loss for arm in final if (loss := early_losses(results, arm, budget).get(str(step))) is not None}
        if len(early) >= 3:
            agreement[str(step)] = spearman([early[arm] for arm in early], [final[arm] for arm in early])
    return {"budget": budget, "arms": len(final), "rank_correlation": agreement}


def spearman(first: list[float], second: list[float]) -> float:
    """Spearman's rank correlation of two lists without ties."""
    one, other = ([sorted(values).index(value) for value in values] for values in (first, second))
    count = len(first)
    return 1.0 - 6.0 * sum((a - b) * (a - b) for a, b in zip(one, other, strict=True)) / (count * (count * count - 1))


def early_losses(results: Results, arm: str, budget: int) -> dict[str, float]:
    """Training loss before growth, after 1, 16, 128 and 1000 steps, and the largest in the first 200 (``spike``).

    Of the arm's first seed. Losses are means over 8 steps, except after 1. Empty for an arm that did not grow.
    """
    found = [job for job, _ in results.measured if _is_chosen(results, job, arm, budget)]
    if found and found[-1].known is not None:
        return dict(found[-1].known.get("after_growth", {}))
    job = next(iter(found), None)
    if job is None or not job.of_source or job.start is None:
        return {}
    losses = training_losses(job.start.parents[1])
    source = job.before[job.of_source - 1]
    before = training_losses(source.parents[1])
    step = step_of(source)
    early = {"before": mean_loss(before, step)}
    early |= {
        str(after): losses[after] if after == 1 else mean_loss(losses, after)
        for after in EARLY_STEPS
        if after in losses
    }
    early["spike"] = max(mean_loss(losses, after) for after in range(1, min(SPIKE_STEPS, max(losses)) + 1))
    return early


def _arm(results: Results, arm: str) -> dict[str, Any]:
    study, design = results.design.study, results.design
    own = study.arms[arm]
    found = {str(budget): bands(results, arm, budget) for budget in study.tokens_per_parameter}
    seconds = {str(budget): bands(results, arm, budget, "seconds") for budget in study.tokens_per_parameter}
    largest = study.budgets(arm)[-1]
    return {
        "purpose": own.purpose,
        "model": own.model,
        "parameters": design.models[own.model].num_parameters,
        "learning_rate": best_rate(design, arm),
        **{name: {budget: asdict(made[name]) for budget, made in found.items() if name in made} for name in RATIOS},
        "r_target_seconds": {
            budget: asdict(made["r_target"]) for budget, made in seconds.items() if "r_target" in made
        },
        "after_growth": early_losses(results, arm, largest),
        "measures": _last_measures(results, arm, largest),
    }


def _last_measures(results: Results, arm: str, budget: int) -> dict[str, Any]:
    """What was measured after the arm's last branch at ``budget``, with its first seed."""
    keys = ("loss", "losses", "bits_per_byte", "cloze", "repetition_gain", "layer_distance", "effective_rank")
    found = [result for job, result in results.measured if _is_chosen(results, job, arm, budget)]
    last = {} if not found else found[-1].get("measures", found[-1])  # a known branch has them apart
    return {key: last[key] for key in keys if key in last}


def _is_chosen(results: Results, job: StudyJob, arm: str, budget: int) -> bool:
    measured, study = job.measured, results.design.study
    return (
        measured is not None
        and job.trunk.arm == arm
        and measured.budget == budget
        and job.trunk.seed == study.arm_seeds(arm)[0]
        and job.trunk.rate == best_rate(results.design, arm)
    )


def _is_complete(results: Results, arm: str, seed: int, budget: int, found: list[Branch]) -> bool:
    """Whether all branches of a grown arm at ``budget`` are measured: before that, a bound would say nothing."""
    own = results.design.study.arms[arm]
    if own.growth is None:
        return True
    return len(found) == len({results.design.steps(budget * fraction) for fraction in own.branches})


def _search(results: Results) -> dict[str, Any]:
    """FLOPs of the runs at learning rates that were not chosen, and the final loss at every rate that was tried."""
    design, study = results.design, results.design.study
    tried: dict[str, dict[str, float]] = defaultdict(dict)
    for job, result in results.measured:
        first = job.trunk.seed == study.arm_seeds(job.trunk.arm)[0]
        if first and job.measured and job.measured.budget == study.budgets(job.trunk.arm)[-1] and "loss" in result:
            tried[job.trunk.arm][f"{job.trunk.rate:g}"] = result["loss"]
    lost = (
        job.flops
        for job in jobs(design)
        if is_done(job) and best_rate(design, job.trunk.arm) not in (None, job.trunk.rate)
    )
    return {"flops": sum(lost), "losses": {arm: losses for arm, losses in tried.items() if len(losses) > 1}}


def _branch(job: StudyJob, result: Mapping[str, Any]) -> Branch:
    assert job.measured is not None
    trunk = job.trunk
    return Branch(
        arm=trunk.arm,
        seed=trunk.seed,
        rate=trunk.rate,
        budget=job.measured.budget,
        position=job.measured.position,
        loss=result["loss"],
        flops=result["flops"],
        source_flops=result["source_flops"],
        seconds=result["seconds"],
        source_seconds=result["source_seconds"],
        repetition_gain=result.get("repetition_gain"),
    )


def training_losses(folder: Path) -> dict[int, float]:
    """Training cross entropy of a run by step."""
    return {row["step"]: row["ce"] for row in _train_rows(folder)}


def _train_rows(folder: Path) -> Iterator[Mapping[str, Any]]:
    return (row for row in read_metrics(folder / FILE) if row["kind"] == "train")


def mean_loss(losses: Mapping[int, float], last: int) -> float:
    """The mean loss over the ``WINDOW`` steps that end with ``last``, as far as they exist."""
    found = [losses[step] for step in range(last - WINDOW + 1, last + 1) if step in losses]
    return sum(found) / len(found)
