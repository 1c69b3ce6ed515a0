"""Any layout that can be written is read back as what it was, whatever the grid, the format and the order of degrees."""

import tempfile
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from incr_ds.checkpoint.assembly import HeldBlock, assemble
from incr_ds.checkpoint.deepspeed.partition import FlatParameter, FlatShards, Piece
from incr_ds.checkpoint.opening import open_source
from incr_ds.config.fields import parse_settings
from incr_ds.config.growth import GrowthRecipe
from incr_ds.errors import CheckpointError
from incr_ds.offline.growth_on_load import open_grown
from incr_ds.offline.plan import GrowthRequest, plan_files, plan_request
from incr_ds.offline.run import grow_checkpoint
from incr_ds.sharding.blocks import Block
from incr_ds.testing.pico import pico_architecture
from incr_ds.testing.synthetic import SyntheticCheckpoint

STATES = ("weight", "exp_avg", "exp_avg_sq")


@st.composite
def layouts(draw):
    """Native and universal, with own names and Megatron's; degrees that divide 6 query and 3 key-value heads, and 3 layers."""
    layout = {
        "tensor_parallel": draw(st.sampled_from([1, 3])),
        "pipeline_parallel": draw(st.integers(1, 3)),
        "data_parallel": draw(st.integers(1, 5)),
        "format": draw(st.sampled_from(["deepspeed", "deepspeed", "universal"])),
        "modules": draw(st.sampled_from(["own", "megatron-deepspeed"])),
        "vocabulary_multiple": draw(st.sampled_from([1, 7, 128])),
        "dtype": draw(st.sampled_from(["float32", "bfloat16"])),
        "sub_group_size": draw(st.sampled_from([500, 3_000, 10**9])),
    }
    if layout["pipeline_parallel"] == 1 and layout["modules"] == "own":
        layout["zero_stage"] = draw(st.sampled_from([1, 2, 3]))
    return layout


def lay_out(source, layout, folder, name, target=None):
    """Publish ``source``, grown or not, in a layout."""
    recipe = folder / f"{name}.yaml"
    recipe.write_text("target: {}\n")
    request = GrowthRequest(folder, recipe, folder / name)
    content = {"target": target or {}, "layout": layout}
    grow_checkpoint(plan_files(request, source, parse_settings(content, GrowthRecipe, "test")))
    return open_source(folder / name)


def same(found, expected):
    for spec in expected.architecture.stored:
        for state in STATES:
            assert torch.equal(found.read(spec.name, state), expected.read(spec.name, state)), (spec.name, state)


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.booleans(), layouts(), layouts())
def test_from_any_layout_to_any_other(tied, first, second):
    """FFN of 51: thirds are even for Megatron, uneven nowhere else needed; the vocabulary of 101 is uneven everywhere."""
    truth = SyntheticCheckpoint(pico_architecture(tied=tied, intermediate_size=51))
    with tempfile.TemporaryDirectory() as home:
        one = lay_out(truth, first, Path(home), "one")
        same(one, truth)
        list(one.self_check())
        two = lay_out(one, second, Path(home), "two")
        same(two, truth)
        list(two.self_check())
        assert one.facts.step == two.facts.step == 100


@settings(max_examples=5, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.booleans(), layouts(), layouts(), st.integers(0, 7), st.integers(8, 20))
def test_grown_on_load_from_any_layout_and_on_disk_in_any_other(tied, first, second, begin, end):
    """What a run computes for its slices is what the tool would have written, whatever wrote the source."""
    target = {"hidden_size": 36, "num_hidden_layers": 5, "intermediate_size": 63}
    source = SyntheticCheckpoint(pico_architecture(tied=tied, intermediate_size=51))
    with tempfile.TemporaryDirectory() as home:
        folder = Path(home)
        lay_out(source, first, folder, "source")
        (folder / "grow.yaml").write_text(yaml.safe_dump({"target": target}))
        on_disk = lay_out(source, second, folder, "grown", target)
        on_load, _ = open_grown(folder / "source", folder / "grow.yaml")
        same(on_load, on_disk)
        for spec in on_disk.architecture.stored:
            part = ((min(begin, spec.shape[0]), min(end, spec.shape[0])),)
            assert torch.equal(on_load.read(spec.name, "exp_avg", part), on_disk.read(spec.name, "exp_avg", part))


@st.composite
def tilings(draw):
    """A matrix cut into a grid of rectangles, each in a parameter of its own at some offset, with some copies."""
    rows, columns = draw(st.integers(1, 9)), draw(st.integers(1, 7))
    cuts = [sorted(draw(st.sets(st.integers(1, size - 1), max_size=3))) if size > 1 else [] for size in (rows, columns)]
    spans = [list(zip([0, *cut], [*cut, size], strict=True)) for cut, size in zip(cuts, (rows, columns), strict=True)]
    tiles = [(row, column) for row in spans[0] for column in spans[1]]
    margins = draw(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2)), min_size=len(tiles), max_size=len(tiles)))
    copies = draw(st.lists(st.integers(0, len(tiles) - 1), max_size=3))
    order = draw(st.permutations([*range(len(tiles)), *copies]))
    return (rows, columns), tiles, margins, order


@given(tilings(), st.data())
def test_rectangles_are_joined(tiling, data):
    shape, tiles, margins, order = tiling
    whole = torch.arange(float(shape[0] * shape[1])).view(shape)
    held = []
    for number in order:
        (rows, columns), (above, left) = tiles[number], margins[number]
        parameter = torch.full((above + rows[1] - rows[0] + 1, left + columns[1] - columns[0] + 2), -1.0)
        tile = whole[slice(*rows), slice(*columns)]
        parameter[above : above + tile.shape[0], left : left + tile.shape[1]] = tile
        flat = {state: [[parameter.flatten()]] for state in STATES}
        pieces = FlatParameter(tuple(parameter.shape), (Piece(0, 0, 0, parameter.numel()),))
        rank = type(
            "Rank", (), {"shards": FlatShards({"p": pieces}, flat), "index": number, "model_file": Path("test")}
        )()
        held.append(HeldBlock(rank, "p", Block("t", (rows, columns), above, left)))
    tensor = assemble(shape, held, "test")
    first = data.draw(st.integers(0, shape[0] - 1))
    stop = data.draw(st.integers(first + 1, shape[0]))
    assert torch.equal(tensor.read("weight", first, stop), whole[first:stop])
    assert len(tensor.copies) == len(order) - len(tiles)
    if len(tiles) > 1:
        kept = [item for item in held if item.block.bounds != held[0].block.bounds]
        with pytest.raises(CheckpointError, match=r"t: its shards hold \d+ elements, expected the \d+ of shape"):
            assemble(shape, kept, "test")


def test_overlapping_rectangles_are_refused():
    held = [
        HeldBlock(None, "p", Block("t", bounds)) for bounds in (((0, 2), (0, 3)), ((1, 2), (0, 3)), ((3, 4), (0, 3)))
    ]
    with pytest.raises(
        CheckpointError, match=r"t: its shards hold 12 elements, expected the 12 of shape \[4, 3\] once each"
    ):
        assemble((4, 3), held, "test")


def test_an_output_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A read-only folder is reported, and nothing is left behind. (Root ignores permissions, so the system call fails here.)"""
    lay_out(SyntheticCheckpoint(pico_architecture()), {}, tmp_path, "source")
    (tmp_path / "r.yaml").write_text("target: {}\n")
    planned = plan_request(GrowthRequest(tmp_path / "source", tmp_path / "r.yaml", tmp_path / "out"))
    import errno
    import os

    real = os.mkdir

    def read_only(path, *more, **options):
        if "incomplete" in str(path):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))
        return real(path, *more, **options)

    monkeypatch.setattr(os, "mkdir", read_only)
    with pytest.raises(CheckpointError, match=r"out: Read-only file system .*; nothing was published"):
        grow_checkpoint(planned)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["r.yaml", "source", "source.yaml"]
