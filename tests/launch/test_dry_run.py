"""A dry run's numbers, counted by hand for a tiny model; 70 billion parameters on 1,024 ranks; what it refuses."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny import SIZES
from token_data import write_documents
from typer.testing import CliRunner

from incr_ds.arch.architecture import architecture_from_config
from incr_ds.arch.multipliers import NEW, multipliers_text
from incr_ds.cli.dry_run import show_dry_run
from incr_ds.errors import ConfigError, LayoutError
from incr_ds.launch.activations import Shape, layer_activations
from incr_ds.launch.dry_run import Speed, dry_run, stated_speed
from incr_ds.testing.pico import pico_architecture
from incr_ds.testing.runs import pico_run

ROOT = Path(__file__).parents[2]
LLAMA_70B = {
    "model_type": "llama", "vocab_size": 128256, "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80,
    "num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 8192,
    "tie_word_embeddings": False,
}  # fmt: skip


@pytest.fixture
def tiny_run(tmp_path: Path):
    """10 steps of 4 samples of 4 tokens; 54 elements in 9 matrices of 6, and 3 norms of 3."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({**SIZES, "num_hidden_layers": 1}))

    def run(**sections):
        return pico_run(**{
            "output": str(tmp_path / "run"),
            "precision": "bf16",
            "model": {"config": str(folder / "config.json")},
            "batch": {"sequence_length": 4, "micro_batch_size": 1, "global_batch_size": 4},
            "schedule": {"train_steps": 10, "learning_rate": 0.1},
            "layout": {"data_parallel": 2, "zero_stage": 1},
            "checkpoint": {"interval": 4, "keep_last": 1, "keep_steps": [3]},
        } | sections)  # fmt: skip

    return run


STATES = {
    # 54 in 2 parts of 28 and 9 in 2 parts of 6, 34 a rank; the whole bf16 model, padded: 68 elements.
    1: {"weights": 136, "masters": 136, "moments": 272, "gradients": 126},
    2: {"weights": 136, "masters": 136, "moments": 272, "gradients": 68},
    # 9 matrices in parts of 3 and 3 norms in parts of 2, 33 a rank; and all 63 gathered, being small.
    3: {"weights": 192, "masters": 132, "moments": 264, "gradients": 66},
}


@pytest.mark.parametrize("stage", STATES)
def test_model_states_by_hand(tiny_run, stage):
    (part,) = dry_run(tiny_run(layout={"data_parallel": 2, "zero_stage": stage})).parts
    kinds = part.pipeline[0].memory.kinds
    assert {kind: kinds[kind] for kind in STATES[stage]} == STATES[stage]
    assert part.pipeline[0].rank_parameters == (63,)


def test_activations_by_hand(tiny_run):
    """A layer keeps for a token: norms 2 x 3 x (4 + 2), inputs of products 2 x 3 x 2, q, k, v and output 4 x 2 x 2, one
    denominator of 4, gate, activation, up and product 4 x 2 x 2; the end 3 x (4 + 2 + 2)."""
    memory = dry_run(tiny_run()).parts[0].pipeline[0].memory
    assert memory.activations_kept == 4 * (36 + 12 + 16 + 4 + 16 + 24)
    assert memory.activations_recomputed == 4 * (3 * 2 + 24) + 4 * (36 + 12 + 16 + 4 + 16)
    assert memory.activations == memory.activations_kept


def test_tokens_flops_and_time_by_hand(tiny_run):
    """8 matrices of 6 cost 96 operations a token forward, attention over 4 tokens 4 x 2 x 4; three times that in training."""
    found = dry_run(tiny_run(), Speed(mfu=0.5, peak_flops=1000.0))
    assert (found.parts[0].tokens_per_step, found.tokens, found.flops) == (16, 160, 160 * 3 * (96 + 32))
    assert found.seconds == pytest.approx(61440 / 500 / 2)
    assert found.gpu_hours == pytest.approx(61440 / 500 / 3600)


def test_epochs_of_data_on_this_machine_by_hand(tiny_run, tmp_path: Path, capsys):
    """40 samples of 4 tokens: 30 of here, which has 24 samples; of the other nothing is known."""
    write_documents(tmp_path / "here", [list(range(50)), list(range(48))])
    corpora = [{"prefix": str(tmp_path / "here"), "weight": 3.0}, {"prefix": str(tmp_path / "there")}]
    found = dry_run(tiny_run(data={"train": corpora}))
    (use,) = found.data
    assert (use.prefix, use.share, use.samples_per_epoch, use.epochs) == (corpora[0]["prefix"], 0.75, 24, 1.25)
    assert any("there.bin: no such file" in line for line in found.missing)
    show_dry_run(found, json=True)
    assert json.loads(capsys.readouterr().out)["data"][0]["epochs"] == 1.25
    show_dry_run(found, json=False)
    assert f"data: {tmp_path}/here: 75.0% of the samples, 1.25 epochs of 24 samples" in capsys.readouterr().out


def test_the_teacher_costs_its_forward_pass_while_its_weight_is_above_0(tiny_run, tmp_path: Path):
    teaching = {"teacher": str(tmp_path / "model"), "anneal_steps": 3}
    part = dry_run(tiny_run(distillation=teaching)).parts[0]
    assert (part.taught_steps, part.teacher_flops) == (3, 3 * 16 * 128)
    assert part.pipeline[0].memory.teacher == 63 * 2 + 4 * 84
    kept = dry_run(tiny_run(distillation={**teaching, "final_weight": 0.1})).parts[0]
    assert kept.taught_steps == 10


def test_tied_embeddings_are_on_the_first_and_the_last_stage(tiny_run, tmp_path: Path):
    config = {**SIZES, "num_hidden_layers": 2, "tie_word_embeddings": True}
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    part = dry_run(tiny_run(layout={"pipeline_parallel": 2})).parts[0]
    # Embedding 6, a layer 48, the last norm 3.
    assert [stage.rank_parameters for stage in part.pipeline] == [(54,), (57,)]
    assert part.architecture.num_parameters == 105
    assert part.bubble == pytest.approx(1 / 5)


def test_checkpoints_on_disk_by_hand(tiny_run):
    """Saved at 3, 4, 8 and 10; 3 stays, and at 8 and at 10 there are three while the new one is written."""
    found = dry_run(tiny_run())
    # 63 bf16 weights; 68 elements of masters and of both moments in fp32.
    assert found.parts[0].checkpoint.num_bytes == 63 * 2 + 3 * 68 * 4
    assert found.parts[0].checkpoint.files == 1 + 2 + 5
    assert (found.disk.saved, found.disk.left, found.disk.peak) == (4, 2, 3)
    assert found.disk.peak_bytes == 3 * found.parts[0].checkpoint.num_bytes


def test_what_does_not_divide_is_named_with_the_nearest_that_does(tiny_run, tmp_path: Path):
    heads = {"hidden_size": 4, "num_attention_heads": 2, "num_key_value_heads": 2}
    config = {**SIZES, **heads, "num_hidden_layers": 5, "vocab_size": 7}
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    notes = dry_run(tiny_run(layout={"tensor_parallel": 2, "pipeline_parallel": 3})).parts[0].notes
    assert "vocab_size 7 over 2 tensor ranks: parts of 4 and 3; nearest that divides: 6 or 8" in notes
    assert any(
        note.startswith(
            "5 layers over 3 pipeline stages: 2 and 1 layers; nearest pipeline_parallel that divides: 1 or 5; nearest"
        )
        and note.endswith("number of layers: 3 or 6")
        for note in notes
    )
    with pytest.raises(LayoutError, match="num_attention_heads 2 does not divide; tensor_parallel can be 1, 2"):
        dry_run(tiny_run(layout={"tensor_parallel": 4}))


def test_llama_70b_on_1024_ranks_takes_seconds_without_torch(tiny_run, tmp_path: Path):
    full = dict(architecture_from_config(LLAMA_70B, "test").config)
    (tmp_path / "model" / "config.json").write_text(json.dumps(full))
    layout = {"tensor_parallel": 8, "pipeline_parallel": 8, "data_parallel": 16, "zero_stage": 1}
    run = tiny_run(layout=layout, batch={"sequence_length": 8192, "micro_batch_size": 1, "global_batch_size": 1024})
    started = time.process_time()
    (part,) = dry_run(run).parts
    assert time.process_time() - started < 3
    assert part.architecture.num_parameters == 70_553_706_496
    assert part.tokens_per_step == 8_388_608
    # A layer has 855,654,400 parameters: 10 of them, with the embedding of 128256 x 8192, over 8 tensor ranks, norms whole.
    matrices, norms = 10 * (855_654_400 - 2 * 8192) + 128256 * 8192, 10 * 2 * 8192
    assert part.pipeline[0].rank_parameters == (matrices // 8 + norms,) * 8
    assert part.pipeline[0].memory.kinds["masters"] == pytest.approx((matrices // 8 + norms) / 16 * 4, rel=1e-6)

    settings = tmp_path / "run.json"
    settings.write_text(json.dumps(run.model_dump(mode="json")))
    command = "import sys; from pretrain import app; app(sys.argv[1:], standalone_mode=False); assert 'torch' not in sys.modules"
    ended = subprocess.run(
        [sys.executable, "-c", command, "--config", str(settings), "--dry-run", "--json"],
        capture_output=True, text=True, cwd=ROOT / "launchers", check=False,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    content = json.loads(ended.stdout)
    assert content["stages"][0]["layout"]["world_size"] == 1024
    assert content["stages"][0]["pipeline_stages"][7]["memory_bytes"]["loss"] > 0
    assert content["assumed_speed"] is None
    assert any("no such file" in line for line in content["missing_here"]), "the data is on the cluster"
    assert not (tmp_path / "run").exists()


def test_a_missing_teacher_is_asked_for(tiny_run, tmp_path: Path):
    with pytest.raises(ConfigError, match=r"gone/config.json: no such file; a dry run needs the sizes of this model"):
        dry_run(tiny_run(distillation={"teacher": str(tmp_path / "gone"), "anneal_steps": 3}))


@pytest.mark.parametrize(
    ("mfu", "peak", "message"),
    [
        (None, 989.0, "--peak-tflops: has no effect without --mfu"),
        (40.0, 989.0, "--mfu 40: expected a share of the peak above 0 and at most 1"),
        (0.4, None, "--mfu: a share of which peak"),
        (0.4, -1.0, "--peak-tflops -1: expected a positive number"),
    ],
)
def test_a_speed_that_cannot_be_is_refused(tiny_run, mfu, peak, message):
    with pytest.raises(ConfigError, match=message):
        stated_speed(tiny_run(), mfu, peak)


def test_the_run_files_peak_counts(tiny_run):
    assert stated_speed(tiny_run(peak_flops=1e12), 0.4, None) == Speed(0.4, 1e12)


@pytest.mark.parametrize(("family", "error"), [("llama", 0.02), ("qwen3", 0.04), ("qwen2", 0.02)])
@pytest.mark.parametrize("element", [4, 2])
def test_activations_are_what_autograd_keeps_of_transformers_layers(family, error, element):
    import torch

    architecture = pico_architecture(family)
    kept = [
        saved_by_autograd(architecture, layers, {4: torch.float32, 2: torch.bfloat16}[element]) for layers in (2, 3)
    ]
    expected = layer_activations(architecture, Shape(64, 32, element, 1, stores_scores=False))
    assert kept[1] - kept[0] == pytest.approx(expected, rel=error)


def saved_by_autograd(architecture, layers, dtype):
    """Bytes that the backward pass of transformers' model of ``layers`` layers needs, besides parameters."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(**{**architecture.config, "num_hidden_layers": layers, "layer_types": None})
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    storages, parameters = {}, {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def note(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        result = model(torch.zeros(2, 32, dtype=torch.long)).logits
    assert result.requires_grad
    return sum(storages.values())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--json"], "--json: without effect; add --dry-run, or remove it."),
        (["--mfu", "0.4"], "--mfu and --peak-tflops: without effect; add --dry-run"),
        (["--dry-run", "--print-config"], "--dry-run prints what --print-config does, and more"),
        (["--dry-run", "--set", "layout.zero_stage=0"], "layout.zero_stage 0: training needs 1, 2 or 3"),
        (["--dry-run", "--set", "batch.global_batch_size=5"], "micro_batch_size 1 x data_parallel 2; nearest: 4 or 6"),
    ],
)  # fmt: skip
def test_options_and_sizes_that_cannot_be_end_with_2(tiny_run, tmp_path: Path, monkeypatch, options, message):
    monkeypatch.syspath_prepend(ROOT / "launchers")
    from pretrain import app

    settings = tmp_path / "run.json"
    settings.write_text(json.dumps(tiny_run().model_dump(mode="json")))
    ended = CliRunner().invoke(app, ["--config", str(settings), *options])
    assert ended.exit_code == 2
    assert message in " ".join(ended.output.split())


def test_tables_name_every_kind_of_memory_and_label_the_speed(tiny_run, capsys):
    show_dry_run(dry_run(tiny_run(), Speed(mfu=0.5, peak_flops=1e12)), json=False)
    shown = capsys.readouterr().out
    for words in ("weights", "masters", "moments", "gradients", "buffers", "activations", "loss", "total"):
        assert words in shown
    assert "assuming 50% of 1 TFLOP/s on every device" in shown
    show_dry_run(dry_run(tiny_run()), json=False)
    assert "not stated; --mfu and --peak-tflops assume a speed" in capsys.readouterr().out


def test_a_rate_of_new_layers_needs_new_layers(tiny_run, tmp_path):
    """As in the run itself. Whether a checkpoint elsewhere has new layers is left to the run."""
    ratio = {"optimizer": {"new_parameters": {"learning_rate_ratio": 2.0}}}
    nothing = r"optimizer.new_parameters: nothing is new: neither the growth of .* Remove the key, or grow in depth."
    with pytest.raises(ConfigError, match=nothing):
        dry_run(tiny_run(**ratio))
    folder = tmp_path / "model"
    elsewhere = dry_run(tiny_run(**ratio, model={"initialize_from": str(folder)}))
    assert f"{folder}/multipliers.json: no such file; it says which layers are new" in elsewhere.missing[-1]
    (folder / "latest").write_text("global_step1")
    with pytest.raises(ConfigError, match=nothing):
        dry_run(tiny_run(**ratio, model={"initialize_from": str(folder)}))
    (folder / "multipliers.json").write_text(multipliers_text({"model.norm.weight": NEW}))
    assert dry_run(tiny_run(**ratio, model={"initialize_from": str(folder)})).parts
    (folder / "multipliers.json").unlink()
    (tmp_path / "deeper.yaml").write_text(json.dumps({"target": {"num_hidden_layers": 2}}))
    grown = {"initialize_from": {"source": str(folder), "recipe": str(tmp_path / "deeper.yaml")}}
    assert dry_run(tiny_run(**ratio, model=grown)).parts
    later = [{"at_step": 5, "recipe": str(tmp_path / "deeper.yaml"), "rewarmup_steps": 1}]
    assert len(dry_run(tiny_run(**ratio, growth=later)).parts) == 2


@pytest.mark.parametrize("stage", [2, 3])
def test_an_optimizer_on_the_host_is_counted_apart(tiny_run, stage, capsys):
    """Masters, moments and fp32 gradients; ZeRO-2 keeps bf16 weights and gradients of 63 elements there, too."""
    layout = {"data_parallel": 2, "zero_stage": stage}
    there = dry_run(tiny_run(layout=layout, optimizer={"offload": "cpu"}))
    here = dry_run(tiny_run(layout=layout)).parts[0].pipeline[0].memory
    memory = there.parts[0].pipeline[0].memory
    masters, moments = STATES[stage]["masters"], STATES[stage]["moments"]
    beside = 34 * (4 + 2) + 63 * 2 if stage == 2 else 33 * 4
    assert memory.kinds["update"] == beside and memory.host_total == masters + moments + beside
    assert memory.total == here.total - masters - moments - here.kinds["update"]
    show_dry_run(there, json=False)
    assert "on the host" in capsys.readouterr().out


def test_balanced_stages_are_shown(tiny_run, tmp_path, capsys):
    """Three layers of 8 matrices of 6, and a head of 6 columns of 2,000 entries that outweighs them all."""
    (tmp_path / "model" / "config.json").write_text(json.dumps({**SIZES, "num_hidden_layers": 3, "vocab_size": 2000}))
    layout = {"pipeline_parallel": 2, "stages": "balanced"}
    found = dry_run(tiny_run(layout=layout))
    (part,) = found.parts
    assert [stage.layers for stage in part.pipeline] == [(0, 2), (2, 3)] and part.run.layout.stages == "even"
    layout["stages"] = [1, 2]
    stages = dry_run(tiny_run(layout=layout)).parts[0].pipeline
    assert [stage.layers for stage in stages] == [(0, 1), (1, 3)]
    assert sum(stage.flops for stage in stages) == sum(stage.flops for stage in part.pipeline)
    assert sum(stage.flops for stage in part.pipeline) * part.tokens == part.student_flops
    show_dry_run(found, json=True)
    shown = json.loads(capsys.readouterr().out)["stages"][0]["pipeline_stages"]
    assert [stage["flops_per_token"] for stage in shown] == [stage.flops for stage in part.pipeline]
