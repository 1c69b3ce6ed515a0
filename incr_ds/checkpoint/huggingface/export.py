"""Exports any supported checkpoint as a Hugging Face folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from incr_ds.checkpoint.base import LogicalCheckpoint
from incr_ds.checkpoint.companions import Companions
from incr_ds.checkpoint.finite import FiniteCheckpoint, nonfinite_notes
from incr_ds.checkpoint.huggingface.card import CARD, SOURCE_CARD, Card, source_card
from incr_ds.checkpoint.huggingface.writer import huggingface_files, index_text, published_config_text
from incr_ds.checkpoint.provenance import provenance
from incr_ds.checkpoint.publish import publish, refuse_overlap
from incr_ds.checkpoint.streaming import Slices, write_file

_KEPT = f"the source's own {CARD} is kept as {SOURCE_CARD}; the new {CARD} describes this export, without a licence"


def export_huggingface(
    source: LogicalCheckpoint, output: Path, dtype: torch.dtype, beside: Path, *, allow_nonfinite: bool = False
) -> tuple[str, ...]:
    """Publish ``source`` as a folder that ``AutoModelForCausalLM.from_pretrained`` loads.

    Tokenizer files in ``beside``, the source's folder, are copied too. The output must not be inside it, and appears whole or
    not at all. It has a model card, README.md; one of the source is kept as README.source.md. Raises CheckpointError if a
    weight holds NaN or infinity, unless ``allow_nonfinite``. The returned notes, which are also in the manifest, count
    these, and say if there was a card.
    """
    watched = FiniteCheckpoint(source, otherwise="--allow-nonfinite exports this one as it is", allowed=allow_nonfinite)
    refuse_overlap(beside, output)
    files = huggingface_files(source.architecture, dtype)
    card = source_card(beside)
    facts: dict[str, Any] = {
        "source": str(source.facts.kind),
        "exported_from": str(beside.resolve()),
        "step": source.facts.step,
    }
    with publish(output, "huggingface export", facts) as folder:
        for file in files:
            write_file(file, folder, Slices(watched.read))
        index = index_text(files)
        notes = (*nonfinite_notes(watched.found), *([] if card is None else [_KEPT]))
        made = Card(source.architecture, str(dtype).removeprefix("torch."), provenance(beside), notes)
        texts = {CARD: made.text} | ({} if card is None else {SOURCE_CARD: card})
        texts |= {} if index is None else {"model.safetensors.index.json": index}
        Companions(published_config_text(source.architecture, dtype), beside, texts=texts).write(folder)
        facts["notes"] = list(notes)
    return notes


def own_dtype(source: LogicalCheckpoint) -> torch.dtype:
    """The dtype to store a model in: the precision of the run that saved it, otherwise 16 bits if any weight has them."""
    if source.facts.dtype is not None:
        known: torch.dtype = getattr(torch, source.facts.dtype)
        return known
    stored = {source.read(spec.name, bounds=((0, 1),)).dtype for spec in source.architecture.stored}
    return next((dtype for dtype in (torch.bfloat16, torch.float16) if dtype in stored), torch.float32)
