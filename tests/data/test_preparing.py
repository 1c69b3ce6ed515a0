"""Preparing data: the same bytes for any number of workers and of interruptions, in bounded memory, from any tokenizer."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from test_corpus import ODD_TEXT, request, write_texts
from test_documents import TEXTS, as_lines, write_kind
from transformers import AutoTokenizer

from incr_ds.data import corpus, documents, token_files
from incr_ds.data.corpus import prepare_corpus
from incr_ds.data.documents import InputPlace
from incr_ds.data.index_file import open_index, write_index
from incr_ds.data.megatron import DType, IndexedDataset, IndexedDatasetBuilder
from incr_ds.data.tokenizer import encode_documents, open_encoder, train_sentencepiece
from incr_ds.errors import CheckpointError, ConfigError
from incr_ds.offline.sentences import load_tokenizer

# sha256, first 16 digits, of what version 259f604 wrote for the texts of ``texts_of_old``.
OLD = {
    "code_train_text_document.bin": "99e5962c38a6c6fc",
    "code_train_text_document.idx": "d6a8bd30254cfa75",
    "code_validation_text_document.bin": "8611b42f1725f9a1",
    "code_validation_text_document.idx": "48ebfdd9bfdeb78f",
}
OLD_PART = {
    "code_train_text_document.bin": "8da3efb8ba730830",
    "code_train_text_document.idx": "19fc287921403340",
    "code_validation_text_document.bin": "b530b28200dde00d",
    "code_validation_text_document.idx": "de4b320a5c4f9089",
}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory):
    """texts/ of every kind that there was, and a tokenizer made of them."""
    folder = tmp_path_factory.mktemp("preparing")
    write_texts(folder / "texts")
    (folder / "texts" / "sub").mkdir()
    lines = [
        json.dumps({"text": f"line {i} of é漢 " * (i % 5)}, ensure_ascii=bool(i % 2)) + "\n" * (2 if i % 7 == 0 else 1)
        for i in range(200)
    ]
    (folder / "texts" / "sub" / "lines.jsonl").write_text("".join(lines))
    (folder / "texts" / "latin.txt").write_bytes(b"caf\xe9")
    prepare_corpus(request(folder))
    return folder


def hashes(folder):
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()[:16]
        for path in sorted(folder.glob("code_*_text_document.*"))
    }


def contents(folder):
    return {
        path.relative_to(folder): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "code_facts.json"
    } | {"facts": {**json.loads((folder / "code_facts.json").read_text()), "tokenizer": ""}}


def test_bytes_are_those_of_the_version_that_held_the_corpus_in_memory(home, tmp_path: Path):
    assert hashes(home / "out") == OLD
    facts = json.loads((home / "out" / "code_facts.json").read_text())
    assert facts["source_fingerprint"] == "916bdad92855af14cd28801ac3761ffb"
    prepare_corpus(request(home, output=tmp_path / "code", max_bytes=4000))
    assert hashes(tmp_path) == OLD_PART


@pytest.mark.parametrize("workers", [2, 5])
def test_any_number_of_workers_gives_the_same_bytes(home, tmp_path: Path, monkeypatch, workers):
    monkeypatch.setattr(documents, "BATCH_BYTES", 200)
    prepare_corpus(request(home, output=tmp_path / "code", workers=workers))
    assert contents(tmp_path) == contents(home / "out")


def test_progress_rises_and_ends_once(home, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(documents, "BATCH_BYTES", 200)
    reported = []
    prepare_corpus(request(home, output=tmp_path / "code"), lambda *report: reported.append(report))
    total = sum(path.stat().st_size for path in (home / "texts").rglob("*") if path.is_file())
    for phase in ("reading bytes for the tokenizer", "tokenizing bytes of input"):
        done = [now for name, now, whole in reported if name == phase and whole == total]
        assert len(done) > 9 and done == sorted(done) and done.index(total) == len(done) - 1, phase


@pytest.mark.parametrize("kind", ["x.jsonl.gz", "x.json.zst", "x.parquet", "file.arrow", "saved"])
def test_any_kind_of_file_gives_the_bytes_of_its_json_lines(home, tmp_path: Path, kind):
    tokenizer = str(home / "out" / "code_tokenizer")
    (tmp_path / "plain").mkdir()
    (tmp_path / "packed").mkdir()
    write_kind(tmp_path / "plain", "x.jsonl", TEXTS)
    write_kind(tmp_path / "packed", kind, TEXTS)
    plain, packed = (
        prepare_corpus(
            request(home, inputs=(tmp_path / name,), output=tmp_path / f"{name}_out" / "code", tokenizer=tokenizer)
        )
        for name in ("plain", "packed")
    )
    assert (
        hashes(tmp_path / "plain_out") == hashes(tmp_path / "packed_out") and len(hashes(tmp_path / "plain_out")) == 4
    )
    assert plain.source_fingerprint == packed.source_fingerprint and plain.splits == packed.splits


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_an_index_has_the_bytes_of_megatrons(tmp_path: Path, monkeypatch, dtype):
    monkeypatch.setattr("incr_ds.data.index_file._AT_ONCE", 3)
    builder = IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=dtype)
    lengths = [5, 0, 7, 1, 2, 9, 3, 4]
    for length in lengths:
        builder.add_document(list(range(length)), [length])
    builder.finalize(str(tmp_path / "theirs.idx"))
    np.array(lengths, np.int32).tofile(tmp_path / "lengths")
    write_index(tmp_path / "ours.idx", tmp_path / "lengths", dtype)
    assert (tmp_path / "ours.idx").read_bytes() == (tmp_path / "theirs.idx").read_bytes()
    open_index(str(tmp_path / "theirs")).check()


@pytest.mark.parametrize("size", [65499, 65500])
def test_a_token_has_the_type_of_megatrons_choice(size):
    encoder = open_encoder_of(size)
    assert corpus.Encoding(encoder, None, 0.0, "text").dtype is DType.optimal_dtype(size)


def open_encoder_of(size):
    return corpus.TextEncoder(size, None, lambda texts: [])


class Interrupted(BaseException):
    """Like a kill: nothing in the program handles it."""


@pytest.mark.parametrize("kind", ["x.jsonl", "x.jsonl.gz", "x.jsonl.zst", "x.parquet", "stream.arrow", "texts"])
def test_a_run_that_was_interrupted_goes_on_and_ends_with_the_same_bytes(home, tmp_path: Path, monkeypatch, kind):
    monkeypatch.setattr(documents, "BATCH_BYTES", 1000)
    monkeypatch.setattr(documents, "BATCH_PIECES", 4)
    monkeypatch.setattr("incr_ds.data.blocks.BLOCK_BYTES", 800)
    monkeypatch.setattr("incr_ds.data.blocks._ZSTD_INPUT", 50)
    monkeypatch.setattr("incr_ds.data.tables.ROWS_AT_ONCE", 7)
    monkeypatch.setattr(token_files, "SECONDS_BETWEEN_RECORDS", 0.0)
    inputs = (home / "texts",) if kind == "texts" else (write_kind(tmp_path, kind, TEXTS),)
    tokenizer = "train:sentencepiece" if kind == "texts" else str(home / "out" / "code_tokenizer")
    prepare_corpus(request(home, inputs=inputs, output=tmp_path / "whole" / "code", tokenizer=tokenizer))
    broken = request(home, inputs=inputs, output=tmp_path / "broken" / "code", tokenizer=tokenizer, workers=2)
    begins = []
    for batches in (1, 2, 3):
        with monkeypatch.context() as patch:
            patch.setattr(token_files.TokenFiles, "append", interrupting(batches, begins))
            with pytest.raises(Interrupted):
                prepare_corpus(broken)
        (left,) = (tmp_path / "broken").iterdir()
        assert left.name.startswith(".code.incomplete-corpus-")
    assert begins[0] == InputPlace() < begins[1] < begins[2]
    prepare_corpus(broken)
    assert contents(tmp_path / "broken") == contents(tmp_path / "whole")


def interrupting(batches, begins):
    """An ``append`` that writes ``batches``, then a part of one, and then ends the program."""
    append, calls = token_files.TokenFiles.append, []

    def interrupted(self, batch):
        if not calls:
            begins.append(self.progress.place)
        calls.append(batch)
        if len(calls) > batches:
            self._streams["digests"].write(b"half a batch")
            self._streams[self.bin_name("train")].write(b"more than was recorded")
            raise Interrupted
        append(self, batch)

    return interrupted


KILLED = """
import sys, time
from pathlib import Path
from incr_ds.data import blocks, documents, token_files
from incr_ds.data.corpus import prepare_corpus
from incr_ds.data.selection import CorpusRequest
blocks.BLOCK_BYTES, documents.BATCH_BYTES, token_files.SECONDS_BETWEEN_RECORDS = 900, 1000, 0.0
append, folder, stop = token_files.TokenFiles.append, Path(sys.argv[1]), int(sys.argv[2])
def slow(self, batch):
    append(self, batch)
    if self.progress.place.record > stop:
        print("reached", stop, flush=True)
        time.sleep(100)
token_files.TokenFiles.append = slow
prepare_corpus(CorpusRequest(
    inputs=(folder / "x.jsonl",), tokenizer=sys.argv[3], output=folder / "killed" / "code", held_out=0.25, workers=2
))
"""


def test_a_killed_run_leaves_no_process_and_the_next_goes_on(home, tmp_path: Path, monkeypatch):
    inputs, tokenizer = (write_kind(tmp_path, "x.jsonl", TEXTS),), str(home / "out" / "code_tokenizer")
    prepare_corpus(request(tmp_path, inputs=inputs, tokenizer=tokenizer, output=tmp_path / "whole" / "code"))
    wanted = request(tmp_path, inputs=inputs, tokenizer=tokenizer, output=tmp_path / "killed" / "code")
    for reached in (100, 200):
        command = [sys.executable, "-c", KILLED, str(tmp_path), str(reached), tokenizer]
        with subprocess.Popen(command, cwd=Path(__file__).parent, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout.readline() == f"reached {reached}\n"
            with pytest.raises(CheckpointError, match=rf"process {process.pid} on .* is writing to it"):
                prepare_corpus(wanted)
            workers = children(process.pid)
            assert len(workers) == 2
            process.send_signal(signal.SIGKILL)
        wait_for_end(workers)
    assert not list((tmp_path / "killed").glob("code*"))
    begins = []
    monkeypatch.setattr(token_files.TokenFiles, "append", interrupting(10**9, begins))
    prepare_corpus(wanted)
    assert begins[0] > InputPlace(0, 200)
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


def children(process):
    return [int(pid) for pid in Path(f"/proc/{process}/task/{process}/children").read_text().split()]


def wait_for_end(processes):
    deadline = time.monotonic() + 20
    while any(Path(f"/proc/{process}").exists() for process in processes):
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.mark.parametrize("moved", [0, 1, 3, 6])
def test_a_run_that_was_killed_while_it_published_finishes_that(home, tmp_path: Path, monkeypatch, moved):
    """``moved`` files are in their place: none of the facts of the old corpus stay beside new data."""
    output = tmp_path / "code"
    prepare_corpus(request(home, output=output, held_out=0.4))
    replace, moves = os.replace, []

    def interrupted(source, target):
        if Path(target).parent == tmp_path and ".incomplete-corpus-" in str(source):
            if len(moves) == moved:
                raise Interrupted
            moves.append(target)
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr("incr_ds.data.corpus_workspace.os.replace", interrupted)
        if moved < 6:
            with pytest.raises(Interrupted):
                prepare_corpus(request(home, output=output, overwrite=True))
            assert not (tmp_path / "code_facts.json").exists()
            assert len(list(tmp_path.glob("code*"))) == moved
    facts = prepare_corpus(request(home, output=output, overwrite=moved == 6))
    assert facts.splits["train"].documents == 141
    assert contents(tmp_path) == contents(home / "out")
    assert len(list(tmp_path.iterdir())) == 6


def test_another_request_starts_anew_and_removes_what_was_left(home, tmp_path: Path, monkeypatch):
    begins = []
    with monkeypatch.context() as patch:
        patch.setattr(token_files.TokenFiles, "append", interrupting(0, begins))
        with pytest.raises(Interrupted):
            prepare_corpus(request(home, output=tmp_path / "code"))
    prepare_corpus(request(home, output=tmp_path / "code", held_out=0.3))
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(path.name for path in (home / "out").iterdir())


@pytest.mark.parametrize("damage", ["{", '{"place": 5}', "gone"])
def test_a_damaged_record_of_progress_counts_as_none(home, tmp_path: Path, monkeypatch, damage):
    monkeypatch.setattr(token_files, "SECONDS_BETWEEN_RECORDS", 0.0)
    monkeypatch.setattr(documents, "BATCH_BYTES", 200)
    with monkeypatch.context() as patch:
        patch.setattr(token_files.TokenFiles, "append", interrupting(3, []))
        with pytest.raises(Interrupted):
            prepare_corpus(request(home, output=tmp_path / "code"))
    (left,) = tmp_path.iterdir()
    if damage == "gone":
        (left / "digests").unlink()
    else:
        (left / "progress.json").write_text(damage)
    begins = []
    with monkeypatch.context() as patch:
        patch.setattr(token_files.TokenFiles, "append", interrupting(10**9, begins))
        prepare_corpus(request(home, output=tmp_path / "code"))
    assert begins == [InputPlace()] and contents(tmp_path) == contents(home / "out")


def test_the_first_mistake_in_the_input_is_the_one_that_is_named(home, tmp_path: Path, monkeypatch):
    """The reader finds the damaged archive long before a worker finds line 290."""
    monkeypatch.setattr(documents, "BATCH_BYTES", 500)
    (tmp_path / "a.jsonl").write_bytes(as_lines(TEXTS[:289]) + b"{}\n" + as_lines(TEXTS[:3]))
    (tmp_path / "b.jsonl.gz").write_bytes(b"damaged")
    for workers in (1, 3):
        with pytest.raises(ConfigError, match=r"a\.jsonl, line 290: expected a JSON object .*found no keys"):
            prepare_corpus(
                request(
                    home,
                    inputs=(tmp_path,),
                    tokenizer=str(home / "out" / "code_tokenizer"),
                    output=tmp_path / "new" / "x",
                    workers=workers,
                )
            )
    assert not (tmp_path / "new").exists()


def test_a_worker_that_was_killed_is_reported_and_the_work_stays(home, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(corpus.Encoding, "encode", lambda self, batch: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(ConfigError, match="--workers 2: one was killed, .*Run the same command again"):
        prepare_corpus(request(home, output=tmp_path / "code", workers=2))
    monkeypatch.undo()
    prepare_corpus(request(home, output=tmp_path / "code", workers=2))
    assert contents(tmp_path) == contents(home / "out")


MEASURED = """
import json, resource, sys
from pathlib import Path
from incr_ds.data.corpus import prepare_corpus
from incr_ds.data.selection import CorpusRequest
folder, name = Path(sys.argv[1]), sys.argv[2]
tokenizer = str(folder / "out" / "code_tokenizer")
prepare_corpus(CorpusRequest(inputs=(folder / name,), tokenizer=tokenizer, output=folder / f"of_{name}", held_out=0.0, workers=2))
print(*(resource.getrusage(who).ru_maxrss // 1024 for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)))
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_corpus(home):
    """Peak MiB of the reader and of its workers, for 1 and for 12 MB of text. All tokens in memory would take 150 MB more."""
    peaks = []
    for name, repeats in (("small.jsonl", 40), ("large.jsonl", 500)):
        with open(home / name, "wb") as stream:
            for number in range(repeats):
                stream.write(as_lines([f"{number} {'word ' * 50}"] * 90))
        command = [sys.executable, "-c", MEASURED, str(home), name]
        shown = subprocess.run(command, check=True, capture_output=True, text=True, timeout=200).stdout
        peaks.append([int(word) for word in shown.split()])
    assert (home / "large.jsonl").stat().st_size > 12 * (home / "small.jsonl").stat().st_size > 11e6
    for small, large in zip(*peaks, strict=True):
        assert large < small + 15, peaks


@pytest.fixture(scope="module")
def unigram(tmp_path_factory: pytest.TempPathFactory):
    """A sentencepiece model of another kind than the trained one, and with the default normalization."""
    path = tmp_path_factory.mktemp("unigram") / "m"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS), model_prefix=str(path), vocab_size=80, minloglevel=2, hard_vocab_limit=False
    )
    return path.with_suffix(".model")


def written(output, split="train"):
    data = IndexedDataset(f"{output}_{split}_text_document", mmap=True)
    return [np.asarray(data[number]).tolist() for number in range(len(data))]


def test_a_sentencepiece_model_gives_its_own_tokens(home, unigram, tmp_path: Path):
    write_kind(tmp_path, "x.jsonl", [*TEXTS, ODD_TEXT])
    asked = request(home, inputs=(tmp_path / "x.jsonl",), tokenizer=str(unigram), output=tmp_path / "x", held_out=0.0)
    facts = prepare_corpus(asked)
    model = sentencepiece.SentencePieceProcessor(model_file=str(unigram))
    assert written(tmp_path / "x") == [[*model.encode(text), model.eos_id()] for text in [*TEXTS, ODD_TEXT]]
    assert (facts.vocabulary_size, facts.end_of_text) == (model.get_piece_size(), model.eos_id())


@pytest.mark.parametrize("given", ["folder", "tokenizer.json", "alone.json"])
def test_a_transformers_tokenizer_gives_the_tokens_of_its_own_call(home, tmp_path: Path, given):
    shutil.copytree(home / "out" / "code_tokenizer", tmp_path / "folder")
    shutil.copy(tmp_path / "folder" / "tokenizer.json", tmp_path / "alone.json")
    path = tmp_path / given if given != "tokenizer.json" else tmp_path / "folder" / given
    texts = [*TEXTS, ODD_TEXT]
    write_kind(tmp_path, "x.jsonl", texts)
    facts = prepare_corpus(
        request(
            home,
            inputs=(tmp_path / "x.jsonl",),
            tokenizer=str(path),
            output=tmp_path / "x",
            held_out=0.0,
            eos_token="</s>" if given == "alone.json" else None,
        )
    )
    theirs = AutoTokenizer.from_pretrained(tmp_path / "folder")
    assert written(tmp_path / "x") == [[*ids, theirs.eos_token_id] for ids in encode_documents(theirs, texts)]
    assert (facts.vocabulary_size, facts.end_of_text) == (len(theirs), theirs.eos_token_id)
    longest = max(map(len, encode_documents(theirs, texts))) + 1
    assert facts.splits["train"].longest_document == longest


def test_documents_may_end_without_a_token(home, tmp_path: Path):
    write_kind(tmp_path, "x.jsonl", TEXTS)
    asked = request(home, inputs=(tmp_path / "x.jsonl",), tokenizer=str(home / "out" / "code_tokenizer"), held_out=0.0)
    facts = prepare_corpus(corpus.CorpusRequest(**{**vars(asked), "output": tmp_path / "x", "append_eos": False}))
    theirs = load_tokenizer(home / "out" / "code_tokenizer", "test")
    assert written(tmp_path / "x") == encode_documents(theirs, TEXTS)
    assert facts.end_of_text is None
    stored = json.loads((tmp_path / "x_facts.json").read_text())["splits"]["train"]
    size = sum(len(text.encode()) for text in TEXTS)
    assert stored["bytes"] == size and stored["bytes_per_token"] == size / sum(map(len, written(tmp_path / "x")))


@pytest.mark.parametrize(
    ("tokenizer", "changes", "message"),
    [
        (
            "alone.json",
            {},
            r"--tokenizer .*alone\.json: it has no eos_token, .*Name one of its tokens with --eos-token",
        ),
        ("alone.json", {"eos_token": "<end>"}, r"--eos-token <end>: --tokenizer .*alone\.json has no such token"),
        ("alone.json", {"eos_token": "</s>", "append_eos": False}, "--eos-token: has no effect with --no-append-eos"),
        ("bad.json", {}, r"--tokenizer .*bad\.json: transformers cannot load it"),
        ("bad.model", {}, r"--tokenizer .*bad\.model: not a sentencepiece model"),
        ("empty.model", {}, r"--tokenizer .*empty\.model: not a sentencepiece model \(it has no pieces\)"),
        ("bad.txt", {}, r"--tokenizer .*bad\.txt: not a folder, and neither \.json nor \.model"),
        ("alone.json", {"workers": 0, "append_eos": False}, "--workers 0: expected at least 1"),
    ],
)
def test_a_tokenizer_that_does_not_fit_is_named(home, tmp_path: Path, tokenizer, changes, message):
    shutil.copy(home / "out" / "code_tokenizer" / "tokenizer.json", tmp_path / "alone.json")
    for name in ("bad.json", "bad.model", "bad.txt"):
        (tmp_path / name).write_text("{}")
    (tmp_path / "empty.model").touch()
    with pytest.raises(ConfigError, match=message):
        prepare_corpus(request(home, tokenizer=str(tmp_path / tokenizer), output=tmp_path / "new" / "x", **changes))
    assert not (tmp_path / "new").exists()


def test_a_tokenizer_that_loads_and_cannot_encode_is_named(home, tmp_path: Path):
    model = {"type": "WordLevel", "vocab": {"some": 0}, "unk_token": "?"}
    (tmp_path / "words.json").write_text(json.dumps({"version": "1.0", "model": model}))
    asked = {"tokenizer": str(tmp_path / "words.json"), "append_eos": False}
    with pytest.raises(
        ConfigError, match=r"--tokenizer .*words\.json: it cannot encode the text: .*Missing \[UNK\] token"
    ):
        prepare_corpus(request(home, output=tmp_path / "new" / "x", **asked))
    assert not list((tmp_path / "new").glob("x*"))


def test_a_message_shows_control_characters_as_escapes(tmp_path: Path):
    model = {"type": "WordLevel", "vocab": {}, "unk_token": "?"}
    (tmp_path / "x.json").write_text(json.dumps({"version": "1.0\x1b[2J", "model": model}))
    with pytest.raises(ConfigError, match=r"x\.json: transformers cannot load it: .*version '1\.0\\x1b\[2J'"):
        open_encoder(str(tmp_path / "x.json"))


def test_a_piece_that_is_not_utf_8_is_refused(tmp_path: Path):
    train_sentencepiece((f"the quick brown fox number {number} jumps" for number in range(400)), 330, tmp_path / "made")
    content = (tmp_path / "made" / "tokenizer.model").read_bytes()
    assert b"uick" in content
    (tmp_path / "bad.model").write_bytes(content.replace(b"uick", b"\x94ick"))
    with pytest.raises(ConfigError, match=r"bad\.model: not a sentencepiece model \(.*can't decode byte 0x94"):
        open_encoder(str(tmp_path / "bad.model"))


def test_an_error_of_the_system_in_a_rust_library_is_one_of_python(tmp_path):
    from incr_ds.data.tokenizer import _system_errors

    with pytest.raises(OSError, match="No space left on device") as found, _system_errors(tmp_path):
        raise Exception("No space left on device (os error 28)")
    assert (found.value.errno, found.value.filename) == (28, str(tmp_path))
    with pytest.raises(ValueError, match="another"), _system_errors(tmp_path):
        raise ValueError("another")
