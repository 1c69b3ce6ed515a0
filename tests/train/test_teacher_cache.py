"""A cached teacher teaches what the live one does, from a folder that belongs to exactly one run's order of samples."""

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from cache_teacher import main
from cached_runs import (
    FIRST_SAMPLE,
    LENGTH,
    STEPS,
    STUDENT,
    TAUGHT,
    refused_together,
    settings,
    train_all,
    write_material,
    write_together,
)
from one_number import make_world, stop_at, stoppable
from one_number import settings as one_number_settings
from safetensors.numpy import load_file, save_file
from token_data import write_documents
from transformers import AutoModelForCausalLM

from incr_ds.checkpoint.opening import open_source
from incr_ds.checkpoint.publish import publish, read_manifest
from incr_ds.config.yaml_file import yaml_text
from incr_ds.data.teacher_cache import KIND
from incr_ds.errors import CheckpointError, ConfigError
from incr_ds.launch.dry_run import dry_run
from incr_ds.launch.preflight import check_run
from incr_ds.losses.distillation import distillation_loss
from incr_ds.losses.teachers import TopKTeacher
from incr_ds.model.layers import LayerFactory
from incr_ds.model.plain import LanguageModel
from incr_ds.model.tensor_parallel import TensorRanks
from incr_ds.model.weights import FreshWeights
from incr_ds.testing.memory import SMALL
from incr_ds.testing.processes import run_processes
from incr_ds.train import loop, pretraining
from incr_ds.train.cached_teacher import cached_samples, open_cache
from incr_ds.train.caching import CacheRequest, CachingTeacher, write_cache
from incr_ds.train.inputs import open_data
from incr_ds.train.metrics import read_metrics

ROOT = Path(__file__).parents[2]
VOCABULARY, TEMPERATURE = SMALL["vocab"], 1.5
SAMPLES = 4 * TAUGHT


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("cached")
    write_material(path)
    write_cache(request(path, "whole", VOCABULARY, "fp32"), lambda done, total: None)
    write_cache(request(path, "few", 7, "fp16"), lambda done, total: None)
    return path


def request(folder, name, top_k, stored="fp16"):
    return CacheRequest(settings(folder, "writing"), folder / name, top_k, stored, 6)


def opened(folder, cache, needed=None, **changes):
    run = settings(folder, "reading", distillation={"cache": str(cache)} | changes.pop("distillation", {}), **changes)
    teacher = open_source(run.distillation.teacher)
    needed = needed or cached_samples(run, 0, run.data.start_sample)
    return open_cache(run, open_data(run, STUDENT), teacher, VOCABULARY, needed), run


def by_transformers(folder, input_ids):
    """Log-probabilities [B, S, V] of the teacher."""
    model = AutoModelForCausalLM.from_pretrained(folder / "teacher", dtype=torch.float32).eval()
    with torch.no_grad():
        return torch.log_softmax(model(input_ids).logits / TEMPERATURE, dim=-1)


def tokens(data, numbers):
    return torch.stack([torch.from_numpy(data.train.tokens(number)) for number in numbers])


@pytest.mark.parametrize(("name", "rounding"), [("whole", 2e-6), ("few", 2**-11)])
def test_entries_are_the_teachers_most_probable_ones_by_sample_number(folder, name, rounding):
    cache, run = opened(folder, folder / name)
    data = open_data(run, STUDENT)
    for numbers in (range(FIRST_SAMPLE, FIRST_SAMPLE + 2), range(FIRST_SAMPLE + 17, FIRST_SAMPLE + 20)):
        indices, log_probs = cache.entries(numbers)
        expected = by_transformers(folder, tokens(data, numbers)[:, :-1])
        assert indices.shape == (len(numbers), LENGTH, cache.facts.top_k) and indices.dtype == torch.int64
        torch.testing.assert_close(log_probs.float(), expected.gather(-1, indices), rtol=rounding, atol=2e-6)
        torch.testing.assert_close(indices, expected.topk(cache.facts.top_k).indices)
    assert cache.entries(range(FIRST_SAMPLE + SAMPLES, FIRST_SAMPLE + SAMPLES + 1)) is None  # its weight is 0


def test_shards_hold_the_smallest_types_and_the_manifest_what_they_belong_to(folder):
    manifest = read_manifest(folder / "few")
    sizes = [len(load_file(folder / "few" / name)["indices"]) for name in sorted(manifest["files"])]
    assert sizes == [6, 6, 6, 2] and manifest["kind"] == KIND
    first = load_file(folder / "few" / "shard_00000000.safetensors")
    assert {key: (str(value.dtype), value.shape) for key, value in first.items()} == {
        "indices": ("uint8", (6, LENGTH, 7)),
        "log_probs": ("float16", (6, LENGTH, 7)),
    }
    facts = manifest["facts"]["cache"]
    assert (facts["first_sample"], facts["samples"], facts["seed"], facts["top_k"]) == (FIRST_SAMPLE, SAMPLES, 5, 7)
    assert (folder / "few" / "shard_00000000.safetensors").stat().st_mode & 0o044 == 0o044


def test_few_entries_give_the_loss_and_gradients_of_a_teacher_made_by_hand(folder):
    cache, run = opened(folder, folder / "few")
    ids = tokens(open_data(run, STUDENT), range(FIRST_SAMPLE, FIRST_SAMPLE + 4))
    ranks, device = TensorRanks(None, 0, 1), torch.device("cpu")
    factory = LayerFactory(STUDENT, ranks, FreshWeights(STUDENT, 3), torch.float32, device, "sdpa")
    model = LanguageModel(factory, range(STUDENT.num_layers + 3))
    targets = (ids[:, 1:], *cache.entries(range(FIRST_SAMPLE, FIRST_SAMPLE + 4)))
    found = model(ids[:, :-1], targets, None, None, 0.4, TEMPERATURE)
    found.loss.backward()
    gradients = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    top = by_transformers(folder, ids[:, :-1]).topk(7)
    teacher = TopKTeacher(top.indices.flatten(0, 1), top.values.half().float().flatten(0, 1))
    hidden = model.hidden_states(ids[:, :-1]).flatten(0, 1)
    labels = ids[:, 1:].flatten()
    expected = distillation_loss(
        hidden, model.lm_head.weight, labels, teacher=teacher, alpha=0.4, temperature=TEMPERATURE
    )
    expected.loss.backward()
    torch.testing.assert_close(found[:3], expected[:3], rtol=1e-6, atol=0)
    assert found.divergence > 0.005
    for gradient, parameter in zip(gradients, model.parameters(), strict=True):
        torch.testing.assert_close(gradient, parameter.grad, rtol=1e-5, atol=1e-6 * float(parameter.grad.abs().max()))


LAYOUTS = {
    "data": {"data_parallel": 2, "zero_stage": 1},
    "zero3": {"data_parallel": 2, "zero_stage": 3},
    "tensor": {"tensor_parallel": 2},
    "pipeline": {"pipeline_parallel": 2},
}


@pytest.fixture(scope="module")
def trained(folder):
    """Each layout with the live and with the cached teacher, in two processes, and the latter resumed from its middle."""
    cached = {"distillation": {"cache": str(folder / "whole")}}
    cases = {f"{name}/live": {"layout": layout} for name, layout in LAYOUTS.items()}
    cases |= {f"{name}/cached": {"layout": layout, **cached} for name, layout in LAYOUTS.items()}
    cases |= {"bf16/live": {"layout": LAYOUTS["data"], "precision": "bf16"}}
    cases |= {"bf16/cached": {"layout": LAYOUTS["data"], "precision": "bf16", **cached}}
    cases |= {"small/cached": {"layout": LAYOUTS["data"], "distillation": {"cache": str(folder / "few")}}}
    built, other = run_processes(train_all, 2, str(folder), cases, timeout=400)
    assert built == other == {name: name.endswith("/live") for name in cases}
    middle = "checkpoints/step_00000003"
    shutil.copytree(folder / "data/cached" / middle, folder / "data/resumed" / middle)
    run_processes(train_all, 2, str(folder), {"data/resumed": {"layout": LAYOUTS["data"], **cached}})
    return folder


def rows(folder):
    return [row for row in read_metrics(folder / "metrics.jsonl") if row["kind"] == "train"]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_whole_vocabulary_trains_as_the_live_teacher_does(trained, layout):
    live, cached = rows(trained / layout / "live"), rows(trained / layout / "cached")
    assert [row["alpha"] for row in cached] == pytest.approx([0.5, 0.4, 0.3, 0.2, 0.1, 0.0])
    for key in ("loss", "ce", "gradient_norm"):
        assert [row[key] for row in cached] == pytest.approx([row[key] for row in live], rel=1e-6)
    assert [row["divergence"] for row in cached[:-1]] == pytest.approx(
        [row["divergence"] for row in live[:-1]], rel=2e-6
    )
    assert cached[-1]["divergence"] is None and len(live) == STEPS
    same_weights(trained / layout / "live", trained / layout / "cached")


def same_weights(one, other):
    first, second = (open_source(run / f"checkpoints/step_{STEPS:08}") for run in (one, other))
    for spec in first.architecture.stored:
        weight = first.read(spec.name).detach()
        torch.testing.assert_close(
            weight, second.read(spec.name).detach(), rtol=0, atol=1e-6 * float(weight.abs().max())
        )


def test_a_bf16_run_takes_entries_of_an_fp32_teacher_as_they_are(trained):
    live, cached = rows(trained / "bf16/live"), rows(trained / "bf16/cached")
    assert cached[0]["ce"] == live[0]["ce"]  # the teacher alone differs, by its rounding
    assert cached[0]["divergence"] == pytest.approx(live[0]["divergence"], rel=0.02)
    assert cached[0]["divergence"] != live[0]["divergence"]


def test_a_resumed_run_reads_on_in_the_cache(trained):
    whole, resumed = rows(trained / "data/cached"), rows(trained / "data/resumed")
    assert [row["step"] for row in resumed] == [4, 5, 6]
    assert [(row["loss"], row["gradient_norm"]) for row in resumed] == [
        (row["loss"], row["gradient_norm"]) for row in whole[3:]
    ]


def test_a_cached_teacher_costs_the_run_no_operations(trained):
    live, cached = rows(trained / "data/live"), rows(trained / "data/cached")
    per_step = cached[0]["flops"]
    assert [row["flops"] for row in cached] == [per_step * step for step in range(1, STEPS + 1)]
    found = write_cache(request(trained, "counted", 3), lambda done, total: None)
    assert live[-1]["flops"] - cached[-1]["flops"] == found.flops > 0


def test_few_entries_train_close_to_the_whole_and_not_as_it(trained):
    few, whole = rows(trained / "small/cached"), rows(trained / "data/cached")
    assert few[0]["ce"] == whole[0]["ce"]
    assert 0 < few[0]["divergence"] < whole[0]["divergence"]  # joining entries into one lowers the divergence


def test_two_ranks_hold_the_teacher_together_and_write_the_same_entries(folder):
    """Each has half of the matrices. Values differ by the order of sums alone; both ranks' parts of the vocabulary count."""
    requests = {"whole by two": (VOCABULARY, "fp32"), "few by two": (7, "fp16"), "most by two": (60, "fp32")}
    held = run_processes(write_together, 2, str(folder), requests)
    alone = CachingTeacher(settings(folder, "writing"), open_source(folder / "teacher"))
    whole = sum(parameter.numel() for parameter in alone._teacher._model.parameters())
    assert all(whole / 2 < one < 0.52 * whole for one in held)
    for name, rounding in (("whole", 2e-6), ("few", 2**-10), ("most", 2e-6)):
        one, two = (folder / ("whole" if name == "most" else name), folder / f"{name} by two")
        assert {path.name for path in two.iterdir()} == {path.name for path in one.iterdir()}
        for path in two.glob("shard*"):
            expected, found = load_file(one / path.name), load_file(path)
            count = found["indices"].shape[-1]
            np.testing.assert_array_equal(found["indices"], expected["indices"][..., :count])
            np.testing.assert_allclose(found["log_probs"], expected["log_probs"][..., :count], rtol=rounding, atol=2e-6)


@pytest.mark.slow
def test_the_command_under_torchrun_speaks_once(folder):
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    options = ["--config", write_run_file(folder), "--output", folder / "launched", "--top-k", 7, "--shard-samples", 6]
    command = [*launch, "tools/cache_teacher.py", *map(str, options), "--json"]
    done = subprocess.run(command, cwd=ROOT, timeout=200, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["bytes"] == SAMPLES * LENGTH * 7 * 3
    assert opened(folder, folder / "launched")[0].facts.top_k == 7


def test_what_cannot_be_cached_is_refused_on_every_rank(folder):
    message = "--top-k 500: expected 1 to 101, the teacher's vocabulary."
    assert run_processes(refused_together, 2, str(folder), "never", 500) == [message, message]
    (first, second) = run_processes(refused_together, 2, str(folder), "few", 7)
    assert first == second and "few: exists already and is not an empty folder" in first


KILLED = """
import os, signal, sys
from incr_ds.checkpoint.workspace import Workspace
record, count = Workspace.record, [0]
def killing(self, path, digest):
    record(self, path, digest)
    count[0] += 1
    if count[0] == 2:
        (self.folder / "shard_00000012.safetensors").write_bytes(b"half a shard")
        os.kill(os.getpid(), signal.SIGKILL)
Workspace.record = killing
from incr_ds.cli.cache_teacher import main
main()
"""


def write_run_file(folder, **changes):
    content = settings(folder, "writing", **changes).model_dump(mode="json", exclude_unset=True)
    (folder / "run.yaml").write_text(yaml_text(content))
    return folder / "run.yaml"


def tool(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["cache_teacher.py", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        main()
    return ended.value.code


def test_a_killed_tool_goes_on_behind_the_last_whole_shard_and_writes_the_same_bytes(folder, monkeypatch, capsys):
    options = ["--config", write_run_file(folder), "--output", folder / "killed", "--top-k", 7, "--shard-samples", 6]
    killed = subprocess.run([sys.executable, "-c", KILLED, *map(str, options)], cwd=ROOT, timeout=120)
    assert killed.returncode == -signal.SIGKILL and not (folder / "killed").exists()
    assert tool(monkeypatch, *options, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["resumed"] == 2 and found["bytes"] == SAMPLES * LENGTH * 7 * 3
    for path in (folder / "few").iterdir():
        assert (folder / "killed" / path.name).read_bytes() == path.read_bytes(), path.name
    assert [path.name for path in folder.glob(".killed*")] == []
    assert tool(monkeypatch, *options) == 2
    assert "killed: exists already and is not an empty folder" in capsys.readouterr().err


def test_the_tool_says_what_it_wrote_and_refuses_what_it_cannot_cache(folder, monkeypatch, capsys):
    options = ["--config", write_run_file(folder), "--output", folder / "said"]
    assert tool(monkeypatch, *options, "--top-k", 500) == 2
    assert f"--top-k 500: expected 1 to {VOCABULARY}, the teacher's vocabulary." in capsys.readouterr().err
    for change, message in {
        "distillation.weight=0": "the teacher's weight is 0 in every step of the run",
        "distillation=null": "the run file has no such section, so there is no teacher to cache",
        "distillation.divergence=jsd": "divergence jsd needs the teacher's whole distribution",
        "distillation.final_temperature=1.0": "written at one temperature, but the run goes from 1.5 to 1",
    }.items():
        assert tool(monkeypatch, *options, "--top-k", 4, "--set", change) == 2
        assert message in capsys.readouterr().err and not (folder / "said").exists()
    assert tool(monkeypatch, *options, "--top-k", 4) == 0
    shown = capsys.readouterr().out
    assert f"4 of {VOCABULARY} entries for 20 samples of 16 tokens, 3,840 bytes; the teacher took" in shown


def test_a_flipped_byte_is_named(folder, tmp_path):
    shutil.copytree(folder / "few", tmp_path / "few")
    path = tmp_path / "few" / "shard_00000006.safetensors"
    content = bytearray(path.read_bytes())
    content[-3] ^= 4
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"shard_00000006\.safetensors: checksum xxh3 .*content changed"):
        opened(folder, tmp_path / "few")
    path.unlink()
    with pytest.raises(CheckpointError, match=r"shard_00000006\.safetensors: missing"):
        opened(folder, tmp_path / "few")


def rewritten(folder, target, change):
    """Publish the cache ``few`` again, with valid checksums of a changed first shard."""
    facts = read_manifest(folder / "few")["facts"]
    with publish(target, KIND, facts) as inside:
        for path in (folder / "few").glob("shard*"):
            shutil.copyfile(path, inside / path.name)
        save_file(change(load_file(folder / "few/shard_00000000.safetensors")), inside / "shard_00000000.safetensors")
    return target


def test_entries_that_no_teacher_writes_are_refused(folder, tmp_path):
    first = range(FIRST_SAMPLE, FIRST_SAMPLE + 1)
    for number, (change, message) in enumerate(
        [
            (
                lambda shard: shard | {"indices": shard["indices"] + 100},
                "expected entries of 101 and finite log-probabilities",
            ),
            (lambda shard: shard | {"log_probs": shard["log_probs"] * float("nan")}, "expected entries of 101"),
            (lambda shard: shard | {"log_probs": shard["log_probs"] - np.float16("inf")}, "finite log-probabilities"),
            (
                lambda shard: {key: value[:3] for key, value in shard.items()},
                r"expected .*\[6, 16, 7\].*found .*\[3, 16",
            ),
        ]
    ):
        cache, _ = opened(folder, rewritten(folder, tmp_path / str(number), change))
        with pytest.raises(CheckpointError, match=message):
            cache.entries(first)
    with pytest.raises(CheckpointError, match="manifest.json: missing"):
        opened(folder, folder / "teacher")


REFUSED = {
    "teacher": ({"distillation": {"teacher": "other_teacher"}}, "distillation.teacher: the cache is of"),
    "seed": ({"seed": 6}, "seed: the cache is of 5, the run has 6"),
    "temperature": ({"distillation": {"temperature": 2.0}}, "distillation.temperature: the cache is of 1.5, the run has 2"),
    "length": ({"batch": {"sequence_length": 8}}, "batch.sequence_length: the cache is of 16, the run has 8"),
    "samples": ({"distillation": {"anneal_steps": 6}}, "the cache has 8 to 27, the run reads 8 to 31"),
    "start": ({"data": {"start_sample": 4}}, "the cache has 8 to 27, the run reads 4 to 23"),
    "weight": ({"data": {"train": [{"prefix": "x_train_text_document", "weight": 2.0}]}}, "(weight 1), the run has"),
    "data": ({"data": {"train": [{"prefix": "other"}]}}, "data.train: the cache is of"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_a_cache_of_another_run_is_refused(folder, case, monkeypatch):
    changes, message = REFUSED[case]
    monkeypatch.chdir(folder)
    if case == "data" and not Path("other.bin").exists():
        write_documents("other", [[number % 90 for number in range(300)]])
    with pytest.raises(ConfigError) as refused:
        opened(folder, folder / "few", **changes)
    text = str(refused.value)
    assert message in text and text.startswith(f"distillation.cache {folder}/few: it belongs to another run:")
    assert "Write one for this run file (tools/cache_teacher.py)" in text and text.count("\n  ") == 1


def test_settings_that_need_the_whole_teacher_are_refused_by_name(folder):
    growth = [{"at_step": 3, "recipe": "recipe.yaml"}]
    for changes, message in [
        ({"distillation": {"cache": "c", "divergence": "reverse_kl"}}, "reverse_kl needs the teacher's whole"),
        ({"distillation": {"cache": "c", "teacher": "before-growth"}}, "does not exist yet when a cache is written"),
        (
            {"distillation": {"cache": "c"}, "divergence": {"action": "roll_back"}},
            "does not go with divergence.action: roll_back",
        ),
        (
            {"distillation": {"cache": "c"}, "resume": {"change_data": True}},
            "does not go with resume.change_data: true",
        ),
        (
            {"distillation": {"cache": "c"}, "growth": growth},
            "distillation.cache c: a run that grows cannot read a cache",
        ),
    ]:
        with pytest.raises(ConfigError, match=message):
            settings(folder, "refused", **changes)


def test_a_missing_cache_is_named_before_anything_slow(folder):
    run = settings(folder, "reading", distillation={"cache": str(folder / "none")})
    with pytest.raises(ConfigError, match=f"distillation.cache: {folder}/none: no such folder"):
        check_run(run)


def test_a_dry_run_counts_no_teacher(folder):
    live = dry_run(settings(folder, "dry", model={"config": str(folder / "config.json")}))
    cached = dry_run(settings(folder, "dry", distillation={"cache": str(folder / "few")}))
    assert live.parts[0].teacher_flops > 0 == cached.parts[0].teacher_flops
    assert live.parts[0].student_flops == cached.flops


def test_a_teacher_whose_weight_is_0_is_freed_and_not_built_again(tmp_path, monkeypatch, capsys):
    world = make_world(tmp_path, monkeypatch)
    opened_folders = []
    monkeypatch.setattr(pretraining, "open_described", lambda path: opened_folders.append(path) or open_source(path))
    write_material(tmp_path)
    taught = {"teacher": str(tmp_path / "teacher"), "weight": 0.5, "anneal_steps": 2}
    run = one_number_settings(world, "run", distillation=taught)
    world["on_step"] = stop_at(4)
    assert stoppable(run).stopped
    assert "step 2: the teacher's weight is 0 from here on, and its memory is freed" in capsys.readouterr().out
    assert len(opened_folders) == 1 and world["engines"][0].teacher is None
    world["on_step"] = lambda step, number: number
    assert stoppable(run).position.step == 6
    assert len(opened_folders) == 1, "the resumed run needs no teacher"


def test_entries_come_with_the_labels_as_long_as_the_teacher_counts(tmp_path, monkeypatch, capsys):
    world = make_world(tmp_path, monkeypatch)
    write_material(tmp_path)
    taught = {"teacher": str(tmp_path / "teacher"), "weight": 0.5, "anneal_steps": 2}
    run = one_number_settings(world, "run", distillation=taught)
    write_cache(CacheRequest(run, tmp_path / "cache", 5), lambda done, total: None)
    feed, seen = loop.batches, []

    def watched(*arguments):
        for input_ids, targets in feed(*arguments):
            seen.append(not isinstance(targets, torch.Tensor))
            yield input_ids, targets

    monkeypatch.setattr(loop, "batches", watched)
    cached = one_number_settings(world, "run", distillation=taught | {"cache": str(tmp_path / "cache")})
    world["on_step"] = stop_at(1)
    assert stoppable(cached).stopped and seen == [True] * 2  # two micro-batches a step
    assert f"teacher: 5 of {VOCABULARY} entries from {tmp_path}/cache; FLOPs do not count it" in capsys.readouterr().out
    world["on_step"] = lambda step, number: number
    assert stoppable(cached).position.step == 6
    assert seen == [True] * 4 + [False] * 8
    assert all(engine.teacher is None for engine in world["engines"])
