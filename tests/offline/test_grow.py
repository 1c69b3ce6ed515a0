"""Offline growth through its command line: a real ZeRO source, every target, and bad input."""

import json
import multiprocessing
import os
import re
import shutil
import signal
from pathlib import Path

import pytest
import torch
import yaml
from commands import run_tool
from limits import grow_until
from native import check_loads_in_deepspeed, write_source
from transformers import AutoModelForCausalLM

from incr_ds.checkpoint.opening import open_source
from incr_ds.checkpoint.publish import verify_manifest
from incr_ds.offline.compare import compare, random_batches
from incr_ds.testing.processes import run_processes

TARGET = {
    "hidden_size": 144,
    "num_hidden_layers": 5,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "intermediate_size": 331,
}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory):
    """A tied llama trained for a few steps on 2 ranks, ZeRO-1, bf16: {"zero": folder, "huggingface": folder}."""
    folder = tmp_path_factory.mktemp("source")
    run_processes(write_source, 2, str(folder))
    return {"zero": folder / "zero", "huggingface": folder / "huggingface"}


@pytest.fixture
def recipe(tmp_path: Path):
    def write(**content):
        path = tmp_path / f"recipe{len(list(tmp_path.iterdir()))}.yaml"
        path.write_text(yaml.safe_dump({"target": TARGET, **content}))
        return path

    return write


def grow(source, recipe, output, *more):
    return run_tool("grow_checkpoint", "--source", source, "--recipe", recipe, "--output", output, *more)


def same_function(first, second):
    return compare(first, second, random_batches(101, 2, 12)).relative_difference


def test_plan_only_writes_nothing(source, recipe, tmp_path: Path):
    done = grow(source["zero"], recipe(), tmp_path / "out", "--plan-only")
    assert done.returncode == 0, done.stderr
    for shown in (
        "llama: function-preserving growth",
        "hidden_size",
        "isometric, up to 2 copies",
        "interleave, 2 new (zero-output): 0 0 1 1 2",
    ):
        assert shown in done.stdout
    assert not (tmp_path / "out").exists()
    content = json.loads(grow(source["zero"], recipe(), tmp_path / "out", "--plan-only", "--json").stdout)
    assert content["function_preserving"] and content["target_config"]["hidden_size"] == 144


@pytest.mark.parametrize(
    "layout",
    [
        {"tensor_parallel": 2, "pipeline_parallel": 2, "data_parallel": 1},
        {"tensor_parallel": 4, "pipeline_parallel": 1, "data_parallel": 2, "zero_stage": 2},
        {"tensor_parallel": 1, "pipeline_parallel": 3, "data_parallel": 3},
    ],
)
@pytest.mark.parametrize("tied", ["zero"])
def test_native_target_reads_back(source, recipe, tmp_path: Path, layout, tied: bool):
    """Every element of every state is where the layout says, whatever the grid: our reader joins it to the plan's tensors."""
    out = tmp_path / "out"
    done = grow(source[tied], recipe(layout=layout), out)
    assert done.returncode == 0, done.stderr
    target, origin = open_source(out), open_source(source[tied])
    assert {key: target.facts.layout[key] for key in layout} == layout
    assert target.facts.step == origin.facts.step == 3
    assert len(list(target.self_check())) >= len(target.architecture.stored)
    whole = tmp_path / "whole"
    assert grow(source[tied], recipe(layout={"format": "deepspeed", "data_parallel": 1}), whole).returncode == 0
    reference = open_source(whole)
    for spec in target.architecture.stored:
        for state in ("weight", "exp_avg", "exp_avg_sq"):
            assert torch.equal(target.read(spec.name, state), reference.read(spec.name, state)), (spec.name, state)
    assert same_function(origin, target) <= 1e-5


def test_native_target_loads_in_deepspeed(source, recipe, tmp_path: Path):
    folders = {}
    for stage in (1, 2):
        folders[stage] = tmp_path / f"stage{stage}"
        layout = {"data_parallel": 2, "zero_stage": stage}
        assert grow(source["zero"], recipe(layout=layout), folders[stage]).returncode == 0
    expected = open_source(source["zero"])
    results = run_processes(check_loads_in_deepspeed, 2, {stage: str(folder) for stage, folder in folders.items()})
    batch = random_batches(101, 1, 12)
    loss = compare(expected, expected, batch).source_loss
    for stage in (1, 2):
        found = results[0][stage]
        assert abs(found["loss"] - loss) <= 0.02 * loss  # bf16 weights: the fp32 masters carry the exact function
        reader = open_source(folders[stage])
        for name, weight in torch.load(folders[stage] / "zero_to_fp32.pt").items():
            assert torch.equal(weight, reader.read(name)), name
        assert found["moves"]


def test_a_reset_optimizer_writes_no_moments_and_deepspeed_starts_anew(source, recipe, tmp_path: Path):
    """Two thirds of the optimizer files would be zeros."""
    folders = {}
    for stage in (1, 2):
        folders[stage] = tmp_path / f"stage{stage}"
        reset = recipe(layout={"data_parallel": 2, "zero_stage": stage}, optimizer="reset")
        assert grow(source["zero"], reset, folders[stage]).returncode == 0
    kept = recipe(layout={"data_parallel": 2})
    assert grow(source["zero"], kept, tmp_path / "kept").returncode == 0
    sizes = [optimizer_bytes(folder) for folder in (folders[1], tmp_path / "kept")]
    assert abs(3 * sizes[0] - sizes[1]) < 0.05 * sizes[1]
    results = run_processes(check_loads_in_deepspeed, 2, {stage: str(folder) for stage, folder in folders.items()})
    for stage, folder in folders.items():
        assert results[0][stage]["moves"]
        reader, reference = open_source(folder), open_source(tmp_path / "kept")
        assert reader.facts.states == ("weight",)
        assert all(torch.equal(reader.read(s.name), reference.read(s.name)) for s in reference.architecture.stored)
    older = run_tool(
        "grow_checkpoint", "--source", source["zero"], "--recipe", recipe(optimizer="reset"),
        "--output", tmp_path / "older", "--target-deepspeed", "0.18.4",
    )  # fmt: skip
    assert older.returncode == 0 and "exp_avg" in open_source(tmp_path / "older").facts.states


def optimizer_bytes(folder):
    return sum(path.stat().st_size for path in folder.rglob("*_optim_states.pt"))


def test_huggingface_target(source, recipe, tmp_path: Path):
    out = tmp_path / "out"
    done = grow(source["zero"], recipe(layout={"format": "huggingface"}), out)
    assert done.returncode == 0, done.stderr
    model = AutoModelForCausalLM.from_pretrained(out)
    assert model.config.hidden_size == 144 and model.dtype == torch.float32
    tokens = random_batches(101, 1, 12)[0]
    with torch.no_grad():
        loss = model(tokens, labels=tokens).loss.item()
    expected = compare(open_source(source["zero"]), open_source(out), [tokens])
    assert abs(loss - expected.source_loss) <= 1e-5
    assert expected.relative_difference <= 1e-5


def test_the_same_bytes_for_any_number_of_workers(source, recipe, tmp_path: Path):
    path = recipe(layout={"tensor_parallel": 2, "pipeline_parallel": 2}, width={"symmetry_breaking": {"seed": 5}})
    for workers in (1, 3):
        done = grow(source["zero"], path, tmp_path / f"w{workers}", "--workers", workers)
        assert done.returncode == 0, done.stderr
    one, three = (verify_manifest(tmp_path / f"w{workers}")["files"] for workers in (1, 3))
    assert one == three and len(one) > 10


def test_verify_and_export(source, recipe, tmp_path: Path):
    out = tmp_path / "out"
    assert grow(source["zero"], recipe(layout={"pipeline_parallel": 2}), out).returncode == 0
    compared = ("--against", source["zero"], "--samples", 2, "--length", 12)
    done = run_tool("verify_checkpoint", out, "--tag", "grown", *compared)
    assert done.returncode == 0, done.stderr
    assert "logits kept" in done.stdout
    done = run_tool("verify_checkpoint", out, "--tag", "another", *compared)
    assert done.returncode == 2 and "another" in done.stderr and "Traceback" not in done.stderr
    done = run_tool("export_huggingface", out, tmp_path / "exported", "--dtype", "float32")
    assert done.returncode == 0, done.stderr
    AutoModelForCausalLM.from_pretrained(tmp_path / "exported")
    assert same_function(open_source(source["zero"]), open_source(tmp_path / "exported")) <= 1e-5
    assert run_tool("export_huggingface", out, tmp_path / "rounded").returncode == 0
    done = run_tool("verify_checkpoint", tmp_path / "rounded", "--against", out, "--samples", 2, "--length", 12)
    assert done.returncode == 0 and "times the effect of rounding its weights to 16 bits" in done.stdout, done.stdout
    done = run_tool(
        "verify_checkpoint", tmp_path / "rounded", "--tolerance", 0, "--against", out, "--samples", 1, "--length", 8
    )
    assert done.returncode == 1 and "allowed 0: --tolerance" in done.stdout and "LOGITS DIFFER" in done.stdout, (
        done.stdout
    )
    done = run_tool("export_huggingface", out, tmp_path / "rounded")
    assert done.returncode == 2 and "exists already" in done.stderr and "--overwrite" not in done.stderr
    other = run_tool(
        "verify_checkpoint", out, "--against", source["huggingface"], "--json", "--samples", 1, "--length", 12
    )
    report = json.loads(other.stdout)
    assert report["passed"] is False and other.returncode == 1
    shown = run_tool("inspect_checkpoint", out)
    assert shown.returncode == 0 and "DeepSpeed ZeRO-1" in shown.stdout and "pp 2" in shown.stdout
    facts = json.loads(run_tool("inspect_checkpoint", source["huggingface"], "--json").stdout)
    assert facts["kind"] == "Hugging Face safetensors" and facts["sizes"]["hidden"] == 96


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: p.write_bytes(p.read_bytes()[:-1] + bytes([p.read_bytes()[-1] ^ 1])), "content changed"),
        (lambda p: p.write_bytes(p.read_bytes()[:-10]), "truncated or replaced"),
        (lambda p: p.unlink(), "missing; the manifest lists it"),
        (lambda p: p.with_name("extra.bin").write_bytes(b"x"), "extra.bin: not in the manifest"),
    ],
)
def test_verify_finds_every_damage(source, recipe, tmp_path: Path, change, message: str):
    out = tmp_path / "out"
    assert grow(source["huggingface"], recipe(layout={"format": "huggingface"}), out).returncode == 0
    change(out / "model.safetensors")
    done = run_tool("verify_checkpoint", out)
    assert done.returncode == 2
    assert message in done.stderr and "Traceback" not in done.stderr


BAD = [
    ({"target": {"hidden_size": 145}}, "Nearest sizes that work: hidden_size: 144 or 150"),
    ({"widht": {"hidden": "zero"}}, "widht: unknown key; did you mean width?"),
    ({"width": {"hidden": "isometrical"}}, "width.hidden: Input should be 'auto', 'integer', 'isometric'"),
    ({"layout": {"tensor_parallel": 3}}, "tensor_parallel 3: num_attention_heads 8 does not divide"),
    ({"layout": {"tensor_parallel": 3}}, ".yaml: layout: the model cannot be cut this way"),
    ({"layout": {"pipeline_parallel": 6}}, "pipeline_parallel can be 1 to 5"),
    ({"layout": {"pipeline_parallel": 2, "zero_stage": 2}}, "DeepSpeed's pipeline supports zero_stage 0 and 1"),
    ({"layout": {"zero_stage": 0}}, "layout.zero_stage: 0 has no optimizer files; use the engine's stage 1, 2 or 3"),
]


@pytest.mark.parametrize(("content", "message"), BAD)
def test_bad_recipes(source, recipe, tmp_path: Path, content, message: str):
    done = grow(source["zero"], recipe(**content), tmp_path / "out")
    assert done.returncode == 2
    assert message in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


def test_bad_sources(source, recipe, tmp_path: Path):
    path = recipe()
    cases = [
        (tmp_path / "nowhere", "not a folder"),
        (source["huggingface"], "has no Adam moments, but optimizer: rescale needs them; set optimizer: reset"),
        (
            tmp_path,
            "neither a DeepSpeed checkpoint (a file `latest`), nor a Megatron-core one (a file `latest_checkpointed",
        ),
    ]
    for folder, message in cases:
        done = grow(folder, path, tmp_path / "out")
        assert done.returncode == 2 and message in done.stderr, done.stderr
    unknown = tmp_path / "unknown"
    unknown.mkdir()
    for name in ("model.safetensors", "config.json"):
        (unknown / name).write_bytes((source["huggingface"] / name).read_bytes())
    config = json.loads((unknown / "config.json").read_text())
    for change, message in (
        (
            {"model_type": "gpt_fancy"},
            "model_type 'gpt_fancy' is not supported; supported: cohere, gemma2, gemma3_text, gpt2",
        ),
        ({"is_causal": False}, "is_causal (false): transformers"),
    ):
        (unknown / "config.json").write_text(json.dumps({**config, **change}))
        done = grow(unknown, path, tmp_path / "out")
        assert done.returncode == 2 and message in done.stderr, done.stderr


def test_a_published_source_must_match_its_manifest(source, recipe, tmp_path: Path):
    """A byte of a moment that no other file repeats: only the checksum can tell."""
    first = tmp_path / "first"
    assert grow(source["zero"], recipe(), first).returncode == 0
    shard = next((first / "grown").glob("*_optim_states.pt"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    same_size = recipe(target={})
    done = grow(first, same_size, tmp_path / "second")
    assert done.returncode == 2 and f"{shard}: checksum xxh3" in done.stderr and "content changed" in done.stderr
    assert not (tmp_path / "second").exists()


def test_what_describes_a_published_source_must_match_its_manifest(source, recipe, tmp_path: Path):
    """An eps that nobody published would be taken for the model's: no shape tells."""
    first, same_size = tmp_path / "first", recipe(target={})
    assert grow(source["zero"], recipe(), first).returncode == 0
    config = first / "config.json"
    config.write_text(config.read_text().replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e-03'))
    (first / "notes.txt").write_text("mine")
    attempts = {
        "grow_checkpoint": ["--source", first, "--recipe", same_size, "--output", tmp_path / "second"],
        "evaluate": [first, "--data", tmp_path / "nowhere"],
        "export_huggingface": [first, tmp_path / "second"],
    }
    for expected in (r"notes.txt: not in the manifest", r"config.json: .* the manifest lists"):
        for tool, arguments in attempts.items():
            done = run_tool(tool, *arguments)
            assert done.returncode == 2 and re.search(expected, done.stderr), (tool, done.stderr)
        (first / "notes.txt").unlink(missing_ok=True)
    assert not (tmp_path / "second").exists()
    done = run_tool("evaluate", source["zero"], "--data", tmp_path / "nowhere.bin")
    assert (
        done.returncode == 2
        and "nowhere.bin.bin: no such file; expected the path of a Megatron data set" in done.stderr
    )


def test_an_existing_output_is_kept(source, recipe, tmp_path: Path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("1")
    done = grow(source["zero"], recipe(), tmp_path / "out")
    assert done.returncode == 2 and "exists already and is not an empty folder" in done.stderr
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["precious"]


@pytest.mark.parametrize("output", [".", "inner", "step/inner", ".."])
@pytest.mark.parametrize("overwrite", [[], ["--overwrite"]])
def test_an_output_in_its_source_is_refused(source, recipe, tmp_path: Path, output, overwrite):
    """Such an output would add files that the source's manifest lacks, or replace the source while it is read."""
    folder = tmp_path / "own" / "source"
    shutil.copytree(source["zero"], folder)
    path = recipe()
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    done = grow(folder, path, folder / output, *overwrite)
    assert done.returncode == 2 and "the source must not change; choose an output beside it" in done.stderr
    done = run_tool("export_huggingface", folder, folder / output)
    assert done.returncode == 2 and "the source must not change; choose an output beside it" in done.stderr
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_kill_during_growth_leaves_no_target(source, recipe, tmp_path: Path):
    os.symlink(source["zero"], tmp_path / "source")
    recipe(layout={"data_parallel": 32}).rename(tmp_path / "recipe.yaml")
    process = multiprocessing.get_context("forkserver").Process(
        target=grow_until, args=(str(tmp_path), 1, "after note", 2)
    )
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    assert list(tmp_path.glob(".out.incomplete-*"))
    done = grow(source["zero"], recipe(layout={"format": "huggingface"}), tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert verify_manifest(tmp_path / "out")
    assert not list(tmp_path.glob(".out.incomplete-*")), "what the killed run left is cleaned up"


def test_an_inexact_growth_shows_what_it_does_to_the_loss(source, recipe, tmp_path: Path):
    """As many tokens as stated, of the source's vocabulary, through both models; more than the budget is not loaded."""
    layout = {"format": "huggingface"}
    grow = (
        "--source",
        source["huggingface"],
        "--recipe",
        recipe(width={"hidden": "random"}, optimizer="reset", layout=layout),
    )
    missing = run_tool("grow_checkpoint", *grow, "--output", tmp_path / "out", "--data", tmp_path / "text")
    assert missing.returncode == 2 and "text.idx: missing" in missing.stderr and not (tmp_path / "out").exists()
    done = run_tool("grow_checkpoint", *grow, "--output", tmp_path / "out", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)["step_0"]
    vocab = open_source(source["huggingface"]).architecture.sizes["vocab"]
    batches = random_batches(vocab, 8, 128)
    expected = compare(open_source(source["huggingface"]), open_source(tmp_path / "out"), batches)
    assert found["target_loss"] == pytest.approx(expected.target_loss) and found["tokens"] == 8 * 127
    again = run_tool("grow_checkpoint", *grow, "--output", tmp_path / "again")
    change = expected.target_loss - expected.source_loss
    assert (
        f"{change:+.4f}, over 1016 tokens drawn at random (no tokenizer beside the weights; pass a data set "
        in again.stdout
    )


def test_models_larger_than_the_budget_are_not_measured(source, recipe, tmp_path: Path):
    from incr_ds.cli.grow import _described, _step_0
    from incr_ds.offline.plan import GrowthRequest, plan_request

    path = recipe(width={"hidden": "random"}, optimizer="reset", layout={"format": "huggingface"})
    planned = plan_request(GrowthRequest(source["huggingface"], path, tmp_path / "out", memory_budget=1000))
    needed = 4 * (planned.source.architecture.num_parameters + planned.plan.target.num_parameters)
    assert _step_0(planned, None) == {"needed_bytes": needed}
    assert f"not measured; both models in memory need {needed:,} bytes" in _described({"needed_bytes": needed}, None)
