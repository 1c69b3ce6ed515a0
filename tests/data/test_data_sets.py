"""Data sets on disk: every entry of an index is checked, and a fingerprint covers every token."""

import json
import os
import struct
from pathlib import Path

import numpy as np
import pytest

from incr_ds.data import fingerprint
from incr_ds.data.fingerprint import combine, describe, identity, num_chunks, record_of, recorded, scan_chunk
from incr_ds.data.index_file import HEADER, open_index
from incr_ds.data.megatron import IndexedDatasetBuilder
from incr_ds.errors import ConfigError

LENGTHS = [3, 5, 4, 6]  # sequences; two documents of two sequences each


def write_data(prefix, dtype=np.uint16, first=0):
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    position = first
    for pair in (LENGTHS[:2], LENGTHS[2:]):
        builder.add_document(list(range(position, position + sum(pair))), pair)
        position += sum(pair)
    builder.finalize(f"{prefix}.idx")
    return str(prefix)


def test_a_data_set_is_described_by_its_content_wherever_it_lies(tmp_path: Path):
    (tmp_path / "elsewhere").mkdir()
    here, there = write_data(tmp_path / "a", first=7), write_data(tmp_path / "elsewhere" / "b", first=7)
    found = describe(here)
    assert (found.tokens, found.smallest, found.largest) == (18, 7, 24)
    assert found.fingerprint == describe(there).fingerprint != describe(write_data(tmp_path / "c", first=8)).fingerprint


def test_one_changed_token_at_equal_size_is_another_data_set(tmp_path: Path):
    prefix = write_data(tmp_path / "a")
    before = describe(prefix)
    content = bytearray((tmp_path / "a.bin").read_bytes())
    content[10] ^= 1
    (tmp_path / "a.bin").write_bytes(content)
    assert describe(prefix).fingerprint != before.fingerprint


def test_any_split_of_the_chunks_gives_the_same_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(fingerprint, "CHUNK_BYTES", 8)
    index = open_index(write_data(tmp_path / "a"))
    numbers = range(num_chunks(index))
    assert len(numbers) == 5  # 36 bytes
    shares = [{number: scan_chunk(index, number) for number in numbers[rank::2]} for rank in range(2)]
    chunks = [shares[number % 2][number] for number in numbers]
    assert combine(index, chunks) == describe(index.prefix)
    assert [(chunk.smallest, chunk.largest) for chunk in chunks][-1] == (16, 17)


def test_a_record_holds_until_a_file_changes(tmp_path: Path):
    prefix = write_data(tmp_path / "a")
    record = record_of([describe(prefix)])
    assert recorded(record, [prefix]) == {prefix: describe(prefix)}
    times = os.stat(f"{prefix}.bin")
    content = bytearray((tmp_path / "a.bin").read_bytes())
    content[0] ^= 1
    (tmp_path / "a.bin").write_bytes(content)
    os.utime(f"{prefix}.bin", ns=(times.st_atime_ns, times.st_mtime_ns))  # as a copy that keeps times
    assert identity(prefix)[".bin"][:2] == [times.st_size, times.st_mtime_ns]
    assert recorded(record, [prefix]) == {}


@pytest.mark.parametrize(
    "damaged", [{}, {"sets": 1}, {"sets": {"x": {}}, "checksum": ""}, {"sets": {}, "checksum": "0"}]
)
def test_a_damaged_record_is_as_good_as_none(tmp_path: Path, damaged):
    assert recorded(damaged, [write_data(tmp_path / "a")]) == {}


def test_one_changed_character_of_a_record_is_noticed(tmp_path: Path):
    prefix = write_data(tmp_path / "a")
    text = json.dumps(record_of([describe(prefix)]))
    assert recorded(json.loads(text), [prefix])
    assert recorded(json.loads(text.replace('"largest": 17', '"largest": 16')), [prefix]) == {}


def test_a_token_outside_the_vocabulary_is_refused(tmp_path: Path):
    found = describe(write_data(tmp_path / "a", first=482))
    found.check_tokens(500)
    with pytest.raises(ConfigError, match="a.bin: token id 499 exceeds the model's vocab_size 499"):
        found.check_tokens(499)


def test_a_negative_token_is_refused(tmp_path: Path):
    with pytest.raises(ConfigError, match="a.bin: token id -1 is negative, which is not a valid id"):
        describe(write_data(tmp_path / "a", np.int32, first=-1)).check_tokens(500)


def patched(path, offset, packed):
    content = bytearray(path.read_bytes())
    content[HEADER.size + offset : HEADER.size + offset + len(packed)] = packed
    path.write_bytes(content)


DAMAGE = {
    "length": (0, struct.pack("<i", -3), r"a.idx: sequence 0 has a negative length; the file is damaged"),
    "longer": (4, struct.pack("<i", 6), r"a.idx: sequence 2 does not start where the one before it ends"),
    "last": (12, struct.pack("<i", 60), r"a.bin: 36 bytes, but its .idx describes 144"),
    "pointer": (16 + 8, struct.pack("<q", 99), r"a.idx: sequence 1 does not start where the one before it ends"),
    "first document": (48, struct.pack("<q", 1), r"a.idx: its documents do not start at sequence 0 and end at 4"),
    "last document": (64, struct.pack("<q", 9), r"a.idx: its documents do not start at sequence 0 and end at 4"),
    "document order": (56, struct.pack("<q", 77), r"a.idx: document 1 ends before it starts"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_wrong_entry_of_an_index_is_named(tmp_path: Path, name):
    offset, packed, message = DAMAGE[name]
    prefix = write_data(tmp_path / "a")
    patched(tmp_path / "a.idx", offset, packed)
    with pytest.raises(ConfigError, match=message):
        describe(prefix)


@pytest.mark.parametrize("code", [0, 6, 7, 9, 200])
def test_a_type_code_that_is_not_one_of_token_ids_is_refused(tmp_path: Path, code):
    prefix = write_data(tmp_path / "a")
    patched(tmp_path / "a.idx", 17 - HEADER.size, bytes([code]))
    with pytest.raises(
        ConfigError, match=f"type code {code} is not a type of token ids .expected one of 1, 2, 3, 4, 5, 8"
    ):
        open_index(prefix)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda p: p.with_suffix(".idx").unlink(), "x.idx: no such file"),
        (lambda p: p.with_suffix(".bin").unlink(), "x.bin: no such file"),
        (lambda p: p.with_suffix(".idx").write_bytes(b"not an index at all"), "x.idx: not a Megatron index file"),
        (lambda p: p.with_suffix(".idx").write_bytes(p.with_suffix(".idx").read_bytes()[:-8]), "its header describes"),
        (lambda p: p.with_suffix(".bin").write_bytes(b"12"), "x.bin: 2 bytes, but its .idx describes 36"),
        (lambda p: p.with_suffix(".bin").write_bytes(b"123"), "x.bin: ends 1 bytes into a token of 2 bytes"),
    ],
)
def test_damaged_data_is_refused(tmp_path: Path, damage, message: str):
    write_data(tmp_path / "x")
    damage(tmp_path / "x")
    with pytest.raises(ConfigError, match=message):
        describe(str(tmp_path / "x"))
