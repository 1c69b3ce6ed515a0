"""JSON made to hang a reader, to fill its memory or to mislead it gets one message, at once."""

import json
import os

import pytest
import xxhash
from sources import write_synthetic

from incr_ds.arch.multipliers import read_multipliers
from incr_ds.checkpoint.manifest import journal_entry
from incr_ds.checkpoint.opening import open_source
from incr_ds.checkpoint.publish import read_manifest
from incr_ds.config.json_file import SMALL, parse_json, read_json
from incr_ds.errors import CheckpointError, ConfigError, IncrError
from incr_ds.offline.grown_files import source_training
from incr_ds.testing.pico import pico_architecture
from incr_ds.testing.synthetic import SyntheticCheckpoint

DEEP = '{"a": ' + "[" * 100_000 + "]" * 100_000 + "}"


def pipe(path):
    os.mkfifo(path)


def device(path):
    path.symlink_to("/dev/zero")


def large(path):
    with open(path, "wb") as stream:
        stream.truncate(SMALL + 1)


KINDS = {
    pipe: r"cannot be read \(a pipe, not a regular file\)",
    device: r"cannot be read \(a device, not a regular file\)",
    large: r"cannot be read \(more than 16,777,216 bytes, the most that is read\)",
    lambda path: path.mkdir(): r"cannot be read \(a folder, not a regular file\)",
    lambda path: path.write_bytes(b"\xff"): r"cannot be read \('utf-8' codec can't decode byte 0xff",
    lambda path: path.write_text(DEEP): r"nested more than 64 levels deep",
    lambda path: path.write_text('{"a": ' + "[" * 80 + "]" * 80 + "}"): r"nested more than 64 levels deep",
    lambda path: path.write_text('{"a": NaN}'): r"not valid JSON: NaN is not a JSON number",
    lambda path: path.write_text('{"a": -Infinity}'): r"-Infinity is not a JSON number",
    lambda path: path.write_text('{"a": 1e999}'): r"1e999 is too large for a number",
    lambda path: path.write_text('{"a": 1' + "0" * 5000 + "}"): r"not valid JSON: Exceeds the limit",
    lambda path: path.write_text('{"a": {"b": 1, "c": 2, "b": 3}}'): r"key 'b' appears twice",
    lambda path: path.write_text("[1]"): r"expected a JSON object, found list",
}


@pytest.mark.parametrize("make", KINDS)
def test_what_is_wrong_with_a_json_file_is_said_at_once(tmp_path, make):
    make(tmp_path / "a.json")
    with pytest.raises(ConfigError, match=rf"a\.json: .*{KINDS[make]}"):
        read_json(tmp_path / "a.json", ConfigError)


def test_a_name_with_a_nul_or_of_5000_characters_is_no_file():
    for name, why in (("a\0b", "null byte"), ("x" * 5000, "File name too long")):
        with pytest.raises(ConfigError, match=why):
            read_json(os.path.join("/tmp", name), ConfigError)


def test_json_as_people_write_it_is_read():
    assert parse_json('{"a": [1, 2.5, {"b": null}], "c": "x"}', ConfigError, "x") == {
        "a": [1, 2.5, {"b": None}],
        "c": "x",
    }
    assert parse_json("[" * 64 + "]" * 64, ConfigError, "x")
    assert parse_json('{"loss": NaN}', ConfigError, "x", finite=False)["loss"] != 0


@pytest.mark.parametrize("make", [pipe, device, lambda path: path.write_text(DEEP)])
@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
def test_a_hugging_face_folder_with_such_a_file_is_refused(tmp_path, make, name):
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {}}')
    (tmp_path / "config.json").write_text(json.dumps(dict(pico_architecture().config)))
    (tmp_path / name).unlink()
    make(tmp_path / name)
    with pytest.raises(IncrError, match=rf"cannot be read|64 levels|{tmp_path.name}: neither a DeepSpeed checkpoint"):
        open_source(tmp_path)


@pytest.mark.parametrize("make", [pipe, device, lambda path: path.write_text(DEEP)])
def test_a_trainer_state_that_cannot_be_read_decides_nothing(tmp_path, make):
    write_synthetic(tmp_path, pico_architecture(num_hidden_layers=1, vocab_size=11))
    make(tmp_path / "source" / "trainer_state.json")
    assert open_source(tmp_path / "source").facts.recorded.tokens is None


def test_multipliers_behind_a_pipe_are_not_waited_for(tmp_path):
    (tmp_path / "multipliers.json").symlink_to("/dev/zero")
    assert read_multipliers(tmp_path) == {}
    (tmp_path / "multipliers.json").unlink()
    (tmp_path / "multipliers.json").write_text(DEEP)
    with pytest.raises(CheckpointError, match=r"multipliers\.json: .*64 levels deep; expected the JSON that a growth"):
        read_multipliers(tmp_path)


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sealed")
    write_synthetic(folder, pico_architecture(num_hidden_layers=1, vocab_size=11))
    return folder / "source"


def resealed(published, folder, path, value):
    """The manifest with one entry changed, and a checksum that fits."""
    content = json.loads((published / "manifest.json").read_text())
    del content["checksum"]
    *parents, leaf = path
    inner = content
    for key in parents:
        inner = inner[key]
    inner[leaf] = value
    checksum = xxhash.xxh3_128(json.dumps(content, sort_keys=True).encode()).hexdigest()
    text = json.dumps({**content, "checksum": checksum}, indent=1, sort_keys=True) + "\n"
    (folder / "manifest.json").write_text(text)


LISTED = "grown/mp_rank_00_model_states.pt"
MALFORMED = [
    (("files",), [], r"files: Input should be a valid dictionary, found \[\]"),
    (("files", LISTED), 5, r"files\.grown/mp_rank_00_model_states\.pt: Input should be a valid dictionary, found 5"),
    (
        ("files", LISTED),
        {"bytes": "many", "xxh3": "0" * 32},
        r"pt\.bytes: Input should be a valid integer, found 'many'",
    ),
    (("files", LISTED), {"bytes": 5}, r"pt\.xxh3: Field required"),
    (("files", LISTED, "bytes"), -1, r"greater than or equal to 0, found -1"),
    (("files", LISTED, "tensors"), [5], r"tensors\.0: Input should be a valid dictionary"),
    (("files", LISTED, "tensors", 0, "state"), "gone", r"tensors\.0\.state: Input should be 'weight', 'exp_avg'"),
    (("files", "../outside"), {"bytes": 5, "xxh3": "0" * 32}, r"not the path of a file below the folder"),
    (("files", "/etc/passwd"), {"bytes": 5, "xxh3": "0" * 32}, r"not the path of a file below the folder"),
    (("facts",), "text", r"facts: Input should be a valid dictionary"),
    (("facts", "settings"), [1], r"facts\.settings: Input should be a valid dictionary"),
    (("facts", "function_preserving"), "yes", r"facts\.function_preserving: Input should be a valid boolean"),
    (("kind",), None, r"kind: Input should be a valid string"),
]


@pytest.mark.parametrize(("path", "value", "message"), MALFORMED, ids=lambda value: str(value)[:30])
def test_a_malformed_manifest_whose_checksum_fits_is_one_message(published, tmp_path, path, value, message):
    resealed(published, tmp_path, path, value)
    with pytest.raises(CheckpointError, match=rf"manifest\.json: .*{message}.*although the checksum matches"):
        read_manifest(tmp_path)
    with pytest.raises(CheckpointError, match=r"manifest\.json"):
        source_training(tmp_path, SyntheticCheckpoint(pico_architecture()).facts)


def test_a_manifest_with_changed_facts_and_a_new_checksum_is_still_one(published, tmp_path):
    resealed(published, tmp_path, ("facts", "note"), "of another version")
    assert read_manifest(tmp_path)["facts"]["note"] == "of another version"


@pytest.mark.parametrize(
    "line",
    [
        "",
        "{",
        "[]",
        "5",
        '{"path": "a"}',
        '{"path": "../a", "digest": {"bytes": 1, "xxh3": "%s"}}' % ("0" * 32),
        '{"path": "a", "digest": {"bytes": "x", "xxh3": "%s"}}' % ("0" * 32),
        DEEP,
    ],
    ids=range(8),
)
def test_a_line_of_a_journal_that_no_growth_wrote_is_work_to_do_again(line):
    assert journal_entry(line) is None
    assert journal_entry('{"path": "a/b", "digest": {"bytes": 1, "xxh3": "%s"}}' % ("0" * 32)) is not None
