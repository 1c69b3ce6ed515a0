"""Files that are swapped between ranks, with the manifest of incr_ds and as DeepSpeed leaves them, without one."""

import shutil
from itertools import combinations

import hostile
import pytest
from fuzz_targets import tensors
from sources import write_synthetic

from incr_ds.errors import CheckpointError
from incr_ds.testing.memory import small_architecture
from incr_ds.testing.pico import pico_architecture

pytestmark = pytest.mark.slow
LAYOUTS = {
    "ZeRO-1 of 3 ranks": {"data_parallel": 3},
    "ZeRO-2 of 2 ranks": {"data_parallel": 2, "zero_stage": 2},
    "ZeRO-3 of 3 ranks": {"data_parallel": 3, "zero_stage": 3},
    "3 tensor-parallel ranks": {"tensor_parallel": 3},
}


def swap(one, other):
    first, second = one.read_bytes(), other.read_bytes()
    one.write_bytes(second)
    other.write_bytes(first)


def opened(folder):
    """Read everything. Returns the message of the refusal, or None."""
    try:
        hostile.OPENERS["source"](folder)
    except CheckpointError as error:
        return str(error)
    return None


def test_files_swapped_between_ranks(tmp_path, tried):
    unread = 0
    for number, (name, layout) in enumerate(LAYOUTS.items()):
        (folder := tmp_path / str(number)).mkdir()
        tensor_parallel = layout.get("tensor_parallel", 1) > 1
        write_synthetic(
            folder, small_architecture("llama") if tensor_parallel else pico_architecture(vocab_size=11), **layout
        )
        source = folder / "source"
        truth = tensors(source)
        files = sorted([*source.rglob("*optim_states.pt"), *source.rglob("*model_states.pt")])
        pairs = [pair for pair in combinations(files, 2) if pair[0].name[-15:] == pair[1].name[-15:]]
        for pair, manifest in [(pair, manifest) for pair in pairs for manifest in (True, False)]:
            copy = folder / "copy"
            shutil.copytree(source, copy)
            if not manifest:
                (copy / "manifest.json").unlink()
            swap(*(copy / path.relative_to(source) for path in pair))
            with tried.case(f"{pair[0].name} and {pair[1].name}, {name}{'' if manifest else ', no manifest'}"):
                said = opened(copy)
                if said is None:  # a file that only DeepSpeed reads
                    assert not manifest and "ZeRO-3" in name and pair[0].name.endswith("model_states.pt")
                    unread += 1
                    assert all(value.equal(truth[key]) for key, value in tensors(copy).items())
                else:
                    assert pair[0].name in said or pair[1].name in said, said
                    assert manifest or "swapped" in said, said
            shutil.rmtree(copy)
    tried.note = (
        f"every pair of ranks, with the manifest and without one; the message names the file; {unread} swaps of files that "
        "are not read changed nothing"
    )
