"""A damaged byte anywhere in a source gives a message or the same tensors, never a traceback or other tensors."""

import random
import shutil
from pathlib import Path

import pytest
import torch
from sources import write_synthetic

from incr_ds.checkpoint.integrity import check_file
from incr_ds.checkpoint.opening import open_source
from incr_ds.errors import CheckpointError, IncrError
from incr_ds.testing.pico import pico_architecture

LAYOUTS = {
    "zero-1": {"data_parallel": 2},
    "zero-3": {"data_parallel": 2, "zero_stage": 3},
    "universal": {"format": "universal"},
    "megatron": {"modules": "megatron-deepspeed"},
}
ROUNDS = 40


def tensors(checkpoint):
    """Read every tensor, after all checks of a growth."""
    for file in checkpoint.facts.files:
        check_file(file, None)
    list(checkpoint.self_check())
    names = [spec.name for spec in checkpoint.architecture.stored]
    return {(name, state): checkpoint.read(name, state).clone() for name in names for state in checkpoint.facts.states}


def is_refused(folder, truth, changed):
    """Whether a message reports that ``folder`` is wrong or has no moments. Tensors that are read must be unchanged."""
    try:
        checkpoint = open_source(folder)
        read = tensors(checkpoint)
    except IncrError:
        return True
    expected = {key for key in truth if not checkpoint.facts.no_moments or key[1] == "weight"}
    assert read.keys() == expected and all(torch.equal(read[key], truth[key]) for key in read), changed
    return bool(checkpoint.facts.no_moments)


def damage(content, draw):
    """Cut a file in half, flip a bit or replace a byte, more often in headers, pickles and directories than in tensors."""
    if draw.random() < 0.2:
        return content[: draw.randrange(len(content))]
    places = range(len(content)), range(len(content))[:3000], range(len(content))[-1500:]
    changed, at = bytearray(content), draw.choice(draw.choice(places))
    changed[at] = draw.choice([changed[at] ^ (1 << draw.randrange(8)), draw.randrange(256)])
    return bytes(changed)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("rounds", [ROUNDS, pytest.param(20 * ROUNDS, marks=pytest.mark.slow)])
def test_damage_is_a_message_or_nothing(tmp_path: Path, layout, rounds):
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
        found += is_refused(folder, truth, path)
        path.write_bytes(content)
    assert found > rounds // 3


@pytest.mark.parametrize(
    "content", [b"", b"\xff\xfe", b"..", b"../other", b"/etc", b"a\0b", b"x" * 5000, b"a/../../b", b"tag\nmore"]
)
def test_the_named_tag_is_a_folder_beside(tmp_path: Path, content):
    shutil.copytree(tmp_path, tmp_path / "source")
    (tmp_path / "source" / "latest").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"latest: expected the name of a folder beside it, found .*--tag"):
        open_source(tmp_path / "source")


ABSENT = object()


def entries(content, path=(), depth=4):
    """The path of every entry of nested containers; in long ones, of the first entries only."""
    yield path
    if depth and isinstance(content, dict | list | tuple):
        found = list(content.items() if isinstance(content, dict) else enumerate(content))
        for key, value in found if depth > 2 else found[:1]:
            yield from entries(value, (*path, key), depth - 1)


def replaced(content, path, value):
    """``content`` with one entry changed, or without it."""
    if not path:
        return value
    changed = dict(content) if isinstance(content, dict) else list(content)
    if value is ABSENT and len(path) == 1:
        del changed[path[0]]
    else:
        changed[path[0]] = replaced(changed[path[0]], path[1:], value)
    return changed


@pytest.mark.parametrize("layout", ["zero-1", "zero-3", "pipeline", pytest.param("universal", marks=pytest.mark.slow)])
def test_an_entry_of_another_kind_is_a_message_or_nothing(tmp_path: Path, layout):
    """Any entry of a pickle replaced by another value, or removed."""
    layers, cut = (2, {"pipeline_parallel": 2}) if layout == "pipeline" else (1, LAYOUTS[layout])
    write_synthetic(tmp_path, pico_architecture(num_hidden_layers=layers, vocab_size=11), **cut)
    folder = tmp_path / "source"
    (folder / "manifest.json").unlink()
    truth = tensors(open_source(folder))
    files = sorted(path for path in folder.rglob("*.pt"))
    changed = [files[0], files[-1]] if layout != "universal" else [path for path in files if "embed" in str(path)]
    draw, found = random.Random(7), 0
    for path in sorted(
        {*changed, *folder.rglob("*mp_rank_00_model_states.pt"), *folder.rglob("zero/optimizer_state.pt")}
    ):
        kept, content = path.read_bytes(), torch.load(path, weights_only=False)
        for entry in entries(content):
            value = draw.choice([ABSENT, 5, -1, "text", [], {}, torch.zeros(3)]) if entry else 5
            torch.save(replaced(content, entry, value), path)
            found += is_refused(folder, truth, entry)
        path.write_bytes(kept)
    assert found > 5


@pytest.mark.parametrize(
    ("file", "entry", "value", "said"),
    [
        (
            "zero_pp_rank_1_mp_rank_00_optim_states.pt",
            ("base_optimizer_state",),
            ABSENT,
            "base_optimizer_state: Field required",
        ),
        (
            "zero_pp_rank_1_mp_rank_00_optim_states.pt",
            ("base_optimizer_state", "state"),
            5,
            r"optimizer_state_dict.base_optimizer_state.state: Input should be a valid dictionary, found int",
        ),
        (
            "mp_rank_00_model_states.pt",
            ("global_steps",),
            "many",
            "global_steps: Input should be a valid integer, .*found str",
        ),
        ("zero_pp_rank_0_mp_rank_00_optim_states.pt", ("partition_count",), [2, 3], "partition_count: .* found list"),
        (
            "zero_pp_rank_1_mp_rank_00_optim_states.pt",
            ("base_optimizer_state", "state"),
            {},
            "optimizer group 0 has no exp_avg, .*zero_pp_rank_0_mp_rank_00_optim_states.pt has them. Copy",
        ),
        (
            "zero_pp_rank_0_mp_rank_00_optim_states.pt",
            ("zero_stage",),
            "x",
            "zero_stage: expected 1, 2 or 3, found 'x'",
        ),
        (
            "mp_rank_00_model_states.pt",
            ("param_shapes",),
            [],
            "param_shapes has 0 groups, the optimizer files beside it 2, 2",
        ),
        (
            "mp_rank_00_model_states.pt",
            ("module",),
            {"a": 5},
            "module.a: Input should be an instance of Tensor, found int",
        ),
    ],
)
def test_what_does_not_fit_is_named(tmp_path: Path, file, entry, value, said):
    write_synthetic(tmp_path, pico_architecture(num_hidden_layers=1, vocab_size=11), data_parallel=2)
    (path,) = tmp_path.rglob(file)
    content = torch.load(path, weights_only=False)
    inside = ("optimizer_state_dict",) if "optim" in file else ()
    torch.save(replaced(content, (*inside, *entry), value), path)
    with pytest.raises(CheckpointError, match=f"{file}: .*{said}"):
        open_source(tmp_path / "source")


def test_moments_that_only_some_pipeline_stages_have_are_damage(tmp_path: Path):
    write_synthetic(tmp_path, pico_architecture(num_hidden_layers=2, vocab_size=11), pipeline_parallel=2)
    (path,) = tmp_path.rglob("zero_pp_rank_0_mp_rank_01_optim_states.pt")
    content = torch.load(path, weights_only=False)
    torch.save(replaced(content, ("optimizer_state_dict", "base_optimizer_state", "state"), {}), path)
    said = r"has no exp_avg, .*mp_rank_00_optim_states\.pt has them\. Copy the files of model-parallel rank 1 again"
    with pytest.raises(CheckpointError, match=said):
        open_source(tmp_path / "source")
