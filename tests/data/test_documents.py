"""Kinds of input: each is read to the documents that were written, and what is wrong is named with file and line or row."""

import gzip
import io
import json
import random
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from incr_ds.data import blocks, documents, tables
from incr_ds.data.documents import InputPlace, NotText, documents_of, read_batches
from incr_ds.data.selection import CorpusRequest, select_files
from incr_ds.errors import ConfigError

# Random letters do not compress into one block.
LETTERS = random.Random(0)
TEXTS = [
    f"document {number} " * (number % 9 + 1) + "".join(LETTERS.choices("abcdefgh \n", k=60)) + "\n é漢🙂 \u2028"
    for number in range(300)
]


def as_lines(texts, key="text"):
    return "".join(json.dumps({key: text, "id": 3}) + "\n" for text in texts).encode()


def table(texts, key="text"):
    return pa.table({"number": list(range(len(texts))), key: texts})


def write_arrow(path, texts, *, rows=40, of_file=False, key="text"):
    data = table(texts, key)
    new = pa.ipc.new_file if of_file else pa.ipc.new_stream
    with pa.OSFile(str(path), "wb") as sink, new(sink, data.schema) as writer:
        writer.write_table(data, max_chunksize=rows)


def write_saved(folder, texts, parts=3):
    """What save_to_disk of Hugging Face datasets writes: arrow streams, and the files that list and describe them."""
    folder.mkdir(parents=True)
    names = [f"data-{part:05d}-of-{parts:05d}.arrow" for part in range(parts)]
    share = len(texts) // parts
    for part, name in enumerate(names):
        write_arrow(folder / name, texts[part * share : (part + 1) * share if part < parts - 1 else None])
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in names]}))
    (folder / "dataset_info.json").write_text("{}")
    write_arrow(folder / "cache-1234.arrow", ["a result of map that nobody listed"])


def write_kind(folder, name, texts):
    path = folder / name
    if name == "saved":
        write_saved(path, texts)
    elif name.endswith(".parquet"):
        pq.write_table(table(texts), path, row_group_size=70)
    elif name.endswith(".arrow"):
        write_arrow(path, texts, of_file="file" in name)
    elif name.endswith(".gz"):
        path.write_bytes(gzip.compress(as_lines(texts[:100])) + gzip.compress(as_lines(texts[100:])))
    elif name.endswith(".zst"):
        compress = zstandard.ZstdCompressor().compress  # one frame behind the other, as pzstd writes them
        path.write_bytes(b"".join(compress(as_lines(texts[first : first + 30])) for first in range(0, len(texts), 30)))
    else:
        path.write_bytes(as_lines(texts))
    return path


KINDS = (
    "x.jsonl",
    "x.jsonl.gz",
    "x.json.gz",
    "x.jsonl.zst",
    "x.json.zst",
    "x.parquet",
    "stream.arrow",
    "file.arrow",
    "saved",
)


def selected(*inputs, **changes):
    return select_files(CorpusRequest(inputs=inputs, tokenizer="", output=Path("out"), **changes))


BEGINNING = InputPlace()


def read(selection, start=BEGINNING, key="text"):
    """The documents from a place on, and the place behind each batch with the number of documents until there."""
    found, places = [], []
    for batch in read_batches(selection, start, key):
        found += [text for piece in batch.pieces for text in documents_of(piece, key)]
        places.append((batch.after, len(found), batch.read))
    return found, places


@pytest.fixture
def small_pieces(monkeypatch):
    """Many batches from little text."""
    monkeypatch.setattr(documents, "BATCH_BYTES", 2000)
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 900)
    monkeypatch.setattr(blocks, "_ZSTD_INPUT", 50)
    monkeypatch.setattr(tables, "ROWS_AT_ONCE", 7)


@pytest.mark.parametrize("kind", KINDS)
def test_documents_come_back_from_any_place(small_pieces, tmp_path: Path, kind):
    write_kind(tmp_path, kind, TEXTS)
    selection = selected(tmp_path)
    found, places = read(selection)
    assert found == TEXTS
    assert len(places) > 1 and [done for *_, done in places] == sorted(done for *_, done in places)
    assert 0.99 * selection.total_bytes < places[-1][2] <= selection.total_bytes
    for after, number, _ in places:
        assert read(selection, after)[0] == TEXTS[number:], after


@pytest.mark.parametrize("ending", ["", ".gz", ".zst"])
def test_a_text_file_is_one_document(tmp_path: Path, ending):
    text = "\n\n a line\r\n é" * 90_000  # more than one block
    pack = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.ZstdCompressor().compress}[ending]
    (tmp_path / f"a.txt{ending}").write_bytes(pack(text.encode()))
    (tmp_path / f"b.txt{ending}").write_bytes(pack(b""))
    (tmp_path / f"c.txt{ending}").write_bytes(pack(b"caf\xe9"))
    found, _ = read(selected(tmp_path))
    assert found == [text, NotText(tmp_path / f"c.txt{ending}", 3)]


def test_files_are_read_in_path_order_and_a_saved_data_set_in_its_own(tmp_path: Path):
    write_saved(tmp_path / "b", TEXTS[100:200])
    state = json.loads((tmp_path / "b" / "state.json").read_text())
    state["_data_files"].reverse()
    (tmp_path / "b" / "state.json").write_text(json.dumps(state))
    pq.write_table(table(TEXTS[:100]), tmp_path / "a.parquet")
    (tmp_path / "c.txt").write_text("last")
    found, _ = read(selected(tmp_path))
    # os.walk gives a folder's own files before its subfolders
    assert found == [*TEXTS[:100], "last", *TEXTS[166:200], *TEXTS[133:166], *TEXTS[100:133]]


def test_a_folder_that_datasets_wrote_is_read():
    """saved_by_datasets is what save_to_disk of datasets 5.2.0 wrote for these texts."""
    texts = [f"doc {number} é\n" * (number % 5 + 1) for number in range(5)]
    assert read(selected(Path(__file__).parent / "saved_by_datasets"))[0] == texts


def test_the_key_may_be_another(tmp_path: Path):
    (tmp_path / "a.jsonl").write_bytes(as_lines(TEXTS[:3], "content"))
    pq.write_table(table(TEXTS[3:6], "content"), tmp_path / "b.parquet")
    dictionary = pa.table({"content": pa.array(TEXTS[6:9]).dictionary_encode()})
    pq.write_table(dictionary, tmp_path / "c.parquet")
    assert read(selected(tmp_path), key="content")[0] == TEXTS[:9]


def test_several_data_sets_are_not_mixed(tmp_path: Path):
    write_saved(tmp_path / "all" / "train", TEXTS)
    write_saved(tmp_path / "all" / "test", TEXTS)
    (tmp_path / "all" / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    with pytest.raises(
        ConfigError, match=r"--input .*all: contains the data sets train, test; name those .*all/train\."
    ):
        selected(tmp_path / "all")
    assert read(selected(tmp_path / "all" / "train"))[0] == TEXTS


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ('{"_data_files": [{"filename": "../x.arrow"}]}', r"expected a list of objects .* found '\.\./x\.arrow'"),
        ('{"_data_files": [{"filename": "gone.arrow"}]}', r"gone\.arrow: no such file, but state\.json lists it"),
        ("{}", "expected a list of objects with the key filename"),
        ("[", "not valid JSON"),
    ],
)
def test_a_damaged_saved_data_set_is_named(tmp_path: Path, state, message):
    write_saved(tmp_path / "saved", TEXTS)
    (tmp_path / "saved" / "state.json").write_text(state)
    with pytest.raises(ConfigError, match=message):
        selected(tmp_path / "saved")


def cut(content):
    return content[: len(content) * 2 // 3]


def noise():
    return random.Random(0).randbytes(5000)


def parquet_bytes(data):
    sink = io.BytesIO()
    pq.write_table(data, sink)
    return sink.getvalue()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", as_lines(TEXTS) + b'{"text": 5}\n', r"a\.jsonl, line 301: text is int, expected a string"),
        (
            "a.jsonl",
            as_lines(TEXTS) + b"\n\n{no",
            r"a\.jsonl, line 303: expected a JSON object .*found no JSON \(Expecting",
        ),
        ("a.jsonl", b'["text"]', r"a\.jsonl, line 1: expected a JSON object with the key text .*found a list"),
        ("a.jsonl", b'{"body": "x"}', r"line 1: .* key text \(option --text-key\), found the keys body\."),
        ("a.jsonl", as_lines(TEXTS) + b'{"text": "caf\xe9"}', r"a\.jsonl, line 301: not UTF-8 text \(byte 13\)"),
        ("a.jsonl", b'{"text": "\\ud800"}', r"line 1: text has half of a surrogate pair \('\\ud800'\)"),
        ("a.jsonl.gz", gzip.compress(as_lines(TEXTS) + b"{"), r"a\.jsonl\.gz, line 301: expected a JSON object"),
        ("a.jsonl.gz", cut(gzip.compress(as_lines(TEXTS))), r"a\.jsonl\.gz: the gzip file ends too early"),
        ("a.jsonl.gz", as_lines(TEXTS), r"a\.jsonl\.gz: not a whole gzip file"),
        ("a.txt.zst", cut(zstandard.compress(noise())), r"a\.txt\.zst: the zstd file ends too early"),
        ("a.txt.zst", b"no zstd at all", r"a\.txt\.zst: not a whole zstd file"),
        ("a.parquet", cut(parquet_bytes(table(TEXTS))), r"a\.parquet: cannot be read as parquet"),
        ("a.parquet", parquet_bytes(table(["a", None])), r"a\.parquet, row 2: text is NoneType, expected a string"),
        ("a.parquet", parquet_bytes(table(["a"], "body")), r"expected one column text, found the columns number, body"),
        ("a.parquet", parquet_bytes(pa.table({"text": [1]})), r"the column text holds int64, expected strings"),
        ("a.arrow", b"", r"a\.arrow: cannot be read as arrow"),
        ("a.arrow", noise(), r"a\.arrow: cannot be read as arrow"),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else "",
)
def test_what_is_wrong_is_named(tmp_path: Path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=f"--input .*{message}"):
        read(selected(tmp_path / name))


def test_an_arrow_file_with_offsets_outside_of_its_text_is_refused(tmp_path: Path):
    write_arrow(tmp_path / "x.arrow", ["abcdefgh", "ijklmnop"])
    content = (tmp_path / "x.arrow").read_bytes()
    offsets = b"".join(number.to_bytes(4, "little") for number in (0, 8, 16))
    assert content.count(offsets) == 1
    (tmp_path / "x.arrow").write_bytes(content.replace(offsets, offsets[:-4] + (1 << 20).to_bytes(4, "little")))
    with pytest.raises(ConfigError, match=r"x\.arrow: cannot be read as arrow"):
        read(selected(tmp_path))


@pytest.mark.parametrize(("name", "where"), [("a.txt", r"a\.txt"), ("a.jsonl", r"a\.jsonl, line 301")])
def test_a_document_that_is_too_long_is_refused(tmp_path: Path, monkeypatch, name, where):
    monkeypatch.setattr(documents, "LONGEST_DOCUMENT", 1 << 20)
    (tmp_path / name).write_bytes(as_lines(TEXTS) + b"x" * (3 << 20))
    with pytest.raises(
        ConfigError, match=rf"--input .*{where}: longer than .* bytes, the most that one document may have"
    ):
        read(selected(tmp_path))
