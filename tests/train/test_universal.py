"""A universal folder fills engines of every ZeRO stage and layout, to the bit, and is read back as what it was."""

import os

import pytest
import torch
from truths import same, truth
from universal_engines import load_in_layout, load_in_plain_engines

from incr_ds.checkpoint.base import STATES
from incr_ds.checkpoint.opening import open_source
from incr_ds.checkpoint.publish import verify_manifest
from incr_ds.config.fields import parse_settings
from incr_ds.config.growth import GrowthRecipe
from incr_ds.errors import CheckpointError
from incr_ds.offline.plan import GrowthRequest, plan_files
from incr_ds.offline.run import grow_checkpoint
from incr_ds.testing.memory import small_architecture
from incr_ds.testing.processes import run_processes
from incr_ds.testing.synthetic import SyntheticCheckpoint

ENGINES = {
    "zero1": {"stage": 1, "bf16": False},
    "zero2-bf16": {"stage": 2, "bf16": True},
    "zero3": {"stage": 3, "bf16": False},
    "zero3-bf16": {"stage": 3, "bf16": True},
    "bf16-optimizer": {"stage": 1, "bf16": True, "bf16_optimizer": True},
}
# Every expert's matrices are one parameter there.
MIXTURE_ENGINES = {"mixture-zero1": {"stage": 1, "bf16": False}, "mixture-zero3": {"stage": 3, "bf16": True}}


def write_universal(folder, source, **layout):
    recipe_file = folder / "recipe.yaml"
    recipe_file.write_text("target: {}\n")
    recipe = parse_settings({"target": {}, "layout": {"format": "universal", **layout}}, GrowthRecipe, "test")
    grow_checkpoint(plan_files(GrowthRequest(folder, recipe_file, folder / "universal"), source, recipe))
    return folder / "universal"


@pytest.mark.parametrize("layout", [{}, {"pipeline_parallel": 2, "tensor_parallel": 3}])
@pytest.mark.parametrize("tied", [True, False])
def test_read_back(tmp_path, layout, tied):
    source = truth(tie_word_embeddings=tied)
    folder = write_universal(tmp_path, source, **layout)
    verify_manifest(folder)
    found = open_source(folder)
    assert found.facts.kind == "DeepSpeed universal"
    assert found.facts.recorded.global_steps == 100
    same(found, source)
    assert len(list(found.self_check())) == len(source.architecture.stored)
    rows = ((40, 77), (5, 90))
    name = "model.embed_tokens.weight"
    assert torch.equal(found.read(name, "exp_avg", rows), source.read(name, "exp_avg", rows))


@pytest.mark.parametrize("ranks", [pytest.param(1, marks=pytest.mark.slow), 2, pytest.param(3, marks=pytest.mark.slow)])
def test_plain_engines(tmp_path, ranks):
    source = truth()
    folder, mixture = write_universal(tmp_path, source), SyntheticCheckpoint(small_architecture("mixtral"))
    (tmp_path / "mixture").mkdir()
    own = str(write_universal(tmp_path / "mixture", mixture))
    cases = ENGINES | {name: {**case, "folder": own} for name, case in MIXTURE_ENGINES.items()}
    for found in run_processes(load_in_plain_engines, ranks, str(folder), cases):
        losses = [found[name]["loss"] for name in ENGINES]
        assert max(losses) - min(losses) < 0.01 * min(losses)
        for engine in found.values():
            assert engine["groups"] == [(3e-3, (0.8, 0.95), 0.1), (3e-3, (0.8, 0.95), 0.0)]
            assert engine["global_steps"] == 100
    for name in ENGINES:
        same(open_source(tmp_path / f"universal-{name}"), source)
    for name in MIXTURE_ENGINES:
        same(open_source(tmp_path / "mixture" / f"universal-{name}"), mixture)


ZERO3 = {
    "zero3": {"stage": 3, "bf16": False, "native": True},
    "zero3-bf16-small-groups": {"stage": 3, "bf16": True, "native": True, "zero": {"sub_group_size": 20_000}},
}


@pytest.mark.parametrize("ranks", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_native_zero_3_in_plain_engines(tmp_path, ranks):
    """Every master and moment through DeepSpeed's own loader, whose parameters were NaN, and what we read of the files."""
    source = truth(tie_word_embeddings=True)
    cases = {}
    for name, case in ZERO3.items():
        layout = {"format": "deepspeed", "zero_stage": 3, "data_parallel": ranks, **case.get("zero", {})}
        (tmp_path / name).mkdir()
        dtype = "bfloat16" if case["bf16"] else "float32"
        folder = write_universal(tmp_path / name, source, dtype=dtype, **layout)
        assert open_source(folder).facts.kind == "DeepSpeed ZeRO-3"
        same(open_source(folder), source)
        assert len(list(open_source(folder).self_check())) == len(source.architecture.stored)
        cases[name] = {**case, "folder": str(folder)}
    for found in run_processes(load_in_plain_engines, ranks, str(tmp_path), cases):
        losses = [engine["loss"] for engine in found.values()]
        assert max(losses) - min(losses) < 0.01 * min(losses)
        for engine in found.values():
            assert engine["global_steps"] == 100
    for name in ZERO3:
        same(open_source(tmp_path / name / f"universal-{name}"), source)


@pytest.mark.parametrize(
    "layout",
    [
        {"tensor_parallel": 1, "pipeline_parallel": 2, "data_parallel": 1, "zero_stage": 1},
        pytest.param(
            {"tensor_parallel": 2, "pipeline_parallel": 1, "data_parallel": 1, "zero_stage": 1}, marks=pytest.mark.slow
        ),
    ],
    ids=["pp2", "tp2"],
)
def test_parallel_engines(tmp_path, layout):
    """The vocabulary is even here: DeepSpeed's loader cuts a universal tensor into equal parts only."""
    source = truth(tie_word_embeddings=True, vocab_size=102, num_key_value_heads=2)
    folder = write_universal(tmp_path, source, **{**layout, "data_parallel": 3})
    run_processes(load_in_layout, 2, str(folder), layout, "again")
    same(open_source(tmp_path / "universal-again"), source)


def test_bare_states_for_an_older_zero_3_loader(tmp_path):
    """Until 0.19.2 it calls .view(-1) on what a state's file holds. What it would do here by hand: load, view, cut."""
    source = truth()
    recipe_file = tmp_path / "recipe.yaml"
    recipe_file.write_text("target: {}\n")
    recipe = parse_settings({"target": {}, "layout": {"format": "universal", "zero_stage": 3}}, GrowthRecipe, "test")
    request = GrowthRequest(tmp_path, recipe_file, tmp_path / "out", target_deepspeed="0.18.4")
    grow_checkpoint(plan_files(request, source, recipe))
    for spec in source.architecture.stored:
        for state, file in zip(STATES, ("fp32", "exp_avg", "exp_avg_sq"), strict=True):
            loaded = torch.load(
                tmp_path / "out" / "grown" / "zero" / spec.name / f"{file}.pt", weights_only=False
            ).view(-1)
            assert torch.equal(loaded, source.read(spec.name, state).view(-1))
    same(open_source(tmp_path / "out"), source)


def test_damage_is_named(tmp_path):
    folder = write_universal(tmp_path, truth())
    inner = folder / "grown" / "zero" / "model.norm.weight"
    step = torch.load(inner / "step.pt")
    torch.save(step + 1, inner / "step.pt")
    with pytest.raises(CheckpointError, match=r"step\.pt: step 101, elsewhere 100: from another checkpoint"):
        list(open_source(folder).self_check())
    torch.save(step, inner / "step.pt")
    torch.save({"param": torch.ones(95)}, inner / "exp_avg.pt")
    with pytest.raises(CheckpointError, match=r"exp_avg\.pt: expected shape \[96\], found \[95\]"):
        list(open_source(folder).self_check())
    torch.save({"parma": torch.ones(96)}, inner / "exp_avg.pt")
    with pytest.raises(CheckpointError, match=r"exp_avg\.pt: contains no tensor `param`"):
        list(open_source(folder).self_check())
    os.unlink(inner / "exp_avg.pt")
    with pytest.raises(CheckpointError, match=r"exp_avg\.pt: missing; the checkpoint is incomplete"):
        list(open_source(folder).self_check())
    os.unlink(inner / "fp32.pt")
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight/fp32\.pt: missing; the checkpoint is incomplete"):
        open_source(folder)
