"""Turns text files into Megatron data sets: documents, tokens, and a held-out split that shares no document.

Files made for PREFIX: PREFIX_tokenizer/ (if trained), PREFIX_{train,validation}_text_document.{bin,idx}, and last
PREFIX_facts.json. They are written beside PREFIX under a temporary name and renamed once all are complete.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import xxhash
from pydantic import BaseModel, Field

from incr_ds.checkpoint.publish import remove_abandoned, temporary_beside
from incr_ds.config.fields import parse_settings
from incr_ds.config.json_file import read_json, regular_bytes
from incr_ds.data.tokenizer import TRAIN_PREFIX, encode_documents, open_tokenizer, train_sentencepiece
from incr_ds.errors import ConfigError

SPLITS = ("train", "validation")


class _Counts(BaseModel):
    tokens: int = Field(ge=1)
    bytes: int = Field(ge=1)


class _StoredFacts(BaseModel):
    """The part of PREFIX_facts.json that is read again."""

    splits: dict[str, _Counts]


BATCH_DOCUMENTS = 64

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, kw_only=True)
class CorpusRequest:
    """What to prepare: input folders and files, and how to tokenize them.

    ``tokenizer`` is a folder or ``train:sentencepiece``. ``held_out`` is the fraction of documents for validation,
    ``max_bytes`` bounds the text that is read (None: all), and ``exclude`` names folders that are skipped. ``trust`` lets
    a tokenizer folder run its own code.
    """

    inputs: tuple[Path, ...]
    tokenizer: str
    output: Path
    vocabulary_size: int = 4096
    held_out: float = 0.05
    patterns: tuple[str, ...] = ("*.py", "*.txt", "*.md", "*.jsonl")
    exclude: tuple[str, ...] = ("site-packages", "__pycache__", ".git", ".venv", "node_modules")
    max_bytes: int | None = None
    overwrite: bool = False
    trust: bool = False


@dataclass(frozen=True)
class SplitFacts:
    """Counts of one split. ``tokens`` includes each document's end-of-text token; ``bytes`` is UTF-8 text."""

    documents: int
    tokens: int
    bytes: int


@dataclass(frozen=True)
class CorpusFacts:
    """What was prepared. ``not_text`` lists files that are not UTF-8. ``left_out_*`` count those beyond max_bytes."""

    vocabulary_size: int
    end_of_text: int
    tokenizer: str
    source_fingerprint: str
    files: int
    left_out_files: int
    left_out_bytes: int
    not_text: tuple[str, ...]
    splits: dict[str, SplitFacts]


@dataclass(frozen=True)
class Selection:
    """Input files in reading order, and what was left out because of ``max_bytes``."""

    files: tuple[Path, ...]
    total_bytes: int
    left_out_files: int
    left_out_bytes: int


def tokens_per_byte(data_prefix: str) -> float | None:
    """Tokens per byte of text in a data set that was prepared here; None if it was prepared elsewhere.

    ``loss / ln 2 * tokens_per_byte`` is bits per byte, which makes tokenizers comparable.
    """
    for split in SPLITS:
        ending = f"_{split}_text_document"
        path = Path(data_prefix.removesuffix(ending) + "_facts.json")
        if data_prefix.endswith(ending) and path.is_file():
            facts = parse_settings(read_json(path, ConfigError), _StoredFacts, str(path))
            if split in facts.splits:
                return facts.splits[split].tokens / facts.splits[split].bytes
    return None


def is_held_out(text: str, fraction: float) -> bool:
    """Whether a document belongs to validation. Only its content decides, so equal documents stay together."""
    return xxhash.xxh3_64_intdigest(text.encode("utf-8"), seed=1) < fraction * 2**64


def select_files(request: CorpusRequest) -> Selection:
    """Files of the request in path order. Beyond ``max_bytes``, only an even sample (by hash of the name) is kept."""
    found = [(root, path) for given in request.inputs for root, path in _walk(given, request)]
    if not found:
        raise ConfigError(
            f"--input {', '.join(map(str, request.inputs))}: no file matches --pattern {','.join(request.patterns)}; "
            f"folders named {', '.join(request.exclude)} are skipped."
        )
    sizes = {path: _size(path) for _, path in found}
    if request.max_bytes is None:
        return Selection(tuple(sizes), sum(sizes.values()), 0, 0)
    relative = {path: path.relative_to(root).as_posix() for root, path in found}
    kept, budget = set(), request.max_bytes
    for path in sorted(sizes, key=lambda item: xxhash.xxh3_64_intdigest(relative[item].encode())):
        if sizes[path] > budget:
            break
        kept.add(path)
        budget -= sizes[path]
    if not kept:
        raise ConfigError(f"--max-bytes {request.max_bytes}: too small for the first file of the sample; raise it.")
    total = sum(sizes[path] for path in kept)
    return Selection(
        tuple(path for path in sizes if path in kept), total, len(sizes) - len(kept), sum(sizes.values()) - total
    )


def prepare_corpus(request: CorpusRequest, progress: Progress | None = None) -> CorpusFacts:
    """Tokenize the inputs into PREFIX_*. ``progress`` gets (phase, bytes done, bytes in total).

    Raises ConfigError for wrong inputs, an unusable tokenizer, existing output, a split without documents, and an output
    that cannot be written. Apart from the last two, all is checked before the first file is written.
    """
    _check_request(request)
    selection = select_files(request)
    not_text: list[str] = []
    documents = [item for path in selection.files for item in _documents(path, request, not_text)]
    if not documents:
        raise ConfigError(f"--input: the {len(selection.files)} file(s) contain no text.")
    _check_splits(documents, request.held_out)
    given = None if _trains(request) else open_tokenizer(Path(request.tokenizer), trust=request.trust)
    try:
        remove_abandoned(request.output)
        with temporary_beside(request.output) as work:
            facts = _prepare_in(work, request, (selection, documents, tuple(not_text)), given, progress)
            _publish(work, request)
            return facts
    except OSError as error:
        where = error.filename or "while writing"
        raise ConfigError(
            f"--output {request.output}: {error.strerror or error} ({where}); nothing was published."
        ) from error


def _trains(request: CorpusRequest) -> bool:
    return request.tokenizer.startswith(TRAIN_PREFIX)


def _prepare_in(
    work: Path,
    request: CorpusRequest,
    read: tuple[Selection, list[str], tuple[str, ...]],
    given: Any,
    progress: Progress | None,
) -> CorpusFacts:
    """Write every file into ``work``. ``given`` is the tokenizer, or None if it must be trained."""
    selection, documents, not_text = read
    name = request.output.name
    tokenizer, shown = given, request.tokenizer
    if tokenizer is None:
        kept = (text for text in documents if not is_held_out(text, request.held_out))
        train_sentencepiece(kept, request.vocabulary_size, work / f"{name}_tokenizer")
        tokenizer, shown = open_tokenizer(work / f"{name}_tokenizer"), str(request.output) + "_tokenizer"
    splits = _write_splits(work / name, tokenizer, documents, request.held_out, progress)
    fingerprint = xxhash.xxh3_128()
    for text in documents:
        fingerprint.update(xxhash.xxh3_128_digest(text.encode("utf-8")))
    facts = CorpusFacts(
        vocabulary_size=len(tokenizer),
        end_of_text=tokenizer.eos_token_id,
        tokenizer=shown,
        source_fingerprint=fingerprint.hexdigest(),
        files=len(selection.files),
        left_out_files=selection.left_out_files,
        left_out_bytes=selection.left_out_bytes,
        not_text=not_text,
        splits=splits,
    )
    (work / f"{name}_facts.json").write_text(json.dumps(asdict(facts), indent=2) + "\n", encoding="utf-8")
    return facts


def _write_splits(
    prefix: Path, tokenizer: Any, documents: list[str], held_out: float, progress: Progress | None
) -> dict[str, SplitFacts]:
    from incr_ds.data.megatron import DType, IndexedDatasetBuilder

    dtype = DType.optimal_dtype(len(tokenizer))
    builders = {split: IndexedDatasetBuilder(_data_prefix(prefix, split) + ".bin", dtype=dtype) for split in SPLITS}
    counts = {split: [0, 0, 0] for split in SPLITS}
    sizes = [len(text.encode("utf-8")) for text in documents]
    done, total = 0, sum(sizes)
    for start in range(0, len(documents), BATCH_DOCUMENTS):
        batch = documents[start : start + BATCH_DOCUMENTS]
        for text, size, ids in zip(batch, sizes[start:], encode_documents(tokenizer, batch), strict=False):
            split = "validation" if is_held_out(text, held_out) else "train"
            ids.append(tokenizer.eos_token_id)
            builders[split].add_document(ids, [len(ids)])
            for index, amount in enumerate((1, len(ids), size)):
                counts[split][index] += amount
            done += size
        if progress:
            progress("tokenizing bytes of text", done, total)
    for split, builder in builders.items():
        builder.finalize(_data_prefix(prefix, split) + ".idx")
    return {split: SplitFacts(*counts[split]) for split in SPLITS if counts[split][0]}


def _check_splits(documents: list[str], held_out: float) -> None:
    kept_out = sum(is_held_out(text, held_out) for text in documents)
    counts = {"train": len(documents) - kept_out, "validation": kept_out if held_out else 1}
    for split, count in counts.items():
        if not count:
            raise ConfigError(
                f"--held-out {held_out}: none of {len(documents)} document(s) fell into {split}; give more documents (a .txt "
                "file is one document, a .jsonl line is one), or change --held-out."
            )


def _check_request(request: CorpusRequest) -> None:
    if not 0.0 <= request.held_out < 1.0:
        raise ConfigError(f"--held-out {request.held_out}: expected a fraction of the documents, from 0 to below 1.")
    kind = request.tokenizer.removeprefix(TRAIN_PREFIX)
    if _trains(request) and kind != "sentencepiece":
        raise ConfigError(f"--tokenizer {request.tokenizer}: unknown trainer {kind!r}; known: train:sentencepiece.")
    existing = [str(path) for path in _outputs(request.output) if path.exists()]
    if existing and not request.overwrite:
        raise ConfigError(
            f"--output {request.output}: exists already: {', '.join(existing)}. Pass --overwrite, or choose another prefix."
        )


def _outputs(output: Path) -> list[Path]:
    data = [Path(_data_prefix(output, split) + ending) for split in SPLITS for ending in (".bin", ".idx")]
    return [output.with_name(f"{output.name}_tokenizer"), *data, output.with_name(f"{output.name}_facts.json")]


def _publish(work: Path, request: CorpusRequest) -> None:
    targets = _outputs(request.output)
    # The facts file is removed first and written last, so that it always belongs to the data beside it.
    for target in reversed(targets):
        if target.is_dir():
            shutil.rmtree(target)
        else:
            target.unlink(missing_ok=True)
    for target in targets:
        made = work / target.name
        if made.exists():
            os.replace(made, target)


def _data_prefix(prefix: Path, split: str) -> str:
    return f"{prefix}_{split}_text_document"


def _walk(given: Path, request: CorpusRequest) -> Iterator[tuple[Path, Path]]:
    if given.is_file():
        yield given.parent, given
    elif given.is_dir():
        for folder, names, files in os.walk(given):
            names[:] = sorted(name for name in names if name not in request.exclude)
            for name in sorted(files):
                if any(fnmatch(name, pattern) for pattern in request.patterns):
                    yield given, Path(folder) / name
    else:
        raise ConfigError(f"--input {given}: no such file or folder.")


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError as error:
        raise ConfigError(f"--input {path}: cannot be read ({error.strerror}).") from error


def _documents(path: Path, request: CorpusRequest, not_text: list[str]) -> Iterator[str]:
    try:
        content = regular_bytes(path).decode("utf-8")
    except OSError as error:
        raise ConfigError(f"--input {path}: cannot be read ({error.strerror}).") from error
    except UnicodeDecodeError as error:
        if path in request.inputs:
            raise ConfigError(f"--input {path}: not UTF-8 text (byte {error.start}).") from error
        not_text.append(str(path))
        return
    except ValueError as error:
        raise ConfigError(f"--input {path}: cannot be read ({error}).") from error
    texts = _json_lines(path, content) if path.suffix == ".jsonl" else [content]
    yield from (text for text in texts if text)


def _json_lines(path: Path, content: str) -> Iterator[str]:
    for number, line in enumerate(content.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            text = json.loads(line)["text"]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise ConfigError(f"--input {path}, line {number}: expected a JSON object with the key text.") from error
        if not isinstance(text, str):
            raise ConfigError(f"--input {path}, line {number}: text is {type(text).__name__}, expected a string.")
        yield text
