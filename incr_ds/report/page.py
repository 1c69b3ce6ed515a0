"""Parts of a self-contained HTML page. Every function escapes the text that it is given.

A page loads nothing: pictures are in it, it has no scripts, and its own policy forbids any request.
"""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Sequence
from typing import Any

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
table { border-collapse: collapse; margin: 1rem 0; display: block; overflow-x: auto }
td, th { border-top: 1px solid #ccc; padding: .3rem 1rem .3rem 0 }
td, th { text-align: left; vertical-align: top }
img { max-width: 100% } pre { background: #f4f4f4; padding: 1rem; overflow-x: auto; white-space: pre-wrap }
figure { margin: 1rem 0 } pre, li { overflow-wrap: anywhere } .warning { border-left: 4px solid #d62728; padding-left: 1rem }
"""
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def document(title: str, parts: Sequence[str], style: str = "") -> str:
    """The whole page. ``parts`` are HTML that functions of this module made."""
    head = (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><meta http-equiv="Content-Security-Policy" '
        f'content="{_POLICY}"><meta name="viewport" content="width=device-width"><title>{html.escape(title)}</title>'
        f"<style>{STYLE}{style}</style></head>"
    )
    return f"{head}\n<body>\n" + "\n".join(parts) + "\n</body></html>\n"


def heading(text: str, level: int = 2) -> str:
    """A heading."""
    return f"<h{level}>{html.escape(text)}</h{level}>"


def paragraph(text: str, kind: str | None = None) -> str:
    """A paragraph; ``kind`` is warning or None."""
    shown = "" if kind is None else f' class="{kind}"'
    return f"<p{shown}>{html.escape(text)}</p>"


def table(rows: Sequence[Sequence[str]], head: Sequence[str] = ()) -> str:
    """A table of texts, with ``head`` as its first row if it is given."""
    top = "<tr>" + "".join(f"<th>{html.escape(cell)}</th>" for cell in head) + "</tr>\n" if head else ""
    body = "\n".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table>\n{top}{body}\n</table>"


def picture(title: str, png: bytes) -> str:
    """A PNG, with ``title`` for readers who do not see it."""
    content = base64.b64encode(png).decode("ascii")
    return f'<figure><img alt="{html.escape(title)}" src="data:image/png;base64,{content}"></figure>'


def preformatted(content: Any) -> str:
    """Text as it is, anything else as JSON."""
    text = content if isinstance(content, str) else json.dumps(content, indent=1, sort_keys=True, default=str)
    return f"<pre>{html.escape(text)}</pre>"


def bullets(lines: Sequence[str]) -> str:
    """A list."""
    return "<ul>" + "".join(f"<li>{html.escape(line)}</li>" for line in lines) + "</ul>"


def folded(summary: str, part: str) -> str:
    """``part`` behind its ``summary``, until the reader opens it."""
    return f"<details><summary>{html.escape(summary)}</summary>\n{part}\n</details>"
