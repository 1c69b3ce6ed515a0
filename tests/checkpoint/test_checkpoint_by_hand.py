"""What a written checkpoint holds, and what reading it gives back, with every number written out."""

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tiny import SIZES, UP, tiny_architecture, tiny_checkpoint

from incr_ds.checkpoint.deepspeed.writer import ADAMW_DEFAULTS, NativeTarget, native_files
from incr_ds.checkpoint.huggingface.writer import config_text
from incr_ds.checkpoint.opening import open_source
from incr_ds.checkpoint.streaming import Slices, write_file
from incr_ds.config.growth import TargetLayout

NORMS = {
    "model.layers.0.input_layernorm.weight": [1.0, 2.0, 3.0],
    "model.layers.0.post_attention_layernorm.weight": [4.0, 5.0, 6.0],
    "model.norm.weight": [7.0, 8.0, 9.0],
}


def test_zero_1_files_of_two_ranks(tmp_path: Path):
    """Norms are the second parameter group, without weight decay. Its nine numbers are two partitions of six.

    The zeros that fill the last one are in the file for the moments, but not for the masters.
    """
    source, groups = tiny_checkpoint(NORMS), (ADAMW_DEFAULTS, {**ADAMW_DEFAULTS, "weight_decay": 0.0})
    layout = TargetLayout(format="deepspeed", data_parallel=2, zero_stage=1)
    target = NativeTarget(source.architecture, layout, torch.float32, "step", 7, 7, groups)
    for file in native_files(target):
        write_file(file, tmp_path, Slices(source.read, 1000))
    (tmp_path / "latest").write_text("step")
    (tmp_path / "config.json").write_text(config_text(source.architecture, torch.float32))

    states = [
        torch.load(path, weights_only=False)["optimizer_state_dict"]
        for path in sorted((tmp_path / "step").glob("*optim_states.pt"))
    ]
    norms = [state["single_partition_of_fp32_groups"][1].tolist() for state in states]
    assert norms == [[1, 2, 3, 4, 5, 6], [7, 8, 9]]
    first_moments = [state["base_optimizer_state"]["state"][1]["exp_avg"].tolist() for state in states]
    assert first_moments == [[1, 2, 3, 4, 5, 6], [7, 8, 9, 0, 0, 0]]

    found = open_source(tmp_path)
    assert found.facts.kind == "DeepSpeed ZeRO-1" and found.facts.step == 7
    assert {name: found.read(name).tolist() for name in NORMS} == NORMS
    assert found.read("model.norm.weight", "exp_avg", ((1, 3),)).tolist() == [8, 9]


def test_a_hugging_face_folder(tmp_path: Path):
    architecture = tiny_architecture()
    weights = {spec.name: torch.ones(spec.shape) for spec in architecture.stored}
    save_file({**weights, UP: torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(config_text(architecture, torch.float32))
    found = open_source(tmp_path)
    assert found.architecture.sizes["hidden"] == SIZES["hidden_size"] == 3
    assert found.read(UP).tolist() == [[1, 2, 3], [4, 5, 6]]
    assert found.read(UP, "weight", ((0, 2), (1, 3))).tolist() == [[2, 3], [5, 6]]
    assert set(load_file(tmp_path / "model.safetensors")) == {spec.name for spec in found.architecture.stored}
