"""Tokenizers: opens what transformers or sentencepiece knows, or trains sentencepiece and saves a tokenizer folder."""

from __future__ import annotations

import io
import random
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from incr_ds.config.json_file import LARGE, regular_bytes
from incr_ds.errors import ConfigError
from incr_ds.offline.sentences import load_tokenizer

TRAIN_PREFIX = "train:"
# Length of a piece of text for the trainer; sentencepiece drops longer ones.
CHUNK_CHARACTERS = 2000
# More chunks than this change the vocabulary little and take minutes.
TRAINING_CHUNKS = 4000
SMALLEST_VOCABULARY = 320


def train_sentencepiece(texts: Iterable[str], vocabulary_size: int, folder: Path) -> None:
    """Train a byte-fallback BPE of exactly ``vocabulary_size`` pieces and save a transformers tokenizer in ``folder``.

    Text is kept as it is, without normalization, so decoding gives the text back with its white space. (The one
    exception is U+2581, sentencepiece's own sign for a space.) Ids: 0 <unk>, 1 <s>, 2 </s>, then 256 bytes, then pieces.
    """
    import sentencepiece
    from transformers import LlamaTokenizer

    if vocabulary_size < SMALLEST_VOCABULARY:
        raise ConfigError(
            f"--vocab-size {vocabulary_size}: expected at least {SMALLEST_VOCABULARY} (256 bytes and some pieces)."
        )
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(_sample(_chunks(texts), TRAINING_CHUNKS)),
            model_writer=model,
            vocab_size=vocabulary_size,
            model_type="bpe",
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            add_dummy_prefix=False,
            split_digits=True,
            character_coverage=0.9999,
            max_sentence_length=4 * CHUNK_CHARACTERS + 1,
            num_threads=1,  # with more threads, ties between pieces depend on the number of cores
            minloglevel=2,
        )
    except (RuntimeError, OSError) as error:
        raise ConfigError(f"--tokenizer train:sentencepiece: {_reason(error)}; try another --vocab-size.") from error
    folder.mkdir(parents=True)
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    unprefixed: dict[str, Any] = {
        "add_prefix_space": False,
        "add_bos_token": False,
        "add_eos_token": False,
        "legacy": False,
    }
    with _system_errors(folder):
        LlamaTokenizer.from_pretrained(folder, **unprefixed).save_pretrained(folder)


@contextmanager
def _system_errors(folder: Path) -> Iterator[None]:
    """A context in which an error of the system that a Rust library reports as a bare Exception is an OSError."""
    try:
        yield
    except Exception as error:
        found = re.search(r"(.*) \(os error (\d+)\)", str(error))
        if found is None:
            raise
        raise OSError(int(found[2]), found[1], str(folder)) from error


@dataclass(frozen=True)
class TextEncoder:
    """What turning text into tokens needs of a tokenizer.

    ``end_of_text`` is the id of the token that ends a document, None if the tokenizer states none. ``encode`` gives the ids
    of each text, without special tokens. Text that looks like a special token does not become one.
    """

    vocabulary_size: int
    end_of_text: int | None
    encode: Callable[[list[str]], list[list[int]]]


def open_encoder(given: str, *, eos_token: str | None = None, trust: bool = False) -> TextEncoder:
    """Open the tokenizer ``given``: a folder that transformers knows, a tokenizer.json, or a sentencepiece model.

    ``eos_token`` names the token that ends a document (None: the tokenizer's own). Raises ConfigError if there is no
    tokenizer, if it needs its own code and ``trust`` is False, and if it has no token ``eos_token``.
    """
    path = Path(given)
    if path.is_dir():
        encoder, vocabulary = _transformers_encoder(load_tokenizer(path, f"--tokenizer {given}", trust=trust))
    elif path.is_file() and path.suffix == ".json":
        encoder, vocabulary = _transformers_encoder(_tokenizer_file(path))
    elif path.is_file() and path.suffix == ".model":
        encoder, vocabulary = _sentencepiece_encoder(path)
    else:
        kind = "no such file or folder" if not path.exists() else "not a folder, and neither .json nor .model"
        raise ConfigError(
            f"--tokenizer {given}: {kind}; expected a transformers tokenizer folder (tokenizer.json, tokenizer_config.json), a "
            "tokenizer.json, a sentencepiece .model file, or train:sentencepiece."
        )
    encoder = replace(encoder, encode=partial(_encoded, given, encoder.encode))
    if eos_token is None:
        return encoder
    if eos_token not in vocabulary:
        raise ConfigError(f"--eos-token {eos_token}: --tokenizer {given} has no such token.")
    return replace(encoder, end_of_text=vocabulary[eos_token])


def _encoded(given: str, encode: Callable[[list[str]], list[list[int]]], texts: list[str]) -> list[list[int]]:
    """Encode with a tokenizer that may load and still fail: a model may lack the token for unknown words, for example."""
    try:
        return encode(texts)
    except Exception as error:  # the libraries' own kinds, from Rust and from C++
        raise ConfigError(f"--tokenizer {given}: it cannot encode the text: {_reason(error)}") from error


def _tokenizer_file(path: Path) -> Any:
    """The tokenizer of a tokenizer.json. What stands beside it says which of its tokens ends a document."""
    if (path.parent / "tokenizer_config.json").is_file() and path.name == "tokenizer.json":
        return load_tokenizer(path.parent, f"--tokenizer {path}")
    from transformers import PreTrainedTokenizerFast

    try:
        return PreTrainedTokenizerFast(tokenizer_file=str(path))
    except Exception as error:  # as for a folder: many kinds of errors, from Python and from Rust
        raise ConfigError(f"--tokenizer {path}: transformers cannot load it: {_reason(error)}") from error


def _transformers_encoder(tokenizer: Any) -> tuple[TextEncoder, dict[str, int]]:
    encode = partial(_fast, _bare(tokenizer)) if _is_plain(tokenizer) else partial(encode_documents, tokenizer)
    vocabulary = tokenizer.get_vocab()
    # Ids may have gaps, and the largest one needs an embedding too.
    size = max(len(tokenizer), max(vocabulary.values(), default=-1) + 1)
    return TextEncoder(size, tokenizer.eos_token_id, encode), vocabulary


def _bare(tokenizer: Any) -> Any:
    """The Rust part of a tokenizer, set as ``encode_documents`` sets it."""
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = True
    return backend


def _is_plain(tokenizer: Any) -> bool:
    """Whether a tokenizer does nothing but call its Rust part. That part alone is faster by a third."""
    from transformers import PreTrainedTokenizerFast

    kind = type(tokenizer)
    return (
        isinstance(tokenizer, PreTrainedTokenizerFast)
        and kind.__module__.startswith("transformers.")
        and kind._encode_plus is PreTrainedTokenizerFast._encode_plus
        and kind.__call__ is PreTrainedTokenizerFast.__call__
    )


def _fast(backend: Any, texts: list[str]) -> list[list[int]]:
    return [found.ids for found in backend.encode_batch_fast(texts, add_special_tokens=False)]


def _sentencepiece_encoder(path: Path) -> tuple[TextEncoder, dict[str, int]]:
    import sentencepiece

    try:
        model = sentencepiece.SentencePieceProcessor(model_proto=regular_bytes(path, LARGE))
        # Of an empty file it makes a model without a piece.
        size = model.get_piece_size() if model.serialized_model_proto() else 0
        vocabulary = {model.id_to_piece(number): number for number in range(size)}
    except (RuntimeError, OSError, ValueError, TypeError) as error:  # a piece that is not UTF-8 is a ValueError, too
        raise ConfigError(f"--tokenizer {path}: not a sentencepiece model ({_reason(error)}).") from error
    if size == 0:
        raise ConfigError(f"--tokenizer {path}: not a sentencepiece model (it has no pieces).")
    end = model.eos_id()
    return TextEncoder(size, end if end >= 0 else None, partial(model.encode, num_threads=1)), vocabulary


def encode_documents(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    """Token ids of each text by transformers' own call, without special tokens; text never becomes a special token."""
    encoded: list[list[int]] = tokenizer(
        texts,
        add_special_tokens=False,
        split_special_tokens=True,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,
    )["input_ids"]
    return encoded


def _sample(chunks: Iterable[str], size: int) -> list[str]:
    """An even sample of at most ``size`` chunks (Vitter's algorithm R), the same each time.

    sentencepiece's own sampling differs from run to run with any seed.
    """
    generator, kept = random.Random(0), []
    for number, chunk in enumerate(chunks):
        if number < size:
            kept.append(chunk)
        elif (place := generator.randrange(number + 1)) < size:
            kept[place] = chunk
    return kept


def _chunks(texts: Iterable[str]) -> Iterator[str]:
    for text in texts:
        # NUL ends a sentence in sentencepiece; byte fallback can still encode it.
        clean = text.replace("\0", "")
        for start in range(0, len(clean), CHUNK_CHARACTERS):
            yield clean[start : start + CHUNK_CHARACTERS]


def _reason(error: Exception) -> str:
    """The last line of a library's message."""
    lines = str(error).strip().splitlines()
    return lines[-1].strip() if lines else type(error).__name__
