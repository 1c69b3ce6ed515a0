"""Turns text into Megatron data sets: documents, tokens, and a held-out split that shares no document.

Files made for PREFIX: PREFIX_tokenizer/ (if trained), PREFIX_{train,validation}_text_document.{bin,idx}, and last
PREFIX_facts.json. Memory does not grow with the corpus. A run that was killed goes on where it was, and the bytes are the
same for any number of workers and of interruptions.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path

import xxhash
from pydantic import TypeAdapter

from incr_ds.config.json_file import LARGE, read_json
from incr_ds.data.corpus_workspace import corpus_workspace, is_finished, publish_files
from incr_ds.data.documents import Batch, InputPlace, NotText, check_readers, documents_of, most_batches, read_batches
from incr_ds.data.encoding import Encoding, encode_in_order, is_held_out
from incr_ds.data.selection import SPLITS, CorpusRequest, Selection, select_files
from incr_ds.data.token_files import Counts, TokenFiles
from incr_ds.data.tokenizer import TRAIN_PREFIX, TextEncoder, open_encoder, train_sentencepiece
from incr_ds.errors import ConfigError

Report = Callable[[str, int, int], None]


@dataclass(frozen=True)
class SplitFacts:
    """Counts of one split. ``tokens`` includes end-of-text tokens; ``bytes`` is UTF-8 text.

    ``longest_document`` is in tokens, with its end-of-text token.
    """

    documents: int
    tokens: int
    bytes: int
    bytes_per_token: float
    longest_document: int


@dataclass(frozen=True)
class CorpusFacts:
    """What was prepared. ``end_of_text`` is the id that follows each document; None if nothing does.

    ``not_text`` lists files that are not UTF-8. ``left_out_*`` count those beyond max_bytes.
    """

    vocabulary_size: int
    end_of_text: int | None
    tokenizer: str
    source_fingerprint: str
    files: int
    left_out_files: int
    left_out_bytes: int
    not_text: tuple[str, ...]
    splits: dict[str, SplitFacts]


def prepare_corpus(request: CorpusRequest, report: Report | None = None) -> CorpusFacts:
    """Tokenize the inputs into PREFIX_*. ``report`` gets (phase, bytes of input done, bytes in total).

    The same request continues what a killed run or a full disk left unfinished. Raises ConfigError for wrong inputs, an
    unusable tokenizer, existing output, a split without documents, and an output that cannot be written.
    """
    _check_request(request)
    selection = select_files(request)
    check_readers(selection.files)
    given = None if _trains(request) else _encoder(request.tokenizer, request)
    targets, show = _outputs(request.output), report or (lambda phase, done, total: None)
    try:
        with corpus_workspace(request.output, _key(request, selection), targets, overwrite=request.overwrite) as folder:
            if not is_finished(folder):
                _write_in(folder, request, selection, given, show)
            publish_files(folder, targets)
            return TypeAdapter(CorpusFacts).validate_python(read_json(targets[-1], ConfigError, most=LARGE))
    except BrokenProcessPool as error:
        raise ConfigError(
            f"--workers {request.workers}: one was killed, most often because memory ran out. Run the same command again, which "
            "goes on from where it was; fewer workers need less memory."
        ) from error
    except OSError as error:
        where = error.filename or "while writing"
        raise ConfigError(
            f"--output {request.output}: {error.strerror or error} ({where}); the output is not complete. The same command "
            "goes on from where it was."
        ) from error


def _write_in(
    folder: Path, request: CorpusRequest, selection: Selection, given: TextEncoder | None, report: Report
) -> None:
    """Write every file into ``folder``. ``given`` is the tokenizer, or None if it must be trained."""
    name, encoder, shown = request.output.name, given, request.tokenizer
    if encoder is None:
        trained = folder / f"{name}_tokenizer"
        _train_tokenizer(trained, request, selection, report)
        encoder, shown = _encoder(str(trained), request), f"{request.output}_tokenizer"
    end = encoder.end_of_text if request.append_eos else None
    encoding = Encoding(encoder, end, request.held_out, request.text_key)
    files = TokenFiles(folder, name)
    _tokenize(files, encoding, request, selection, report)
    counts = files.progress.counts
    _check_splits({split: counts[split].documents for split in SPLITS}, request)
    files.write_indices(encoding.dtype)
    facts = CorpusFacts(
        vocabulary_size=encoder.vocabulary_size,
        end_of_text=end,
        tokenizer=shown,
        source_fingerprint=files.fingerprint(),
        files=len(selection.files),
        left_out_files=selection.left_out_files,
        left_out_bytes=selection.left_out_bytes,
        not_text=files.progress.not_text,
        splits={split: _facts(counts[split]) for split in SPLITS if counts[split].documents},
    )
    (folder / f"{name}_facts.json").write_text(json.dumps(asdict(facts), indent=2) + "\n", encoding="utf-8")


def _tokenize(
    files: TokenFiles, encoding: Encoding, request: CorpusRequest, selection: Selection, report: Report
) -> None:
    phase, total = "tokenizing bytes of input", selection.total_bytes
    batches = read_batches(selection, files.progress.place, request.text_key)
    workers = min(request.workers, most_batches(selection))  # starting many for little text takes longer than the text
    with files.open(), closing(encode_in_order(encoding, batches, workers)) as encoded:
        for batch in encoded:
            for item in batch.not_text:
                _refuse_named(item, request)
            files.append(batch)
            report(phase, min(batch.read, total - 1), total)
    report(phase, total, total)


def _train_tokenizer(folder: Path, request: CorpusRequest, selection: Selection, report: Report) -> None:
    """Train a tokenizer on the documents that are not held out, unless an interrupted run did."""
    if folder.is_dir():
        return
    unfinished = folder.with_name("tokenizer.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    batches = read_batches(selection, InputPlace(), request.text_key)
    texts = _training_texts(batches, request, partial(_report_reading, report, selection.total_bytes))
    train_sentencepiece(texts, request.vocabulary_size, unfinished)
    unfinished.rename(folder)


def _report_reading(report: Report, total: int, done: int | None) -> None:
    report("reading bytes for the tokenizer", total if done is None else min(done, total - 1), total)


def _training_texts(
    batches: Iterator[Batch], request: CorpusRequest, reached: Callable[[int | None], None]
) -> Iterator[str]:
    """Documents that are not held out. Raises ConfigError if there are none."""
    documents = kept = 0
    for batch in batches:
        for piece in batch.pieces:
            for item in documents_of(piece, request.text_key):
                if isinstance(item, NotText):
                    _refuse_named(item, request)
                    continue
                documents += 1
                if not is_held_out(item, request.held_out):
                    kept += 1
                    yield item
        reached(batch.read)
    _check_splits({"train": kept, "validation": documents - kept}, request)
    reached(None)


def _refuse_named(item: NotText, request: CorpusRequest) -> None:
    """Files that are not UTF-8 are skipped in folders, and listed in the facts. One that is named itself is a mistake."""
    if item.path in request.inputs:
        raise ConfigError(f"--input {item.path}: not UTF-8 text (byte {item.position}).")


def _facts(counts: Counts) -> SplitFacts:
    density = counts.bytes / max(1, counts.tokens)
    return SplitFacts(counts.documents, counts.tokens, counts.bytes, density, counts.longest)


def _check_splits(documents: Mapping[str, int], request: CorpusRequest) -> None:
    """Raise ConfigError if a split has no documents."""
    if not sum(documents.values()):
        raise ConfigError(f"--input {', '.join(map(str, request.inputs))}: the files contain no text.")
    for split, count in documents.items():
        if not count and (split == "train" or request.held_out):
            raise ConfigError(
                f"--held-out {request.held_out}: none of {sum(documents.values())} document(s) fell into {split}; give more "
                "documents (a .txt file is one document, a .jsonl line is one), or change --held-out."
            )


def _trains(request: CorpusRequest) -> bool:
    return request.tokenizer.startswith(TRAIN_PREFIX)


def _encoder(given: str, request: CorpusRequest) -> TextEncoder:
    """Open a tokenizer. Raises ConfigError if documents are to end with a token that it does not have."""
    encoder = open_encoder(given, eos_token=request.eos_token, trust=request.trust)
    if request.append_eos and encoder.end_of_text is None:
        raise ConfigError(
            f"--tokenizer {given}: it has no eos_token, which separates documents. Name one of its tokens with --eos-token, "
            "or pass --no-append-eos."
        )
    return encoder


def _check_request(request: CorpusRequest) -> None:
    if not 0.0 <= request.held_out < 1.0:
        raise ConfigError(f"--held-out {request.held_out}: expected a fraction of the documents, from 0 to below 1.")
    if request.workers < 1:
        raise ConfigError(f"--workers {request.workers}: expected at least 1.")
    kind = request.tokenizer.removeprefix(TRAIN_PREFIX)
    if _trains(request) and kind != "sentencepiece":
        raise ConfigError(f"--tokenizer {request.tokenizer}: unknown trainer {kind!r}; known: train:sentencepiece.")
    if request.eos_token is not None and not request.append_eos:
        raise ConfigError("--eos-token: has no effect with --no-append-eos; leave one of them out.")


def _key(request: CorpusRequest, selection: Selection) -> str:
    """A hash of everything that decides the bytes of the result, except the content of files whose size and time stay."""
    tokenizer = Path(request.tokenizer)
    files = [
        *selection.files,
        *(sorted(tokenizer.iterdir()) if tokenizer.is_dir() else [tokenizer] * tokenizer.is_file()),
    ]
    states = [(str(path.absolute()), (state := path.stat()).st_size, state.st_mtime_ns) for path in files]
    trained = ("vocabulary_size",) if _trains(request) else ()
    decides = ("tokenizer", *trained, "held_out", "text_key", "append_eos", "eos_token")
    versions = {package: version(package) for package in ("incr_ds", "tokenizers", "transformers", "sentencepiece")}
    content = [{name: getattr(request, name) for name in decides}, states, versions]
    return xxhash.xxh3_64_hexdigest(json.dumps(content).encode())


def _outputs(output: Path) -> list[Path]:
    """The files to publish, the facts last."""
    data = [Path(f"{output}_{split}_text_document{ending}") for split in SPLITS for ending in (".bin", ".idx")]
    return [output.with_name(f"{output.name}_tokenizer"), *data, output.with_name(f"{output.name}_facts.json")]
