"""Tokenizers: opens a folder that transformers knows, or trains sentencepiece and saves such a folder."""

from __future__ import annotations

import io
import random
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

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
    LlamaTokenizer.from_pretrained(folder, **unprefixed).save_pretrained(folder)


def open_tokenizer(folder: Path, *, trust: bool = False) -> Any:
    """Open the transformers tokenizer of a folder.

    Raises ConfigError if there is none, if it has no end-of-text token, or if it needs its own code and ``trust`` is False.
    """
    if not folder.is_dir():
        raise ConfigError(
            f"--tokenizer {folder}: not a folder; expected a transformers tokenizer folder (tokenizer.json, "
            "tokenizer_config.json) or train:sentencepiece."
        )
    tokenizer = load_tokenizer(folder, f"--tokenizer {folder}", trust=trust)
    if tokenizer.eos_token_id is None:
        raise ConfigError(f"--tokenizer {folder}: it has no eos_token, which separates documents. Set one.")
    return tokenizer


def encode_documents(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    """Token ids of each text, without special tokens. Text that contains </s> does not become a special token."""
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
    lines = str(error).strip().splitlines()
    return lines[-1].strip() if lines else type(error).__name__
