"""Two ranks that hash a checkpoint together, against one process that hashes it alone."""

import json

import pytest
from hashing_ranks import SIZES, together_and_alone

from incr_ds.testing.processes import run_processes


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hashing")
    return folder, run_processes(together_and_alone, 2, str(folder))


def test_the_manifest_has_the_bytes_that_one_process_writes(found):
    _, (first, _) = found
    _, by_two, alone = first["saved"]
    assert by_two == alone and by_two.count("xxh3") == 7


def test_every_file_is_hashed_once_and_the_bytes_are_shared(found):
    _, (first, second) = found
    mine, other = first["saved"][0], second["saved"][0]
    assert len({*mine, *other}) == len(mine) + len(other) == 7  # five of the ranks, config.json and latest
    files = json.loads(first["saved"][1])["files"]
    loads = [
        sum(entry["bytes"] for name, entry in files.items() if name.split("/")[-1] in own) for own in (mine, other)
    ]
    assert sum(loads) > sum(sum(sizes) for sizes in SIZES.values()) and max(loads) < 0.55 * sum(loads)
    assert "rank1_0.bin" in other and "rank0_0.bin" in mine and "rank1_1.bin" in other


def test_a_damaged_file_is_named_whichever_rank_hashes_it(found):
    folder, (first, second) = found
    messages, *_ = first["damage"]
    assert messages == second["damage"][0]
    path = folder / "checkpoints" / "step_00000002"
    for name in json.loads((path / "manifest.json").read_text())["files"]:
        assert messages[name].startswith(f"{path / name}: checksum xxh3 ") and "content changed" in messages[name]
    assert messages["two"] == messages["global_step2/rank0_0.bin"]  # the first in the manifest


def test_a_damaged_checkpoint_is_skipped_by_all_and_said_once(found):
    folder, (first, second) = found
    (_, said, chosen, whole), (_, silent, *same) = first["damage"], second["damage"]
    assert same == [chosen, whole] == [str(folder / "checkpoints" / f"step_0000000{step}") for step in (1, 2)]
    assert len(said) == 1 and "global_step2/rank1_0.bin: checksum" in said[0] and not silent


def test_a_rank_that_cannot_read_fails_all(found):
    _, (first, second) = found
    (saving, verifying), left = first["failures"]
    assert first["failures"] == second["failures"]
    assert saving[0] == "CheckpointError" and "step_00000003: saving failed: OSError: " in saving[1]
    assert "Input/output error" in saving[1] and "Nothing was published" in saving[1]
    assert verifying[0] == "OSError" and "rank 1 of 2" in verifying[1]
    assert left == ["step_00000001", "step_00000002"]
