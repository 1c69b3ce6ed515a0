"""What a benchmark has found: a JSON file, a page with a table, and the same table on the console."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table


@dataclass(frozen=True)
class ResultTable:
    """A table. Each row has as many cells as there are headings."""

    title: str
    headings: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]

    def markdown(self) -> list[str]:
        """Its lines in a Markdown page."""
        return [
            "| " + " | ".join(self.headings) + " |",
            "|" + "---|" * len(self.headings),
            *("| " + " | ".join(cells) + " |" for cells in self.rows),
        ]

    def on_console(self) -> Table:
        """The table as rich draws it."""
        table = Table(*self.headings, title=self.title, title_justify="left")
        for cells in self.rows:
            table.add_row(*cells)
        return table


def write_results(
    path: Path, heading: str, summary: Mapping[str, Any], table: ResultTable, sentences: Sequence[str] = ()
) -> None:
    """Write ``path``.json, and ``path``.md with the summary's ``machine`` and ``work``, the table and the sentences."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    facts = ", ".join(f"{key} {value}" for key, value in {**summary["machine"], **summary["work"]}.items())
    lines = [f"# {heading}", "", f"{facts}.", "", *table.markdown()]
    lines += ["", *(f"- {line}" for line in sentences)] if sentences else []
    path.with_suffix(".md").write_text("\n".join(lines) + "\n", encoding="utf-8")
