"""Advises on the training after a growth, with a run-file fragment that gives the reason of every number."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import yaml

from incr_ds.config.optimizer import OptimizerSettings
from incr_ds.growth.axis import FRESH
from incr_ds.growth.plan import GrowthPlan
from incr_ds.growth.published import rate_near

FILE = "advice.yaml"
WARMUP = "1%"  # of train_steps
CAUTIOUS = 0.1  # of the peak, where a re-warm-up starts
INEXACT = (
    "after stacked copies the source's did better than half of it in docs/study.md (0.27M parameters, one seed); try some: "
    "G_stack (arXiv 2405.15319) trained larger targets at lower peaks, from 6e-4 for 410M parameters to 1e-4 for 7B"
)
HEADER = """\
# Settings for training after this growth. launchers/pretrain.py takes several files, and later ones override earlier ones:
#   --config RUN.yaml --config this file
"""


@dataclass(frozen=True)
class Advice:
    """A key in a section of the run file, and the reason of its value. Without a ``key`` it is a remark."""

    section: str
    reason: str
    key: str | None = None
    value: Any = None


@dataclass(frozen=True)
class Trained:
    """What is known about the source's training.

    That is its run file's settings (of our own runs), the AdamW settings of its parameter groups without multipliers (none
    if it took no step), and whether some tensors have no moments because they were frozen.
    """

    settings: Mapping[str, Any]
    groups: Sequence[Mapping[str, Any]]
    frozen: bool

    @property
    def last_rate(self) -> float | None:
        """The learning rate of the last step."""
        return max((float(group["lr"]) for group in self.groups), default=None)

    @property
    def peak(self) -> float | None:
        """The learning rate after warm-up, or the last one without a run file."""
        stated = self.settings.get("schedule", {}).get("learning_rate")
        return self.last_rate if stated is None else float(stated)

    @property
    def betas(self) -> tuple[float, float] | None:
        """AdamW's."""
        return tuple(self.groups[0]["betas"]) if self.groups else None


def advise(plan: GrowthPlan, source: Trained, gradient_ratio: float | None) -> tuple[Advice, ...]:
    """Settings for training after ``plan``; empty if it changes neither sizes nor layers.

    ``gradient_ratio`` is the norm of the target's gradient divided by the source's, or None if it is not known.
    """
    if not plan.grows:
        return ()
    clipping = _clipping(plan, source, gradient_ratio)
    return (*_rate(plan, source), *_warmup(plan, source), *_adamw(plan, source), *clipping, *_freezing(plan))


def advice_text(advices: Sequence[Advice]) -> str:
    """Format ``advices`` as YAML with comments; "" if there are none."""
    lines = [HEADER] if advices else []
    for section, items in groupby(advices, key=lambda item: item.section):
        found = list(items)
        prefix = "" if any(item.key for item in found) else "# "
        lines.append(f"{prefix}{section}:\n")
        for item in found:
            lines.append(f"  # {item.reason}\n")
            if item.key is not None:
                lines.append(f"  {item.key}: {_flow(item.value)}\n")
    return "".join(lines)


def starts_anew(plan: GrowthPlan, source: Trained) -> bool:
    """Whether the target's moments start at zero."""
    return plan.recipe.optimizer == "reset" or plan.recipe.layout.format == "huggingface" or not source.groups


def _rate(plan: GrowthPlan, source: Trained) -> Iterator[Advice]:
    if source.peak is None and (rate := rate_near(plan.target.num_parameters)) is not None:
        reason = (
            "published, not this source's, which does not state its own: the median of peaks from scratch near "
            f"{plan.target.num_parameters:,} parameters ({rate.of})"
        )
        yield Advice("schedule", reason, "learning_rate", rate.value)
        return
    if source.peak is None:
        which = "after a function-preserving growth its maximum is the one to take (LEMON, arXiv 2310.07999)"
        if not plan.function_preserving:
            which = INEXACT
        yield Advice("schedule", f"learning_rate: the source does not state its own; {which}")
        return
    reason = "the source's maximum, which LEMON (arXiv 2310.07999) keeps after a function-preserving growth: lower ones did worse"
    if not plan.function_preserving:
        reason = f"the source's maximum; {INEXACT}"
    yield Advice("schedule", reason, "learning_rate", source.peak)


def _warmup(plan: GrowthPlan, source: Trained) -> Iterator[Advice]:
    start, reason = _warmup_start(plan, source)
    if start == 1.0:
        yield Advice("schedule", reason, "warmup_steps", 0)
        return
    yield Advice("schedule", reason, "warmup_from", start)
    if not source.groups:
        beta = OptimizerSettings().betas[1]
        share = (
            "a share of train_steps, as in Pythia (arXiv 2304.01373); the source's Adam is not known. Second moments "
            f"need about {_settled(beta)} steps with the run file's default {beta:g}"
        )
        yield Advice("schedule", share, "warmup_steps", WARMUP)
        return
    beta = float(source.groups[0]["betas"][1])
    reason = (
        f"2 / (1 - beta2) with the source's {beta:g}: Adam's second moments have then settled "
        "(Ma and Yarats, arXiv 1910.04209)"
    )
    yield Advice("schedule", reason, "warmup_steps", _settled(beta))


def _settled(beta: float) -> int:
    """Number of steps after which Adam's second moments have settled."""
    return round(2.0 / (1.0 - beta))


def _warmup_start(plan: GrowthPlan, source: Trained) -> tuple[float, str]:
    """The fraction of the peak to start at, and the reason."""
    if starts_anew(plan, source):
        return 0.0, "the moments start at zero"
    last, peak = source.last_rate or 0.0, source.peak or 1.0
    share = min(1.0, last / peak)
    if source.frozen or _has_new_entries(plan):
        what = (
            "tensors that were frozen have no moments"
            if source.frozen
            else "new entries have estimated moments, or none"
        )
        return _rounded(min(share, CAUTIOUS)), f"{what}; {CAUTIOUS:g} is a cautious choice, not a measured one"
    if share < 1.0:
        return _rounded(share), f"the source's last step took {last:.3g}: continue from there"
    return 1.0, "moments continue where the source's stopped, at its learning rate"


def _has_new_entries(plan: GrowthPlan) -> bool:
    """Whether something in the target has no moments in the source."""
    fresh = any(FRESH in axis.index for axis in plan.axes.values())
    return fresh or plan.recipe.optimizer == "reset-new" or any(layer.is_new for layer in plan.layers)


def _adamw(plan: GrowthPlan, source: Trained) -> Iterator[Advice]:
    if starts_anew(plan, source):
        return
    decay = max(float(group["weight_decay"]) for group in source.groups)
    found = {"betas": list(source.betas or ()), "eps": float(source.groups[0]["eps"]), "weight_decay": decay}
    for key, value in found.items():
        yield Advice("optimizer", "the source's, with which its moments were computed", key, value)


def _clipping(plan: GrowthPlan, source: Trained, ratio: float | None) -> Iterator[Advice]:
    if ratio is None:
        why = (
            "the source has no second moments to compute it from"
            if plan.function_preserving
            else "this growth does not keep the function"
        )
        yield Advice("optimizer", f"gradient_clipping: how the norm of the gradients changes is not known, since {why}")
        return
    how = f"{ratio:.3g} times the source's norm of all gradients, by its exp_avg_sq and the growth's factors"
    threshold = source.settings.get("optimizer", {}).get("gradient_clipping")
    if not threshold:
        known = "was trained without" if threshold == 0.0 else "does not state its own"
        yield Advice(
            "optimizer", f"gradient_clipping: multiply the threshold by {ratio:.3g}; the source {known} ({how})"
        )
        return
    reason = f"the source's {threshold:g}, times {ratio:.3g}: {how}"
    yield Advice("optimizer", reason, "gradient_clipping", _rounded(threshold * ratio))


def _freezing(plan: GrowthPlan) -> Iterator[Advice]:
    if plan.recipe.recipe != "llama-pro":
        return
    layers = [layer for layer, source in enumerate(plan.layers) if source.is_new]
    first = {spec.layer: spec for spec in plan.target.stored}
    kept = [first[layer].name.partition(f".{layer}.")[0] + f".{layer}.*" for layer in layers]
    if kept:
        reason = "LLaMA-Pro (arXiv 2401.02415) trains the new layers alone"
        yield Advice("model", reason, "freeze", ["*", *(f"!{pattern}" for pattern in kept)])


def _rounded(value: float) -> float:
    return float(f"{value:.3g}")


def _flow(value: Any) -> str:
    return yaml.safe_dump(value, default_flow_style=True, width=1 << 20).removesuffix("...\n").strip()
