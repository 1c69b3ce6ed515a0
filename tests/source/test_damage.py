"""Whatever byte of a source is damaged: a message or the same tensors, never a traceback, never other tensors."""

import random
import shutil

import pytest
import torch
from test_grow_limits import write_synthetic

from incr_ds.errors import CheckpointError, IncrError
from incr_ds.integrity import check_file
from incr_ds.source import open_source
from incr_ds.testing.pico import pico_architecture

LAYOUTS = {
    "zero-1": {"data_parallel": 2},
    "zero-3": {"data_parallel": 2, "zero_stage": 3},
    "universal": {"format": "universal"},
    "megatron": {"modules": "megatron-deepspeed"},
}
ROUNDS = 40


def tensors(checkpoint):
    """Every tensor, once all that a growth checks has been checked."""
    for file in checkpoint.facts.files:
        check_file(file, None)
    list(checkpoint.self_check())
    names = [spec.name for spec in checkpoint.architecture.stored]
    return {(name, state): checkpoint.read(name, state).clone() for name in names for state in checkpoint.facts.states}


def damage(content, draw):
    """Half of a file, a bit, or a byte; more often in headers, pickles and directories than in tensors."""
    if draw.random() < 0.2:
        return content[: draw.randrange(len(content))]
    places = range(len(content)), range(len(content))[:3000], range(len(content))[-1500:]
    changed, at = bytearray(content), draw.choice(draw.choice(places))
    changed[at] = draw.choice([changed[at] ^ (1 << draw.randrange(8)), draw.randrange(256)])
    return bytes(changed)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("rounds", [ROUNDS, pytest.param(20 * ROUNDS, marks=pytest.mark.slow)])
def test_damage_is_a_message_or_nothing(tmp_path, layout, rounds):
    """Without a manifest, as DeepSpeed leaves its checkpoints."""
    write_synthetic(tmp_path, pico_architecture(num_hidden_layers=1, vocab_size=11), **LAYOUTS[layout])
    folder = tmp_path / "source"
    (folder / "manifest.json").unlink()
    truth = tensors(open_source(folder))
    files = sorted(path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("growth_"))
    draw, found = random.Random(rounds), 0
    for _ in range(rounds):
        path = draw.choice(files)
        content = path.read_bytes()
        path.write_bytes(damage(content, draw))
        try:
            read = tensors(open_source(folder))
        except IncrError:
            found += 1
        else:
            assert read.keys() == truth.keys() and all(torch.equal(read[key], truth[key]) for key in truth), path
        path.write_bytes(content)
    assert found > rounds // 3


@pytest.mark.parametrize(
    "content", [b"", b"\xff\xfe", b"..", b"../other", b"/etc", b"a\0b", b"x" * 5000, b"a/../../b", b"tag\nmore"]
)
def test_the_named_tag_is_a_folder_beside(tmp_path, content):
    shutil.copytree(tmp_path, tmp_path / "source")
    (tmp_path / "source" / "latest").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"latest: expected the name of a folder beside it, found .*--tag"):
        open_source(tmp_path / "source")
