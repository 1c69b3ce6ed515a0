"""The report of a study: summary.json, one table, and a self-contained page with the figures."""

from __future__ import annotations

import json
import platform
import sys
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from incr_ds.checkpoint.publish import write_atomically
from incr_ds.report.page import document, heading, paragraph, picture, preformatted
from incr_ds.report.page import table as table_of
from incr_ds.study.figures import draw_study_figures
from incr_ds.study.summary import Results, summary

PACKAGES = ("torch", "deepspeed", "transformers", "megatron-core", "numpy")
HEADINGS = {"r_target": "R_target", "r_sunk": "R_sunk", "r_frontier": "R_frontier"}
ENDS = {"loss": 4, "cloze": 3, "repetition_gain": 2}  # measures in the table, with their digits
HOW_TO_READ = (
    "R_target is what an arm costs to reach the loss of the same model trained from scratch, relative to what that cost, "
    "with the source's pre-training counted. R_sunk leaves the source out, as for a source that exists anyway. R_frontier "
    "compares with the cheapest of several sizes trained from scratch. Below 1, growth saves. Only losses after the "
    "learning rate's decay count. A range is that over seeds; < and > mark bounds, where the branches do not enclose "
    "scratch's loss."
)


def write_study_report(results: Results, folder: Path, command: str) -> dict[str, Any]:
    """Write summary.json, table.md, the figures and report.html into ``folder``. Returns the summary."""
    folder.mkdir(parents=True, exist_ok=True)
    content = {**summary(results), "command": command, "versions": versions()}
    figures = draw_study_figures(results, folder)
    write_atomically(folder / "summary.json", json.dumps(content, indent=1, allow_nan=False) + "\n")
    write_atomically(folder / "table.md", markdown(table(content)))
    write_atomically(folder / "report.html", _page(results, content, figures))
    return content


def versions() -> dict[str, str]:
    """Versions of what the numbers depend on."""
    found = {name: version(name) for name in PACKAGES}
    return {"python": sys.version.split()[0], "machine": f"{platform.system()} {platform.machine()}", **found}


def table(content: Mapping[str, Any]) -> list[list[str]]:
    """One row an arm: what it is, its rate, the three ratios at every budget, and the loss at its end."""
    budgets = sorted({budget for arm in content["arms"].values() for budget in arm["r_target"]}, key=int)
    head = ["arm", "what it is", "parameters", "learning rate"]
    head += [f"{title}({budget})" for budget in budgets for title in HEADINGS.values()]
    rows = [[*head, "final loss", "cloze", "repetition gain"]]
    for name, arm in content["arms"].items():
        rate = "" if arm["learning_rate"] is None else f"{arm['learning_rate']:g}"
        cells = [shown(arm[ratio].get(budget)) for budget in budgets for ratio in HEADINGS]
        measures = arm["measures"]
        ends = [f"{measures[key]:.{digits}f}" if key in measures else "" for key, digits in ENDS.items()]
        rows.append([name, arm["purpose"], f"{arm['parameters']:,}", rate, *cells, *ends])
    return rows


def shown(made: Mapping[str, Any] | None) -> str:
    """A ratio with its band, such as 0.84 (0.82 to 0.86)."""
    if made is None:
        return ""
    sign = {"above": "> ", "below": "< "}.get(made["bound"] or "", "")
    spread = "" if made["seeds"] == 1 else f" ({made['low']:.2f} to {made['high']:.2f})"
    return f"{sign}{made['value']:.2f}{spread}"


def markdown(rows: list[list[str]]) -> str:
    """Rows as a Markdown table, the first as its head."""
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]]) + "\n"


def _page(results: Results, content: Mapping[str, Any], figures: Mapping[str, Path]) -> str:
    study = results.design.study
    head, *rows = table(content)
    after = {name: arm["after_growth"] for name, arm in content["arms"].items() if arm["after_growth"]}
    texts = {
        "Training loss after growth (first seed, largest budget)": _json(after),
        "Search for learning rates, not counted above": _json(content["learning_rate_search"]),
        "Early losses against the final ranking": _json(content["probe"]),
        "Command and versions": f"{content['command']}\n{_json(content['versions'])}",
        "Study": yaml.safe_dump(study.model_dump(mode="json"), sort_keys=False),
    }
    parts = [
        heading(f"Growth against scratch, {content['target_parameters']:,} parameters", 1),
        paragraph(HOW_TO_READ),
        table_of(rows, head),
    ]
    for title, path in figures.items():
        parts += [heading(title), picture(title, path.read_bytes())]
    for title, text in texts.items():
        parts += [heading(title), preformatted(text)]
    return document("Growth study", parts, "body { max-width: 90rem }")


def _json(content: Any) -> str:
    return json.dumps(content, indent=1)
