"""Every shipped settings file loads. Mistakes in one are refused with the key and a remedy."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from incr_ds.arch.architecture import architecture_from_config, read_config
from incr_ds.config.fields import load_settings
from incr_ds.config.growth import GrowthRecipe
from incr_ds.config.training import RunSettings
from incr_ds.errors import ConfigError
from incr_ds.launch.stages import plan_stages
from incr_ds.sharding.placement import check_layout

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "ds_configs"
RUN_FILES = sorted((CONFIGS / "runs").glob("*.yaml"))
# What the run file states; a DeepSpeed JSON that states it too would be a second truth.
STATED_IN_RUN_FILES = {
    "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping",
    "optimizer", "scheduler", "bf16", "fp16",
}  # fmt: skip


@pytest.mark.parametrize("path", RUN_FILES, ids=lambda path: path.stem)
def test_run_files_load_and_name_files_that_are_there(path, monkeypatch):
    run = load_settings(path, RunSettings)
    assert run.deepspeed is not None and (ROOT / run.deepspeed).is_file()
    if run.model.config is not None:
        architecture = architecture_from_config(read_config(ROOT / run.model.config), run.model.config)
        check_layout(architecture, run.layout)
        monkeypatch.chdir(ROOT)
        assert len(plan_stages(run, architecture)) == len(run.growth) + 1


@pytest.mark.parametrize("path", sorted((CONFIGS / "models").glob("*.json")), ids=lambda path: path.stem)
def test_model_files_are_supported_architectures(path):
    assert architecture_from_config(read_config(path), str(path)).num_parameters > 0


@pytest.mark.parametrize("path", sorted((CONFIGS / "growth").glob("*.yaml")), ids=lambda path: path.stem)
def test_recipes_load(path):
    assert load_settings(path, GrowthRecipe).target


@pytest.mark.parametrize("path", sorted((CONFIGS / "deepspeed").glob("*.json")), ids=lambda path: path.stem)
def test_deepspeed_files_hold_only_what_deepspeed_owns(path):
    content = json.loads(path.read_text())
    assert not STATED_IN_RUN_FILES & set(content)
    assert "stage" not in content.get("zero_optimization", {})


def test_grown_and_scratch_differ_in_their_beginning_and_length_only():
    grown, scratch = (
        load_settings(CONFIGS / "runs" / f"quickstart-{name}.yaml", RunSettings) for name in ("grown", "scratch")
    )
    for name in ("seed", "precision", "layout", "batch", "data", "evaluation", "optimizer"):
        assert getattr(grown, name) == getattr(scratch, name), name


def write_run(folder, **changes):
    content = yaml.safe_load((CONFIGS / "runs" / "quickstart-source.yaml").read_text()) | changes
    (folder / "run.yaml").write_text(yaml.safe_dump(content))
    return folder / "run.yaml"


def test_every_mistake_is_listed_with_its_key(tmp_path):
    path = write_run(
        tmp_path, precison="fp32", schedule={"train_step": 5, "learning_rate": -1.0}, evaluation={"interval": "often"}
    )
    with pytest.raises(ConfigError) as caught:
        load_settings(path, RunSettings)
    text = str(caught.value)
    assert f"{path}: 6 problem(s)" in text
    assert "precison: unknown key; did you mean precision?" in text
    assert "schedule.train_step: unknown key; did you mean train_steps?" in text
    assert "schedule.train_steps: Field required" in text
    assert "schedule.learning_rate: Input should be greater than 0, found -1.0" in text
    assert "evaluation.interval: Input should be a valid integer, found 'often'" in text


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "batch.global_batch_size=17",
            "17 is not a multiple of micro_batch_size 8 x data_parallel 2; nearest: 16 or 32",
        ),
        ("evaluation.samples=20", "evaluation.samples 20 is not a multiple .*nearest: 16 or 32"),
        ("layout.pipeline_parallel=2.5", "layout.pipeline_parallel: Input should be a valid integer, found 2.5"),
        ("schedule.decay=wsd", "decay: wsd needs decay_steps"),
        ("schedule.warmup_steps=400", "warmup_steps 400 .* exceed train_steps 180"),
        ("model.initialize_from=x", "name exactly one of config .* and initialize_from"),
        ("data.validation=null", "evaluation needs data.validation"),
        ("model.config.name=x", "--set model.config.name=x: config is a single value"),
        ("seed", "--set seed: expected key.path=value"),
    ],
)
def test_overrides_are_checked_like_the_file(override, message):
    with pytest.raises(ConfigError, match=message):
        load_settings(CONFIGS / "runs" / "quickstart-source.yaml", RunSettings, [override])


def test_the_launcher_prints_the_resolved_settings_and_refuses_bad_ones_without_a_traceback():
    launcher = [sys.executable, ROOT / "launchers" / "pretrain.py", "--config"]
    run_file = CONFIGS / "runs" / "quickstart-source.yaml"
    options = [run_file, "--local_rank=0", "--set", "schedule.train_steps=310", "--print-config"]
    shown = subprocess.run([*launcher, *options], capture_output=True, text=True, timeout=60)
    assert shown.returncode == 0
    assert RunSettings.model_validate(yaml.safe_load(shown.stdout)).schedule.train_steps == 310
    refused = subprocess.run([*launcher, run_file, "--set", "sed=3"], capture_output=True, text=True, timeout=60)
    assert refused.returncode == 2
    assert "sed: unknown key; did you mean seed?" in refused.stderr and "Traceback" not in refused.stderr


@pytest.mark.parametrize("path", sorted((ROOT / "launchers").rglob("*.sbatch")), ids=lambda path: path.stem)
def test_batch_scripts_are_valid_and_say_how_they_are_used(path):
    subprocess.run(["bash", "-n", path], check=True, timeout=30)
    done = subprocess.run(["bash", path], capture_output=True, text=True, timeout=30)
    assert done.returncode == 2 and done.stderr.startswith(f"usage: sbatch launchers/slurm/{path.name}")
