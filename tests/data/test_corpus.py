import io
import json
import math
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from incr_ds.data.corpus import CorpusRequest, is_held_out, prepare_corpus
from incr_ds.data.facts import tokens_per_byte
from incr_ds.data.megatron import IndexedDataset
from incr_ds.data.tokenizer import TRAINING_CHUNKS, encode_documents, train_sentencepiece
from incr_ds.errors import ConfigError
from incr_ds.offline.sentences import load_tokenizer

ODD_TEXT = '  def f(x):\n\treturn "</s> é漢🙂"  \n\n\n    # end\r\n\0 <s>'


def write_texts(folder: Path, count: int = 40) -> list[str]:
    folder.mkdir(parents=True)
    texts = [f"def value_{i}():\n    return {i * i} + {i}\n\n# {'word ' * (i % 7)}\n" for i in range(count)]
    texts[3] = ODD_TEXT
    texts[5] = texts[6]
    for index, text in enumerate(texts):
        (folder / f"{index:03d}.py").write_text(text, encoding="utf-8", newline="")
    return texts


def request(folder: Path, **changes) -> CorpusRequest:
    values = {
        "inputs": (folder / "texts",),
        "tokenizer": "train:sentencepiece",
        "output": folder / "out" / "code",
        "vocabulary_size": 320,
        "held_out": 0.25,
    }
    return CorpusRequest(**(values | changes))


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("corpus")
    texts = write_texts(folder / "texts")
    facts = prepare_corpus(request(folder))
    return folder, texts, facts


def decoded(prefix: Path, split: str) -> list[str]:
    tokenizer = load_tokenizer(Path(f"{prefix}_tokenizer"), "test")
    data = IndexedDataset(f"{prefix}_{split}_text_document", mmap=True)
    documents = [np.asarray(data[index]).tolist() for index in range(len(data))]
    assert all(ids[-1] == tokenizer.eos_token_id and tokenizer.eos_token_id not in ids[:-1] for ids in documents)
    return [tokenizer.decode(ids[:-1]) for ids in documents]


def test_every_document_comes_back_exactly_and_in_one_split_only(prepared):
    folder, texts, facts = prepared
    train, validation = (decoded(folder / "out" / "code", split) for split in ("train", "validation"))
    assert train == [text for text in texts if not is_held_out(text, 0.25)]
    assert validation == [text for text in texts if is_held_out(text, 0.25)]
    assert not set(train) & set(validation)
    assert ODD_TEXT in train + validation
    assert (facts.splits["train"].documents, facts.splits["validation"].documents) == (len(train), len(validation))


def test_facts_count_tokens_and_bytes(prepared):
    folder, texts, facts = prepared
    prefix = folder / "out" / "code_validation_text_document"
    held_out = [text for text in texts if is_held_out(text, 0.25)]
    stored = json.loads((folder / "out" / "code_facts.json").read_text())["splits"]["validation"]
    assert stored["bytes"] == sum(len(text.encode()) for text in held_out)
    assert stored["tokens"] == Path(f"{prefix}.bin").stat().st_size // 2  # uint16: fewer than 65500 pieces
    assert tokens_per_byte(str(prefix)) == stored["tokens"] / stored["bytes"]
    assert tokens_per_byte(str(folder / "elsewhere")) is None
    assert facts.vocabulary_size == 320


def test_the_same_input_gives_the_same_files(prepared):
    folder, _, facts = prepared
    again = prepare_corpus(request(folder, output=folder / "again" / "code"))
    assert again.source_fingerprint == facts.source_fingerprint
    for name in ("code_train_text_document.bin", "code_validation_text_document.idx", "code_tokenizer/tokenizer.json"):
        assert (folder / "again" / name).read_bytes() == (folder / "out" / name).read_bytes()


def test_a_tokenizer_folder_can_be_reused_and_json_lines_are_documents(prepared, tmp_path: Path):
    folder, _, _ = prepared
    (tmp_path / "a.jsonl").write_text('{"text": "one two"}\n{"text": "three", "id": 4}\n')
    facts = prepare_corpus(
        request(
            folder,
            inputs=(tmp_path / "a.jsonl",),
            tokenizer=str(folder / "out" / "code_tokenizer"),
            output=tmp_path / "a",
            held_out=0.0,
        )
    )
    tokenizer = load_tokenizer(folder / "out" / "code_tokenizer", "test")
    assert facts.splits["train"].documents == 2
    assert facts.splits["train"].tokens == 2 + sum(map(len, encode_documents(tokenizer, ["one two", "three"])))
    assert "validation" not in facts.splits


def test_max_bytes_says_what_was_left_out(prepared, tmp_path: Path):
    folder, texts, _ = prepared
    total = sum(len(text.encode()) for text in texts)
    facts = prepare_corpus(request(folder, output=tmp_path / "part", max_bytes=total // 2))
    kept = sum(split.bytes for split in facts.splits.values())
    assert kept <= total // 2
    assert (facts.left_out_bytes, facts.left_out_files) == (total - kept, len(texts) - facts.files)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"inputs": (Path("/no/such/folder"),)}, "--input /no/such/folder: no such file or folder"),
        ({"patterns": ("*.nothing",)}, r"no file matches --pattern \*.nothing"),
        ({"tokenizer": "train:magic"}, "unknown trainer 'magic'; known: train:sentencepiece"),
        ({"tokenizer": "/no/tokenizer"}, "--tokenizer /no/tokenizer: no such file or folder"),
        ({"vocabulary_size": 100}, "--vocab-size 100: expected at least 320"),
        ({"vocabulary_size": 30000}, "Vocabulary size (is )?too high.*try another --vocab-size"),
        ({"held_out": 1.5}, "--held-out 1.5: expected a fraction"),
        ({"max_bytes": 3}, "--max-bytes 3: too small"),
    ],
)
def test_wrong_requests_are_refused_and_leave_nothing(prepared, tmp_path: Path, changes, message: str):
    folder, _, _ = prepared
    with pytest.raises(ConfigError, match=message):
        prepare_corpus(request(folder, **({"output": tmp_path / "new" / "deep" / "bad"} | changes)))
    assert list(tmp_path.iterdir()) == []


def test_a_split_without_documents_is_refused(tmp_path: Path):
    (tmp_path / "one.txt").write_text("a single document " * 200)
    with pytest.raises(ConfigError, match=r"none of 1 document\(s\) fell into (train|validation); give more documents"):
        prepare_corpus(request(tmp_path, inputs=(tmp_path / "one.txt",)))


def test_bad_json_lines_name_file_and_line(prepared, tmp_path: Path):
    folder, _, _ = prepared
    (tmp_path / "b.jsonl").write_text('{"text": "fine"}\n{"txt": "no"}\n')
    with pytest.raises(ConfigError, match="b.jsonl, line 2: expected a JSON object with the key text"):
        prepare_corpus(request(folder, inputs=(tmp_path / "b.jsonl",), output=tmp_path / "b"))


def test_files_that_are_not_text_are_reported_or_refused(prepared, tmp_path: Path):
    folder, _, _ = prepared
    write_texts(tmp_path / "texts", 12)
    (tmp_path / "texts" / "latin.txt").write_bytes(b"caf\xe9")
    tokenizer = str(folder / "out" / "code_tokenizer")
    facts = prepare_corpus(request(tmp_path, tokenizer=tokenizer, held_out=0.0))
    assert [Path(name).name for name in facts.not_text] == ["latin.txt"]
    with pytest.raises(ConfigError, match="latin.txt: not UTF-8 text .byte 3."):
        prepare_corpus(request(tmp_path, inputs=(tmp_path / "texts" / "latin.txt",), output=tmp_path / "x"))


def test_the_tool_refuses_existing_output_without_a_traceback(prepared):
    folder, _, _ = prepared
    tool = Path(__file__).parents[2] / "tools" / "prepare_data.py"
    options = ["--input", folder / "texts", "--tokenizer", "train:sentencepiece", "--output", folder / "out" / "code"]
    done = subprocess.run([sys.executable, tool, *options], capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert "exists already" in done.stderr and "Traceback" not in done.stderr + done.stdout


def test_the_share_that_is_held_out_is_the_one_asked_for():
    held_out = sum(is_held_out(f"document {index}", 0.2) for index in range(5000))
    assert math.isclose(held_out / 5000, 0.2, abs_tol=0.02)


def test_training_a_tokenizer_repeats_where_it_samples(tmp_path: Path):
    """More text than the trainer looks at: which part it looks at must not differ from process to process."""
    train_sentencepiece(many_texts(), 700, tmp_path / "first")
    program = f"from test_corpus import *; train_sentencepiece(many_texts(), 700, Path({str(tmp_path)!r}) / 'second')"
    subprocess.run([sys.executable, "-c", program], check=True, cwd=Path(__file__).parent, timeout=120)
    train_sentencepiece(many_texts()[:-2000], 700, tmp_path / "less")
    first, second, less = ((tmp_path / name / "tokenizer.model").read_bytes() for name in ("first", "second", "less"))
    assert first == second
    assert first != less, "the later texts are looked at too"


def many_texts():
    generator = random.Random(3)
    words = ["".join(generator.choices("abcdefghijklmnop", k=generator.randrange(2, 9))) for _ in range(500)]
    return [" ".join(generator.choices(words, k=12)) for _ in range(TRAINING_CHUNKS + 2000)]


CODE = """
from pathlib import Path
from transformers import LlamaTokenizer
Path({canary!r}).write_text("ran")
class Own(LlamaTokenizer):
    pass
"""


@pytest.fixture
def with_code(prepared, tmp_path: Path):
    """A tokenizer folder whose class is a Python file in it, and the file that this writes when it runs."""
    folder, _, _ = prepared
    shutil.copytree(folder / "out" / "code_tokenizer", tmp_path / "own")
    config = json.loads((tmp_path / "own" / "tokenizer_config.json").read_text())
    config |= {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", None]}}
    (tmp_path / "own" / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "own" / "own.py").write_text(CODE.format(canary=str(tmp_path / "canary")))
    return folder, tmp_path / "own", tmp_path / "canary"


def test_code_in_a_tokenizer_folder_is_neither_run_nor_asked_about(
    with_code, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    folder, own, canary = with_code
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n"))
    with pytest.raises(ConfigError, match=r"own: needs Python code in the folder .*not run.*repeat with --trust"):
        prepare_corpus(request(folder, tokenizer=str(own), output=tmp_path / "out"))
    assert not canary.exists() and not list(tmp_path.glob("*out*"))


def test_code_in_a_tokenizer_folder_runs_for_who_trusts_it(with_code, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder, own, canary = with_code
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    (tmp_path / "modules").mkdir()
    facts = prepare_corpus(request(folder, tokenizer=str(own), output=tmp_path / "out", trust=True))
    assert canary.read_text() == "ran" and facts.vocabulary_size == 320


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("tokenizer_config.json", "{"),
        ("tokenizer_config.json", "[" * 100_000),
        ("tokenizer_config.json", '{"added_tokens_decoder": 5}'),
        ("tokenizer.json", "[" * 100_000),
        ("tokenizer.json", '{"model": 5}'),
    ],
    ids=lambda text: text[:25],
)
def test_a_damaged_tokenizer_folder_is_one_message(prepared, tmp_path: Path, file, text):
    folder, _, _ = prepared
    shutil.copytree(folder / "out" / "code_tokenizer", tmp_path / "own")
    (tmp_path / "own" / file).write_text(text)
    with pytest.raises(ConfigError, match=r"--tokenizer .*own: (transformers cannot load it|it has no eos_token)"):
        prepare_corpus(request(folder, tokenizer=str(tmp_path / "own"), output=tmp_path / "out"))


def test_a_pipe_among_the_texts_is_named_not_waited_for(prepared, tmp_path: Path):
    folder, _, _ = prepared
    write_texts(tmp_path / "texts", 12)
    os.mkfifo(tmp_path / "texts" / "pipe.txt")
    with pytest.raises(ConfigError, match=r"--input .*pipe\.txt: cannot be read \(a pipe, not a regular file\)"):
        prepare_corpus(request(tmp_path, tokenizer=str(folder / "out" / "code_tokenizer")))


def test_a_json_line_nested_100000_deep_is_named(prepared, tmp_path: Path):
    folder, _, _ = prepared
    (tmp_path / "b.jsonl").write_text(
        '{"text": "fine"}\n{"text": "no", "more": ' + "[" * 100_000 + "]" * 100_000 + "}\n"
    )
    with pytest.raises(ConfigError, match="b.jsonl, line 2: expected a JSON object with the key text"):
        prepare_corpus(request(folder, inputs=(tmp_path / "b.jsonl",), output=tmp_path / "b"))


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ("{", "not valid JSON"),
        ("[]", "expected a JSON object"),
        ('{"splits": 5}', r"splits: Input should be a valid dictionary"),
        (
            '{"splits": {"validation": {"tokens": 5, "bytes": 0}}}',
            r"splits\.validation\.bytes: Input should be greater",
        ),
        ('{"splits": {"validation": {"tokens": "many", "bytes": 5}}}', r"splits\.validation\.tokens: Input should be"),
    ],
)
def test_facts_that_are_none_are_named(tmp_path: Path, facts, message: str):
    (tmp_path / "code_facts.json").write_text(facts)
    with pytest.raises(ConfigError, match=rf"code_facts\.json: (.|\n)*{message}"):
        tokens_per_byte(str(tmp_path / "code_validation_text_document"))
    (tmp_path / "code_facts.json").write_text('{"splits": {"train": {"tokens": 5, "bytes": 10}}}')
    assert tokens_per_byte(str(tmp_path / "code_validation_text_document")) is None
    assert tokens_per_byte(str(tmp_path / "code_train_text_document")) == 0.5
