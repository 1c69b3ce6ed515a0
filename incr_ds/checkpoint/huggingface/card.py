"""The model card of an export: README.md, with what is known of where the model comes from.

What only its owner can say, the licence first of all, is left open and marked so. Text of files stands in code, where
Markdown and HTML mean nothing.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from incr_ds.arch.architecture import Architecture
from incr_ds.checkpoint.provenance import Link
from incr_ds.checkpoint.publish import installed_versions
from incr_ds.config.json_file import read_text
from incr_ds.errors import CheckpointError

CARD, SOURCE_CARD = "README.md", "README.source.md"
_SETTINGS = ("seed", "precision", "batch", "schedule", "optimizer", "distillation", "loss")  # of the training
_HEAD = """---
library_name: transformers
pipeline_tag: text-generation
tags: [incr_ds]
# license: NAME   (state it; see the section Licence)
---
"""
_OPEN = "**Not stated.** Write it here"


@dataclass(frozen=True)
class Card:
    """What a model card says: the model, the dtype of its weights, the ``chain`` of its origins (newest first), and notes."""

    architecture: Architecture
    dtype: str
    chain: Sequence[Link]
    notes: Sequence[str] = ()

    @property
    def text(self) -> str:
        """README.md."""
        parts = [
            _HEAD,
            f"# {self.architecture.family.model_type}, {self.architecture.num_parameters:,} parameters\n",
            *_section("Model", self._model()),
            *_section("Use", [_block("python", _USE)]),
            *_section("Where it comes from", self._origins()),
            *_section("Recipes of growth", self._recipes()),
            *_section("Training", self._training()),
            *_section("Data", self._data()),
            *_section("Notes", [f"- {_code(note)}" for note in self.notes]),
            *_section("Versions", self._versions()),
            *_section("Intended use, limits and evaluation", [f"{_OPEN}; incr_ds knows nothing of it."]),
            *_section("Licence", [_LICENCE]),
        ]
        return "\n".join(parts)

    def _model(self) -> list[str]:
        sizes = [f"| {axis} | {size:,} |" for axis, size in self.architecture.sizes.items()]
        rows = [f"| parameters | {self.architecture.num_parameters:,} |", f"| dtype | {self.dtype} |"]
        return ["| | |", "|---|---|", *rows, *sizes]

    def _origins(self) -> list[str]:
        lines = ["The newest comes first, as the manifests of the folders state it.", ""]
        for link in self.chain:
            lines.append(f"- {_code(link.folder)}{f', {_code(link.kind)}' if link.kind else ''}")
            lines += [f"  - {_code(line)}" for line in link.lines]
        return lines

    def _recipes(self) -> list[str]:
        recipes = [link.facts["recipe"] for link in self.chain if isinstance(link.facts.get("recipe"), Mapping)]
        return [_block("yaml", yaml.safe_dump(dict(recipe), sort_keys=False)) for recipe in recipes]

    def _training(self) -> list[str]:
        trained = next((link for link in self.chain if isinstance(link.facts.get("settings"), Mapping)), None)
        if trained is None:
            return []
        settings = {key: trained.facts["settings"][key] for key in _SETTINGS if trained.facts["settings"].get(key)}
        position = trained.facts.get("position", {})
        return [
            f"So far: {_code(', '.join(f'{key} {value}' for key, value in position.items()))}.",
            "",
            _block("yaml", yaml.safe_dump(settings, sort_keys=False)),
        ]

    def _data(self) -> list[str]:
        found: dict[str, Any] = {}
        for link in self.chain:
            data = link.facts.get("data")
            found = {**(data if isinstance(data, Mapping) else {}), **found}
        if not found:
            return []
        rows = [f"- {_code(prefix)}: {_code(fingerprint)}" for prefix, fingerprint in found.items()]
        return ["Data sets, with the fingerprint of their tokens. What they contain is yours to describe.", "", *rows]

    def _versions(self) -> list[str]:
        trained = next((link.versions for link in self.chain if link.versions), {})
        here = installed_versions()
        names = list(dict.fromkeys([*trained, *here]))
        rows = [f"| {_code(name)} | {_code(trained.get(name, '-'))} | {_code(here.get(name, '-'))} |" for name in names]
        return ["| package | of the newest folder | of this export |", "|---|---|---|", *rows]


_USE = """from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("FOLDER")
tokenizer = AutoTokenizer.from_pretrained("FOLDER")  # if tokenizer files are here
"""
_LICENCE = (
    f"{_OPEN}, and as `license` in the header of this file. It has to respect the licences of the source model and of the "
    "data."
)


def source_card(folder: Path) -> str | None:
    """The text of README.md beside the source, or None. Raises CheckpointError if it cannot be read as text."""
    path = folder / CARD
    hint = f"; an export keeps it as {SOURCE_CARD}: repair it or move it away."
    return read_text(path, CheckpointError, hint) if path.exists() else None


def _section(title: str, lines: Sequence[str]) -> list[str]:
    return [f"## {title}\n", *lines, ""] if lines else []


def _code(text: Any) -> str:
    """Text between more backticks than it has in a row itself."""
    plain = " ".join(str(text).split()).replace("|", "/") or "-"
    return f"`{plain}`" if "`" not in plain else f"{_fence(plain)} {plain} {_fence(plain)}"


def _block(language: str, text: str) -> str:
    fence = _fence(text) if len(_fence(text)) > 3 else "```"
    return f"{fence}{language}\n{text.rstrip()}\n{fence}\n"


def _fence(text: str) -> str:
    return "`" * (1 + max((len(run) for run in re.findall("`+", text)), default=0))
