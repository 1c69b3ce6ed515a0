"""Runs that resume on another layout, against the run that was not interrupted."""

import pytest
from progressive_runs import growth
from resharding_runs import begin_from, killed_leg, run_all, run_group
from test_progressive import numbers, rows_of, write_material

from incr_ds.arch.multipliers import read_multipliers
from incr_ds.checkpoint.publish import read_manifest
from incr_ds.config.layout import ParallelLayout
from incr_ds.testing.memory import drawn_model, small_architecture
from incr_ds.testing.processes import ProcessError, run_processes

DP2 = {"data_parallel": 2, "zero_stage": 1}
PP2 = {"pipeline_parallel": 2}
TP2 = {"tensor_parallel": 2}
ZERO2 = {"data_parallel": 2, "zero_stage": 2}
ZERO3 = {"data_parallel": 2, "zero_stage": 3}
RESHARD = {"resume": {"reshard": True}}
BASE = {
    "schedule": {"train_steps": 8, "learning_rate": 3e-3, "warmup_steps": 2},
    "checkpoint": {"interval": 2, "keep_last": 0},
    "evaluation": {"interval": 3, "samples": 8},
}


def write_all(folder):
    write_material(folder)
    teacher = drawn_model(small_architecture("llama", hidden_size=48, num_hidden_layers=2, num_key_value_heads=2))
    teacher.float().save_pretrained(folder / "teacher")


def taught(folder):
    return BASE | {
        "distillation": {"teacher": str(folder / "teacher"), "weight": 0.5, "anneal_steps": 7, "temperature": 1.5}
    }


def leg(base, layout, source=None, step=None, **changes):
    found = {"changes": base | {"layout": layout} | changes, "source": source, "step": step}
    if source:
        found["changes"] = RESHARD | found["changes"]
    return found


def assert_continues(folder, name, whole, from_step, read):
    """The rows of ``name`` are those of the uninterrupted run ``whole``, and the data after ``from_step`` the same."""
    rel = 1e-4 if "bf16" in name else 1e-5  # what bf16 sums of gradients leave between ZeRO-1 and ZeRO-3
    mine, theirs = rows_of(folder / name), rows_of(folder / whole)
    assert [item["step"] for item in mine] == [item["step"] for item in theirs]
    for one, two in zip(mine, theirs, strict=True):
        exact = {
            "step",
            "consumed_samples",
            "tokens",
            "flops",
            "stage",
            "learning_rate",
            "alpha",
            "temperature",
            "kind",
        }
        assert {key: one.get(key) for key in exact} == {key: two.get(key) for key in exact}
        norms = [item.pop("gradient_norm", 0.0) for item in (one, two)]  # a bf16 engine's own is rounded
        assert norms[0] == pytest.approx(norms[1], rel=5e-3 if "bf16" in name else rel)
        assert numbers(one) == pytest.approx(numbers(two), rel=rel, abs=1e-9), (name, one, two)
    assert read == list(range(8 + 4 * from_step, 8 + 4 * 8))  # data.start_sample is 8


def assert_resharded(results, folder, name, whole, step, layouts):
    assert "error" not in results[name], results[name]
    assert results[name]["differences"] == [[]]  # masters, moments, step, counters and frozen tensors, bit for bit
    assert_continues(folder, name, whole, step, results[name]["read"])
    (line,) = (text for text in results[name]["lines"] if "resumed from" in text)
    assert f"checkpoints/step_0000000{step}, step {step}, resharded from {layouts}" in line


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """One group of two processes, then one process alone: every leg begins where another run was stopped."""
    folder = tmp_path_factory.mktemp("resharding")
    write_all(folder)
    base, frozen = taught(folder), {"model": {"freeze": ["model.layers.1.mlp.*"]}}
    plain = BASE | {"precision": "bf16"} | frozen
    results = run_group(folder, 2, {
        "whole": leg(base, DP2),
        "pipeline": leg(base, PP2, "whole", 4, batch={"micro_batch_size": 2}),
        "tensor": leg(base, TP2, "pipeline", 6),
        "zero3": leg(base, ZERO3, "whole", 4),
        "bf16": leg(plain, DP2),
        "bf16-zero3": leg(plain, ZERO3, "bf16", 4),
        "refused": leg(base, PP2, "whole", 4, resume={"reshard": False}),
        "other-batch": leg(base, PP2, "whole", 4, batch={"global_batch_size": 8}),
        "other-seed": leg(base, PP2, "whole", 4, seed=6),
    })  # fmt: skip
    return folder, results | run_group(folder, 1, {"alone": leg(base, {}, "whole", 4)})


LEGS = {
    "pipeline": ("whole", 4, "tp1 pp1 dp2 zero1 to tp1 pp2 dp1 zero1"),
    "tensor": ("whole", 6, "tp1 pp2 dp1 zero1 to tp2 pp1 dp1 zero1"),
    "zero3": ("whole", 4, "tp1 pp1 dp2 zero1 to tp1 pp1 dp2 zero3"),
    "alone": ("whole", 4, "tp1 pp1 dp2 zero1 to tp1 pp1 dp1 zero1"),
    "bf16-zero3": ("bf16", 4, "tp1 pp1 dp2 zero1 to tp1 pp1 dp2 zero3"),
}


@pytest.mark.parametrize("name", LEGS)
def test_a_run_goes_on_in_another_layout(results, name):
    folder, found = results
    assert_resharded(found, folder, name, *LEGS[name])


REFUSALS = {
    "refused": (
        "LayoutError",
        "step_00000004: laid out for pipeline_parallel 1 (this run: 2), data_parallel 2 (this run: 1); its files are "
        "loaded as they are only in their own layout. Set resume.reshard: true,",
    ),
    "other-batch": ("ConfigError", "batch.global_batch_size: 4 there, 8 in this run file"),
    "other-seed": ("ConfigError", "seed: 5 there, 6 in this run file"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_what_would_not_be_the_same_run_is_refused_and_nothing_is_saved(results, name):
    folder, found = results
    kind, text = REFUSALS[name]
    assert found[name]["error"] == kind and text in found[name]["text"]
    assert [path.name for path in (folder / name / "checkpoints").iterdir()] == ["step_00000004"]
    assert (folder / name / "metrics.jsonl").read_text() == (folder / "whole" / "metrics.jsonl").read_text()


@pytest.mark.parametrize("kills", [(7,), pytest.param((5, 7), marks=pytest.mark.slow)])
def test_a_run_that_is_killed_after_resharding_goes_on_in_its_new_layout(results, kills):
    folder, found = results
    name, base = f"killed{len(kills)}", taught(folder) | {"layout": {}}
    begin_from(folder / "whole", folder / name, 4)
    for step in kills:
        with pytest.raises(ProcessError, match="ended without a result; it was killed"):
            run_processes(killed_leg, 1, str(folder), name, base | RESHARD, step)
    layout = read_manifest(folder / name / "checkpoints" / "step_00000006")["facts"]["layout"]
    assert layout["data_parallel"] == 1
    lines = run_group(folder, 1, {name: {"changes": base}})[name]["lines"]  # without the key
    assert any("step_00000006, step 6; changed settings: resume.reshard: True -> False" in line for line in lines)
    assert rows_of(folder / name) == rows_of(folder / "alone")


MUON = {"name": "muon", "muon": {"learning_rate_ratio": 3.0}, "gradient_clipping": 0.0}
MUON_LEGS = {
    "muon-pipeline": ("muon", 4, "tp1 pp1 dp2 zero1 to tp1 pp2 dp1 zero1"),
    "muon-zero2": ("muon-pipeline", 6, "tp1 pp2 dp1 zero1 to tp1 pp1 dp2 zero2"),
    "muon-alone": ("muon", 4, "tp1 pp1 dp2 zero1 to tp1 pp1 dp1 zero1"),
}


@pytest.mark.slow
def test_muons_momentum_goes_on_in_another_layout(tmp_path):
    write_all(tmp_path)
    base = taught(tmp_path) | {"optimizer": MUON, "model": {"freeze": ["model.layers.1.mlp.*"]}}
    results = run_group(tmp_path, 2, {
        "muon": leg(base, DP2),
        "muon-pipeline": leg(base, PP2, "muon", 4, batch={"micro_batch_size": 2}),
        "muon-zero2": leg(base, ZERO2, "muon-pipeline", 6),
    })  # fmt: skip
    results |= run_group(tmp_path, 1, {"muon-alone": leg(base, {}, "muon", 4)})
    for name, (source, step, layouts) in MUON_LEGS.items():
        assert_resharded(results, tmp_path, name, "muon", step, layouts)
        assert (tmp_path / source / f"checkpoints/step_{step:08d}").is_dir()


FOUR = {
    "dp4": {"data_parallel": 4, "zero_stage": 2},
    "pp2-dp2": {"pipeline_parallel": 2, "data_parallel": 2},
    "tp2-pp2": {"tensor_parallel": 2, "pipeline_parallel": 2},
    "tp2-dp2": {"tensor_parallel": 2, "data_parallel": 2, "zero_stage": 3},
}
# From which run, after which step, to which layout.
STOPS = {
    "one": ("dp4", 2, "pp2-dp2"),
    "two": ("one", 4, "tp2-pp2"),
    "three": ("two", 6, "tp2-dp2"),
    "four": ("dp4", 4, "tp2-dp2"),
    "five": ("four", 6, "dp4"),
}


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_layouts_of_four_processes_follow_each_other(tmp_path):
    write_all(tmp_path)
    base = taught(tmp_path) | {"model": {"freeze": ["model.layers.1.self_attn.*"]}}
    legs = {name: leg(base, FOUR[layout], source, step) for name, (source, step, layout) in STOPS.items()}
    results = run_processes(run_all, 4, str(tmp_path), {"dp4": leg(base, FOUR["dp4"]), **legs}, timeout=700.0)[0]
    results |= run_group(tmp_path, 2, {"six": leg(base, TP2, "one", 6)})
    for name, (source, step, layout) in {**STOPS, "six": ("one", 6, "tp2")}.items():
        before = ParallelLayout(**FOUR[source if source in FOUR else STOPS[source][2]])
        after = ParallelLayout(**(TP2 if layout == "tp2" else FOUR[layout]))
        assert_resharded(results, tmp_path, name, "dp4", step, f"{before} to {after}")


@pytest.mark.slow
def test_every_stage_of_a_run_that_grows_goes_on_in_another_layout(tmp_path):
    """Before the growth, at the growth and after it, each stage in a layout of its own, with learning-rate multipliers."""
    write_all(tmp_path)
    base = BASE | {"distillation": {"teacher": "before-growth", "weight": 0.5, "anneal_steps": 3}}
    grown, other = growth(tmp_path), growth(tmp_path, layout=ZERO3)
    results = run_group(tmp_path, 2, {
        "whole": leg(base, DP2, growth=grown),
        "before": leg(base, PP2, "whole", 2, growth=other),
        "at": leg(base, PP2, "whole", 4, growth=other) | {"compare": False},
        "after": leg(base, DP2, "whole", 6, growth=growth(tmp_path, layout=PP2)) | {"needs": [4]},
    })  # fmt: skip
    for name, step in (("before", 2), ("at", 4), ("after", 6)):
        assert "error" not in results[name], results[name]
        assert_continues(tmp_path, name, "whole", step, results[name]["read"])
    assert results["before"]["differences"] == results["after"]["differences"] == [[]]
    assert any(
        "step 2, resharded from tp1 pp1 dp2 zero1 to tp1 pp2 dp1 zero1" in line for line in results["before"]["lines"]
    )
    assert any(
        "step 6, resharded from tp1 pp1 dp2 zero1 to tp1 pp2 dp1 zero1" in line for line in results["after"]["lines"]
    )
    for name, stage1 in (("before", ZERO3), ("at", ZERO3), ("after", {"pipeline_parallel": 2})):
        saved = tmp_path / name / "checkpoints" / "step_00000008"
        assert read_manifest(saved)["facts"]["layout"] == ParallelLayout(**stage1).model_dump()
        assert read_multipliers(saved) == read_multipliers(tmp_path / "whole" / "checkpoints" / "step_00000008") != {}
