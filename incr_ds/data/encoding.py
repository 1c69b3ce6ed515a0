"""Turns batches of documents into tokens, in several processes. The results come in the order of the batches."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections import deque
from collections.abc import Generator, Iterator, Mapping
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context

import numpy as np
import xxhash

from incr_ds.data.documents import Batch, InputPlace, NotText, documents_of
from incr_ds.data.selection import SPLITS
from incr_ds.data.tokenizer import TextEncoder
from incr_ds.errors import IncrError

BATCHES_AHEAD = 3  # of each worker, so that none waits for the reader


@dataclass(frozen=True)
class SplitTokens:
    """Documents of one split: their tokens one after the other, as bytes, and int32 ``lengths``; UTF-8 bytes of the text."""

    tokens: bytes
    lengths: np.ndarray
    num_bytes: int


@dataclass(frozen=True)
class EncodedBatch:
    """What is written for one batch. ``digests`` has 16 bytes for each document, in the order of the input.

    ``after`` and ``read`` are the batch's.
    """

    splits: Mapping[str, SplitTokens]
    digests: bytes
    not_text: tuple[NotText, ...]
    after: InputPlace
    read: int


@dataclass(frozen=True)
class Encoding:
    """How documents become tokens. ``end_of_text`` follows each document (None: nothing does)."""

    encoder: TextEncoder
    end_of_text: int | None
    held_out: float
    text_key: str

    @property
    def dtype(self) -> type[np.uint16] | type[np.int32]:
        """Type of a token id on disk: megatron-core's choice for the size of the vocabulary."""
        return np.uint16 if self.encoder.vocabulary_size < 65500 else np.int32

    def encode(self, batch: Batch) -> EncodedBatch:
        """Tokenize a batch. Raises ConfigError for a record that is not a document."""
        found = [item for piece in batch.pieces for item in documents_of(piece, self.text_key)]
        texts = [item for item in found if isinstance(item, str)]
        raw = [text.encode("utf-8") for text in texts]
        held_out = [is_held_out(text, self.held_out) for text in texts]
        ids = self.encoder.encode(texts) if texts else []
        splits = {}
        for split in SPLITS:
            mine = [number for number, out in enumerate(held_out) if out == (split == "validation")]
            splits[split] = self._joined([ids[number] for number in mine], sum(len(raw[number]) for number in mine))
        digests = b"".join(map(xxhash.xxh3_128_digest, raw))
        unread = tuple(item for item in found if isinstance(item, NotText))
        return EncodedBatch(splits, digests, unread, batch.after, batch.read)

    def _joined(self, documents: list[list[int]], num_bytes: int) -> SplitTokens:
        if self.end_of_text is not None:
            for ids in documents:
                ids.append(self.end_of_text)
        tokens = np.array([token for ids in documents for token in ids], self.dtype)
        return SplitTokens(tokens.tobytes(), np.array([len(ids) for ids in documents], np.int32), num_bytes)


def is_held_out(text: str, fraction: float) -> bool:
    """Whether a document belongs to validation. Only its content decides, so equal documents stay together."""
    return xxhash.xxh3_64_intdigest(text.encode("utf-8"), seed=1) < fraction * 2**64


def encode_in_order(encoding: Encoding, batches: Iterator[Batch], workers: int) -> Generator[EncodedBatch, None, None]:
    """Encode ``batches`` in ``workers`` processes, and yield the results in order. Few batches exist at a time.

    The first error in the order of the input is raised, whatever process finds which error first.
    """
    with _pool(encoding, workers) as pool:
        pending: deque[Future[EncodedBatch]] = deque()
        failure = None
        while True:
            try:
                batch = next(batches, None)
            except IncrError as error:  # the batches before it may hold an earlier mistake
                batch, failure = None, error
            if batch is None:
                break
            pending.append(pool.submit(_encode, batch))
            if len(pending) > workers * BATCHES_AHEAD:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
        if failure is not None:
            raise failure


_encoding: Encoding  # of a worker process


@contextmanager
def _pool(encoding: Encoding, workers: int) -> Iterator[ProcessPoolExecutor]:
    """Processes that are forked from this one, so that they have the tokenizer at once."""
    # Every worker is one thread; tokenizers would start as many as there are cores in each.
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    pool = ProcessPoolExecutor(workers, get_context("fork"), _begin, (encoding, os.getpid()))
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)
        if before is None:
            del os.environ["TOKENIZERS_PARALLELISM"]
        else:
            os.environ["TOKENIZERS_PARALLELISM"] = before


def _begin(encoding: Encoding, parent: int) -> None:
    global _encoding
    _encoding = encoding
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends its workers
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: int) -> None:
    """End this worker once its parent is gone. A worker of a killed parent would wait for work for ever."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def _encode(batch: Batch) -> EncodedBatch:
    return _encoding.encode(batch)
