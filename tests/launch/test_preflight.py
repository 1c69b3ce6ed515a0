"""What is wrong with a run is reported before anything slow is imported, all of it at once."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from token_data import write_documents

from incr_ds.errors import ConfigError, IncrError, LayoutError
from incr_ds.launch.preflight import check_model, check_run, check_world_size
from incr_ds.testing.memory import small_architecture
from incr_ds.testing.runs import pico_run

ROOT = Path(__file__).parents[2]


@pytest.fixture
def material(tmp_path: Path):
    write_documents(tmp_path / "x", [[1, 2, 3]])
    (tmp_path / "config.json").write_text(json.dumps(dict(small_architecture("llama").config)))
    return tmp_path


def run_of(folder, **changes):
    sections = {
        "output": str(folder / "run"),
        "model": {"config": str(folder / "config.json")},
        "data": {"train": [{"prefix": str(folder / "x")}]},
    }
    return pico_run(**sections | changes)


def test_what_is_there_passes_and_nothing_is_written(material):
    before = sorted(material.iterdir())
    check_run(run_of(material))
    assert sorted(material.iterdir()) == before


def test_a_layout_that_the_model_has_not_enough_heads_for_is_refused(material):
    with pytest.raises(LayoutError, match="tensor_parallel 64: num_attention_heads 6 does not divide"):
        check_model(run_of(material, layout={"tensor_parallel": 64}))


def test_every_problem_is_told_at_once(material):
    run = run_of(
        material,
        layout={"pipeline_parallel": 9},
        data={"train": [{"prefix": str(material / "x")}, {"prefix": str(material / "y")}], "tokenizer": "nowhere"},
        distillation={"teacher": str(material / "gone"), "anneal_steps": 1},
    )
    with pytest.raises(ConfigError) as caught:
        check_run(run)
    text = str(caught.value)
    assert text.startswith(
        "3 problems:\n- layout: the model cannot be cut this way\n  pipeline_parallel 9: the model has 3"
    )
    assert (
        f"- distillation.teacher: {material}/gone: no such folder; data.tokenizer: nowhere: no such folder.\n" in text
    )
    assert f"- {material}/y.bin: no such file; expected the path of a Megatron data set" in text


def test_more_tokens_than_learned_positions_are_refused(material):
    config = dict(small_architecture("gpt2").config)
    (material / "config.json").write_text(json.dumps(config))
    batch = {"sequence_length": 4096, "micro_batch_size": 1, "global_batch_size": 1}
    with pytest.raises(ConfigError, match="batch.sequence_length: 4096 tokens per sample, but this gpt2 has"):
        check_model(run_of(material, batch=batch))


LAUNCHED = {"RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}


@pytest.mark.parametrize("started", ["3", "two"])
def test_another_number_of_processes_is_refused(material, monkeypatch: pytest.MonkeyPatch, started):
    for name, value in {**LAUNCHED, "WORLD_SIZE": started}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=f"needs 2 processes, but {started} were started"):
        check_world_size(run_of(material, layout={"data_parallel": 2}).layout)


def test_a_rank_that_no_launcher_started_says_how_to_start(material, monkeypatch: pytest.MonkeyPatch):
    for name in ("WORLD_SIZE", *LAUNCHED):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ConfigError, match="no WORLD_SIZE, RANK, .* in the environment: start training with a launcher"):
        check_world_size(run_of(material).layout)


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ("config.json", "config.json: cannot be written .a part of the path is a file"),
        ("config.json/run", "config.json/run: cannot be written"),
        ("/proc/incr_ds/run", "/proc/incr_ds/run: cannot be written"),
        ("a\0b", "output: .*not a valid path"),
        ("x" * 5000, "output: .*expected names of at most 200 bytes"),
        ("", "output: '': not a valid path"),
    ],
)
def test_an_output_that_cannot_be_written_is_refused(material, output, message: str):
    where = output if output.startswith("/") or not output else f"{material}/{output}"
    with pytest.raises(IncrError, match=message):
        check_run(run_of(material, output=where))


def test_the_program_says_so_before_it_imports_torch(material):
    """Without imports it takes a second; the modules that it loads are what is checked here, not the clock."""
    program = (
        "import runpy, sys; sys.argv = sys.argv[1:];\n"
        "try: runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "finally: print({'torch', 'deepspeed', 'transformers', 'megatron'} & set(sys.modules))"
    )
    (material / "run.yaml").write_text(json.dumps(run_of(material).model_dump(mode="json")))
    words = [sys.executable, "-c", program, ROOT / "launchers" / "pretrain.py", "--config", material / "run.yaml"]
    done = subprocess.run(
        words, capture_output=True, text=True, timeout=60, env={"PATH": "/usr/bin", "WORLD_SIZE": "2", **LAUNCHED}
    )
    assert done.returncode == 2 and done.stdout == "set()\n", done.stderr
    assert done.stderr.startswith(
        "pretrain: layout: tensor_parallel 1 x pipeline_parallel 1 x data_parallel 1 needs 1 processes"
    )
