"""The figures of a study: decayed loss over cost with the Pareto front, the ratios over the budget, and training curves."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

from incr_ds.report.drawing import colours, new_figure, png_of
from incr_ds.study.savings import Branch
from incr_ds.study.summary import RATIOS, Results, bands
from incr_ds.train.metrics import FILE, read_metrics

TITLES = {
    "r_target": "R_target: source counted",
    "r_sunk": "R_sunk: source not counted",
    "r_frontier": "R_frontier: against the cheapest size",
}


def draw_study_figures(results: Results, folder: Path) -> dict[str, Path]:
    """Draw every figure into ``folder`` as PNG. Returns the paths by title."""
    drawn = {
        "Decayed loss over total FLOPs": (folder / "loss_over_flops.png", _draw_costs),
        "What growth costs, relative to training from scratch": (folder / "ratios.png", _draw_ratios),
        "Held-out loss along the trunks": (folder / "curves.png", _draw_curves),
    }
    for path, draw in drawn.values():
        draw(results, path)
    return {title: path for title, (path, _) in drawn.items()}


def _figure(columns: int = 1, **shared: Any) -> tuple[Any, Any]:
    return new_figure(5.2 * columns + 3, 4.8, columns, **shared)


def _save(figure: Any, path: Path) -> None:
    if any(axes.get_legend_handles_labels()[0] for axes in figure.axes):
        figure.legend(loc="outside right upper", fontsize=8)
    path.write_bytes(png_of(figure))


def _draw_costs(results: Results, path: Path) -> None:
    """Every arm's branches: the mean over seeds with the lowest and highest, and the front that no other branch is below."""
    figure, (axes,) = _figure()
    palette, points = colours(results.design.study.arms), []
    for arm, own in results.design.study.arms.items():
        places: dict[tuple[int, int], list[Branch]] = defaultdict(list)
        for branch in results.of(arm):
            places[branch.budget if own.growth else 0, branch.position].append(branch)
        for number, budget in enumerate(sorted({budget for budget, _ in places})):
            line = sorted(
                (_mean_point(over) for (of, _), over in places.items() if of == budget), key=lambda item: item[0]
            )
            points += line
            costs, losses, lows, highs = (list(column) for column in zip(*line, strict=True))
            style = {"color": palette[arm], "label": None if number else arm, "marker": "o", "markersize": 4}
            axes.plot(costs, losses, linestyle="-" if own.growth else "--", **style)
            axes.fill_between(costs, lows, highs, color=palette[arm], alpha=0.2)
    front = _front([(cost, loss) for cost, loss, *_ in points])
    if front:
        axes.step(
            *zip(*front, strict=True), where="post", color="black", linewidth=0.8, alpha=0.5, label="Pareto front"
        )
    axes.set(
        xscale="log",
        xlabel="total FLOPs (source, teacher and decay counted)",
        ylabel="held-out loss after decay (nats per token)",
    )
    axes.grid(alpha=0.25, which="both")
    _save(figure, path)


def _mean_point(over: list[Branch]) -> tuple[float, float, float, float]:
    losses = [branch.loss for branch in over]
    return sum(branch.flops for branch in over) / len(over), sum(losses) / len(losses), min(losses), max(losses)


def _front(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points that no cheaper point has a lower loss than, in order of cost."""
    front: list[tuple[float, float]] = []
    for cost, loss in sorted(points):
        if not front or loss < front[-1][1]:
            front.append((cost, loss))
    return front


def _draw_ratios(results: Results, path: Path) -> None:
    """The three ratios over the budget. A triangle marks a bound: the branches did not enclose the loss of scratch."""
    figure, columns = _figure(3, sharey=True)
    palette, study = colours(results.design.study.arms), results.design.study
    for axes, ratio in zip(columns, RATIOS, strict=True):
        for arm, own in study.arms.items():
            found = {budget: bands(results, arm, budget) for budget in study.tokens_per_parameter if own.growth}
            made = {budget: item[ratio] for budget, item in found.items() if ratio in item}
            if not made:
                continue
            axes.plot(
                list(made),
                [item.value for item in made.values()],
                color=palette[arm],
                label=arm if ratio == RATIOS[0] else None,
            )
            for budget, item in made.items():
                marker = {"above": "^", "below": "v"}.get(item.bound or "", "o")
                axes.plot([budget], [item.value], marker=marker, color=palette[arm])
                axes.plot([budget, budget], [item.low, item.high], color=palette[arm], linewidth=2, alpha=0.5)
        axes.axhline(1.0, color="black", linewidth=0.8)
        axes.set(title=TITLES[ratio], xlabel="budget (tokens per parameter)", xscale="log")
        axes.minorticks_off()
        axes.set_xticks(study.tokens_per_parameter, [str(budget) for budget in study.tokens_per_parameter])
    columns[0].set_ylabel("cost relative to scratch")
    _save(figure, path)


def _draw_curves(results: Results, path: Path) -> None:
    """Held-out loss along every trunk at the chosen rate and the largest budget, before any decay, with a band over seeds.

    A branch that is known from another machine has no curve here.
    """
    figure, (axes,) = _figure()
    palette, design = colours(results.design.study.arms), results.design
    for arm in design.study.arms:
        at: dict[int, list[float]] = defaultdict(list)
        for job, _ in results.measured:
            measured = job.measured
            if measured is None or job.start is None or job.known or job.trunk.arm != arm:
                continue
            chosen = [branch for branch in results.of(arm, job.trunk.seed) if branch.rate == job.trunk.rate]
            last = design.study.budgets(arm)[-1]
            if chosen and measured.budget == last and measured.fraction == design.study.arms[arm].branches[-1]:
                for step, loss in _held_out(job.start.parents[1]):
                    at[step + job.trunk.first].append(loss)
        steps = sorted(step for step in at if step)
        tokens = [step * design.step_tokens for step in steps]
        if tokens:
            axes.plot(
                tokens, [sum(at[step]) / len(at[step]) for step in steps], color=palette[arm], label=arm, linewidth=1
            )
            axes.fill_between(
                tokens, [min(at[s]) for s in steps], [max(at[s]) for s in steps], color=palette[arm], alpha=0.2
            )
    axes.set(xlabel="training tokens", ylabel="held-out loss before decay (nats per token)")
    _save(figure, path)


def _held_out(run: Path) -> list[tuple[int, float]]:
    return [(row["step"], row["loss"]) for row in read_metrics(run / FILE) if row["kind"] == "evaluation"]
