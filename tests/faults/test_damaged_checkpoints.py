"""Any file of any kind of checkpoint that is damaged, lost or replaced: refused by name, or the same tensors are read."""

import random
import shutil

import hostile
import pytest
import torch
from fuzz_sources import SOURCES
from fuzz_targets import tensors
from sources import write_synthetic

from incr_ds.checkpoint.opening import open_source
from incr_ds.errors import IncrError
from incr_ds.testing.memory import small_architecture

pytestmark = pytest.mark.slow
PUBLISHED = {
    "ZeRO-1": {"data_parallel": 3},
    "ZeRO-2": {"data_parallel": 2, "zero_stage": 2},
    "ZeRO-3": {"data_parallel": 2, "zero_stage": 3},
    "tensor x pipeline ranks": {"tensor_parallel": 3, "pipeline_parallel": 2},
    "Megatron-DeepSpeed": {"modules": "megatron-deepspeed"},
    "universal": {"format": "universal"},
    "torch_dist": {"format": "torch_dist"},
    "torch": {"format": "torch", "distributed_optimizer": True},
    "Hugging Face": {"format": "huggingface"},
}
FOREIGN = ("bin", "indexed", "torch_dist", "fsdp_dtensor", "torch_dcp", "ranks", "ranks, distributed")


def flip(path, other):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def truncate(path, other):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path, other):
    path.write_bytes(b"")


def delete(path, other):
    path.unlink()


def fill(path, other):
    path.write_bytes(random.Random(3).randbytes(path.stat().st_size))


def replace(path, other):
    shutil.copyfile(other, path)


def swap(path, other):
    first, second = path.read_bytes(), other.read_bytes()
    path.write_bytes(second)
    other.write_bytes(first)


DAMAGES = (flip, truncate, empty, delete, fill, replace, swap)


def cases(folder, manifest):
    """Each file with each damage, and with the next file of its kind, by which it may be replaced.

    Without a manifest nothing shows a flipped bit in a safetensors file: its format has no checksum.
    """
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.stat().st_size)
    for path in files:
        alike = [other for other in files if other.suffix == path.suffix]
        other = alike[(alike.index(path) + 1) % len(alike)]
        for damage in DAMAGES:
            shows = manifest or path.suffix != ".safetensors" or damage is not flip
            if shows and (damage not in (replace, swap) or other.read_bytes() != path.read_bytes()):
                yield path.relative_to(folder), damage, other.relative_to(folder)


def said_of(folder, truth):
    """The message that refuses ``folder``; None if it is accepted with the tensors that it had.

    A checkpoint that has lost its moments says so, and then its weights are those of the module: the masters, rounded.
    """
    try:
        hostile.OPENERS["source"](folder)
        found = tensors(folder)
        lost = open_source(folder).facts.no_moments and any(state == "exp_avg" for _, state in truth)
    except IncrError as error:
        return str(error)
    expected = {key: value.bfloat16().float() if lost else value for key, value in truth.items()}
    assert lost or found.keys() == truth.keys()
    assert all(torch.equal(value, expected[key]) for key, value in found.items())
    return None


def damage_each(folder, copy, tried, judged, manifest=True):
    """Try each case on a copy of ``folder``; ``judged`` gets what was damaged, how, and the message."""
    truth = tensors(folder)
    for name, damage, other in cases(folder, manifest):
        shutil.copytree(folder, copy)
        damage(copy / name, copy / other)
        with tried.case(f"{damage.__name__} {name} of {folder.parent.name}"):
            judged(name, damage, other, said_of(copy, truth))
        shutil.rmtree(copy)


@pytest.mark.timeout(1800)
def test_damaged_checkpoints(tmp_path, tried):
    """With their manifest."""

    def judged(name, damage, other, said):
        if name.name == "manifest.json" and damage is delete:
            assert said is None
        else:
            assert said is not None and (name.name in said or other.name in said), said

    for kind, layout in PUBLISHED.items():
        (home := tmp_path / kind).mkdir()
        write_synthetic(home, small_architecture("llama"), **layout)
        damage_each(home / "source", tmp_path / "copy", tried, judged)
    tried.note = f"each file of {', '.join(PUBLISHED)}: " + ", ".join(damage.__name__ for damage in DAMAGES)


@pytest.mark.timeout(1800)
def test_damaged_checkpoints_without_a_manifest(tmp_path, tried):
    """As other programs write them. What is accepted did not matter: the tensors are the same."""
    harmless = []

    def judged(name, damage, other, said):
        harmless.extend([] if said else [name.name])

    for kind in FOREIGN:
        (tmp_path / kind).mkdir()
        folder = SOURCES[kind](tmp_path / kind / "source")
        damage_each(folder, tmp_path / "copy", tried, judged, manifest=False)
    refused = tried.tried - len(harmless)
    assert refused > 2 * len(harmless), harmless
    tried.note = f"{', '.join(FOREIGN)}; {refused} refused with a message, the others changed no tensor"
