"""Megatron-DeepSpeed's names, fusions and paddings, in and out, against an oracle written from the format and a real engine."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from megatron_engines import reload_in_pipeline
from megatron_format import VOCABULARY_MULTIPLE, layers_of, partitions, shapes, stage_of, write

from incr_ds.checkpoint.opening import open_source
from incr_ds.checkpoint.publish import verify_manifest
from incr_ds.config.fields import parse_settings
from incr_ds.config.growth import GrowthRecipe
from incr_ds.errors import CheckpointError, ConfigError, LayoutError
from incr_ds.offline.plan import GrowthRequest, plan_files, plan_request
from incr_ds.offline.run import grow_checkpoint
from incr_ds.testing.memory import small_architecture
from incr_ds.testing.processes import run_processes
from incr_ds.testing.synthetic import SyntheticCheckpoint

STATES = ("weight", "exp_avg", "exp_avg_sq")
LAYERS, KV_HEADS = 3, 2
# (tensor, pipeline, data): every degree alone, and all at once with a pipeline that does not divide.
GRIDS = [(1, 1, 1), (2, 1, 1), (1, 3, 1), (1, 1, 3), (2, 2, 2)]


def truth(tied=False, **changes):
    config = {"tie_word_embeddings": tied, "num_key_value_heads": KV_HEADS, **changes}
    return SyntheticCheckpoint(small_architecture("llama", **config))


def tensors_of(source):
    return {
        state: {spec.name: source.read(spec.name, state) for spec in source.architecture.stored} for state in STATES
    }


def write_config(folder, source):
    (folder / "config.json").write_text(json.dumps(dict(source.architecture.config)))


def lay_out(folder, source, name="out", **layout):
    (folder / "recipe.yaml").write_text(yaml.safe_dump({"target": {}}))
    layout = {"modules": "megatron-deepspeed", "vocabulary_multiple": VOCABULARY_MULTIPLE, **layout}
    recipe = parse_settings({"target": {}, "layout": layout}, GrowthRecipe, "test")
    grow_checkpoint(plan_files(GrowthRequest(folder, folder / "recipe.yaml", folder / name), source, recipe))
    return folder / name


def same(found, expected):
    for spec in expected.architecture.stored:
        for state in STATES:
            read = found.read(spec.name, state)
            assert torch.equal(read, expected.read(spec.name, state)), (spec.name, state)
            first, stop = len(read) // 3, len(read) // 2 + 1
            columns = [(size // 4, size // 2 + 1) for size in read.shape[1:]]
            part = read[(slice(first, stop), *(slice(*bounds) for bounds in columns))]
            assert torch.equal(found.read(spec.name, state, ((first, stop),)), read[first:stop]), (spec.name, state)
            assert torch.equal(found.read(spec.name, state, ((first, stop), *columns)), part), (spec.name, state)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("grid", GRIDS)
def test_what_megatron_wrote_is_read(tmp_path: Path, grid, tied: bool):
    source = truth(tied)
    write(tmp_path, tensors_of(source), LAYERS, KV_HEADS, *grid, tied)
    write_config(tmp_path, source)
    found = open_source(tmp_path)
    assert found.facts.kind == "DeepSpeed ZeRO-1, Megatron-DeepSpeed"
    assert [found.facts.layout[key] for key in ("tensor_parallel", "pipeline_parallel", "data_parallel")] == list(grid)
    padded = 104 if grid[0] == 1 else 112
    assert f"padded from 101 to {padded} rows, and the padding is left out" in found.facts.notes[0]
    same(found, source)
    list(found.self_check())


def test_trained_padding_can_be_kept(tmp_path: Path):
    """With the padded size in config.json the rows are ordinary ones."""
    source = truth()
    write(tmp_path, tensors_of(source), LAYERS, KV_HEADS, 2, 1, 1, False)
    write_config(tmp_path, truth(vocab_size=112))
    found = open_source(tmp_path)
    assert found.facts.notes == ()
    assert (found.read("lm_head.weight", bounds=((101, 112),)) == 7).all()


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("grid", GRIDS)
def test_every_file_is_what_megatron_would_hold(tmp_path: Path, grid, tied: bool):
    source = truth(tied)
    tensor, stages, data = grid
    out = lay_out(tmp_path, source, tensor_parallel=tensor, pipeline_parallel=stages, data_parallel=data)
    verify_manifest(out)
    states = tensors_of(source)
    files = {path.name for path in (out / "grown").iterdir()}
    for rank in range(tensor):
        cut = {state: layers_of(tensors, LAYERS, KV_HEADS, tensor, rank) for state, tensors in states.items()}
        for layer, items in cut["weight"].items():
            name = f"layer_{layer:02d}-model_{rank:02d}-model_states.pt"
            found = torch.load(out / "grown" / name)
            files.remove(name)
            assert list(found) == list(items)
            assert all(torch.equal(found[key], items[key]) for key in items)
        for stage in range(stages):
            held = {state: stage_of(LAYERS, stages, stage, by_layer, tied) for state, by_layer in cut.items()}
            index = stage * tensor + rank
            model = torch.load(out / "grown" / f"mp_rank_{index:02d}_model_states.pt")
            files.remove(f"mp_rank_{index:02d}_model_states.pt")
            assert model["module"] is None
            assert [list(group.items()) for group in model["param_shapes"]] == [
                list(group.items()) for group in shapes(held["weight"])
            ]
            for number in range(data):
                name = f"zero_pp_rank_{number}_mp_rank_{index:02d}_optim_states.pt"
                found = torch.load(out / "grown" / name)["optimizer_state_dict"]
                files.remove(name)
                for group in range(2):
                    (parts, total), own = (
                        partitions(held["weight"], data)[group],
                        found["single_partition_of_fp32_groups"],
                    )
                    begin = number * len(parts[0])
                    assert torch.equal(own[group], parts[number][: max(0, total - begin)])
                    for moment in ("exp_avg", "exp_avg_sq"):
                        expected = partitions(held[moment], data)[group][0][number]
                        assert torch.equal(found["base_optimizer_state"]["state"][group][moment], expected)
    assert not files
    same(open_source(out), source)


@pytest.mark.parametrize("tied", [False, True])
def test_universal_with_megatron_names(tmp_path: Path, tied: bool):
    source = truth(tied)
    out = lay_out(tmp_path, source, format="universal", tensor_parallel=2, pipeline_parallel=2)
    zero = out / "grown" / "zero"
    whole = layers_of(tensors_of(source)["weight"], LAYERS, KV_HEADS, 1, 0)
    fused = torch.load(zero / "3.mlp.dense_h_to_4h.weight" / "fp32.pt")
    assert torch.equal(fused["param"], whole[3]["mlp.dense_h_to_4h.weight"])
    assert fused["param_n_sub_params"] == 2 and fused["cat_dim"] == 0
    assert torch.load(zero / "4.self_attention.dense.weight" / "exp_avg.pt")["cat_dim"] == 1
    name = "tied_modules.embed.word_embeddings.weight" if tied else "1.word_embeddings.weight"
    embedding = torch.load(zero / name / "fp32.pt")
    assert embedding["vocab_tensor"] and embedding["param"].shape == (101, 96)
    assert (zero / "6.lm_head.weight").exists() == (not tied)
    assert "cat_dim" not in torch.load(zero / "2.input_layernorm.weight" / "fp32.pt")
    found = open_source(out)
    assert found.facts.kind == "DeepSpeed universal, Megatron-DeepSpeed"
    same(found, source)
    assert len(list(found.self_check())) == len(list(zero.iterdir())) - 1


def test_a_real_pipeline_loads_it(tmp_path: Path):
    """DeepSpeed's own pipeline module with Megatron's names, stages and order; every parameter NaN before."""
    source = truth(True)
    native = lay_out(tmp_path, source, "native", pipeline_parallel=2, vocabulary_multiple=1)
    universal = lay_out(tmp_path, source, "universal", format="universal", pipeline_parallel=2)
    run_processes(reload_in_pipeline, 2, str(native), str(universal))
    for folder in (native, universal):
        again = folder.with_name(f"{folder.name}-again")
        write_config(again, source)
        same(open_source(again, "again"), source)


def test_what_does_not_fit(tmp_path: Path):
    source = truth()
    write(tmp_path / "a", tensors_of(source), LAYERS, KV_HEADS, 2, 1, 1, False)
    write_config(tmp_path / "a", truth(intermediate_size=252))
    with pytest.raises(CheckpointError, match=r"dense_h_to_4h\.weight: expected shape \[252, 96\], found \[250, 96\]"):
        open_source(tmp_path / "a")
    write_config(tmp_path / "a", truth(vocab_size=113))
    with pytest.raises(
        CheckpointError, match=r"word_embeddings\.weight: 112 rows over 2 tensor rank\(s\), fewer than vocab_size 113"
    ):
        open_source(tmp_path / "a")
    write_config(tmp_path / "a", truth(num_hidden_layers=4))
    with pytest.raises(CheckpointError, match=r"5\.weight: not a parameter of this llama"):
        open_source(tmp_path / "a")
    with pytest.raises(LayoutError, match=r"tensor_parallel 2: num_key_value_heads 3 does not divide"):
        lay_out(tmp_path, truth(num_key_value_heads=3), tensor_parallel=2)
    with pytest.raises(
        LayoutError,
        match=r"recipe\.yaml: layout\.modules: megatron-deepspeed: tensor_parallel 2: does not divide intermediate_size 253, "
        r"and Megatron cuts evenly only; tensor_parallel can be 1\.",
    ):
        lay_out(tmp_path, truth(intermediate_size=253), tensor_parallel=2)
    with pytest.raises(
        LayoutError, match=r"layout\.modules: megatron-deepspeed: it has no modules for qwen3; supported: llama"
    ):
        lay_out(tmp_path, SyntheticCheckpoint(small_architecture("qwen3")))
    with pytest.raises(
        ConfigError, match=r"modules: megatron-deepspeed with format: huggingface .*use format: deepspeed or"
    ):
        lay_out(tmp_path, source, format="huggingface")


def test_from_megatron_to_megatron_in_another_layout(tmp_path: Path):
    """Pure resharding, and back to the first layout: the same tensors."""
    source = truth()
    write(tmp_path / "source", tensors_of(source), LAYERS, KV_HEADS, 2, 1, 2, False)
    write_config(tmp_path / "source", source)
    layout = {"modules": "megatron-deepspeed", "tensor_parallel": 1, "pipeline_parallel": 3, "vocabulary_multiple": 4}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({"target": {}, "layout": layout}))
    planned = plan_request(GrowthRequest(tmp_path / "source", tmp_path / "recipe.yaml", tmp_path / "out"))
    assert any("padded from 101 to 112 rows" in note for note in planned.notes)
    reported = []
    grow_checkpoint(planned, lambda phase, done, total: reported.append((phase, done == total)))
    assert reported.count(("checking the source", True)) == 1  # though ranks hold parts and copies
    same(open_source(tmp_path / "out"), source)
