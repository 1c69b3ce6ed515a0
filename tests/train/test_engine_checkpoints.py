"""Saving and loading: a resumed run is the uninterrupted one, bit for bit; a checkpoint of another run is refused."""

import re

import pytest
import torch
import torch.distributed as dist
from torch.utils._pytree import tree_flatten

from incr_ds.checkpoint.publish import hash_file
from incr_ds.config.layout import ParallelLayout
from incr_ds.errors import CheckpointError, IncrError, LayoutError
from incr_ds.testing.checkpoint import drawn_checkpoint
from incr_ds.testing.pico import pico_architecture
from incr_ds.testing.processes import run_processes
from incr_ds.testing.runs import pico_run
from incr_ds.train.checkpoint_layout import check_checkpoint_layout
from incr_ds.train.ranks import on_every_rank
from incr_ds.train.writer import install_writer

STATE = {"consumed_samples": 8, "note": "second step"}


def batches(engine, step, run):
    generator = torch.Generator().manual_seed(step)
    count = run.accumulation_steps * run.layout.data_parallel
    ids = torch.randint(0, 101, (count, 2, 13), generator=generator)
    mine = ids[engine.data_parallel_rank :: run.layout.data_parallel]
    return iter([(micro[:, :-1].contiguous(), micro[:, 1:].contiguous()) for micro in mine])


def start(layout, **sections):
    from incr_ds.train.engine import build_engine

    run = pico_run(layout=layout, distillation={"teacher": "pico", "anneal_steps": 4}, **sections)
    architecture = pico_architecture("qwen3", tied=True, num_key_value_heads=2)
    guide = drawn_checkpoint(pico_architecture("llama", num_hidden_layers=2, num_key_value_heads=2))
    return run, build_engine(run, architecture, None, guide)


def steps(engine, run, numbers):
    return [
        engine.train_step(batches(engine, number, run), learning_rate=0.01 * (number + 1), alpha=0.5, temperature=2.0)
        for number in numbers
    ]


def weights(engine):
    return [parameter.detach().clone() for parameter in engine.module.parameters()]


def uninterrupted(layout, folder, sections):
    run, engine = start(layout, **sections)
    first = steps(engine, run, [0, 1])
    save_at_once(engine, folder / "at once")
    failures = [fail_on_one_rank(engine, folder) for _ in range(2)]
    if "checkpoint" in sections:
        engine._writer.save(STATE, "/dev/full")  # left by a save that another rank gave up
    engine.save(folder, "step_2", STATE)
    engine.evaluate(batches(engine, 50, run), 1)
    rest = steps(engine, run, [2, 3])
    digests = engine.finish_save()
    result = first, rest, weights(engine), failures, digests
    engine.close()
    return result


def save_at_once(engine, folder):
    """Save what a save in the background must save too."""
    background, engine._writer = engine._writer, install_writer(engine._engine, background=False)
    engine.save(folder, "step_2", STATE)
    engine._writer = engine._engine.checkpoint_engine = background
    dist.barrier()


def fail_on_one_rank(engine, folder):
    """What this rank gets from a save in which one rank's optimizer file cannot be written."""
    wall = folder / "wall"
    taken = wall / "torn" / max(path.name for path in (folder / "at once").rglob("*optim_states.pt"))
    taken.mkdir(parents=True, exist_ok=True)
    try:
        on_every_rank(lambda: saved(engine, wall), "saving failed", "Make room.")
    except CheckpointError as error:
        return str(error)


def saved(engine, folder):
    engine.save(folder, "torn", STATE)
    engine.finish_save()


def resumed(layout, folder, sections):
    run, engine = start(layout, **sections)
    state = engine.load(folder, "step_2")
    rest = steps(engine, run, [2, 3])
    result = state, rest, weights(engine)
    engine.close()
    return result


BACKGROUND = {"checkpoint": {"interval": 1, "background": True}}
TP2_PP2 = {"tensor_parallel": 2, "pipeline_parallel": 2}
RUNS = [
    pytest.param({"pipeline_parallel": 2}, BACKGROUND, id="pipeline, fp32, saved in the background"),
    pytest.param({"data_parallel": 2}, {"precision": "bf16"}, id="plain ZeRO-1 DP2, bf16"),
    pytest.param({"tensor_parallel": 2}, {}, id="plain ZeRO-1 TP2, fp32", marks=pytest.mark.slow),
    pytest.param({"data_parallel": 2, "zero_stage": 3}, BACKGROUND, id="plain ZeRO-3 DP2, fp32, in the background"),
    pytest.param(TP2_PP2, {"precision": "bf16"}, id="TP2 x PP2, bf16", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("layout", "sections"), RUNS)
def test_resumed_equals_uninterrupted_bit_for_bit(layout, sections, tmp_path):
    sections = {**sections, "batch": {"sequence_length": 12, "micro_batch_size": 2, "global_batch_size": 8}}
    world = ParallelLayout(**layout).world_size
    whole = run_processes(uninterrupted, world, layout, tmp_path, sections)
    assert not (tmp_path / "latest").exists(), "only our own commit may name the newest checkpoint"
    check_failures([failures for *_, failures, _ in whole])
    check_digests(tmp_path, {path: digest for *_, digests in whole for path, digest in digests.items()}, sections)
    for rank, (state, rest, values) in enumerate(run_processes(resumed, world, layout, tmp_path, sections)):
        _, expected, expected_values, *_ = whole[rank]
        assert {key: state[key] for key in STATE} == STATE
        assert rest == expected
        assert all(torch.equal(*pair) for pair in zip(values, expected_values, strict=True))


def check_failures(failures):
    """Every rank learns of the failure, both times, and none waits for the others for ever."""
    assert all(re.match(r"(rank \d of \d: )?saving failed: .*torn", text) for texts in failures for text in texts), (
        failures
    )
    assert len(failures) > 1 and all(len(texts) == 2 for texts in failures)


def check_digests(folder, digests, sections):
    if "checkpoint" not in sections:
        assert digests == {}
        return
    files = {path for path in (folder / "step_2").iterdir() if path.suffix == ".pt"}
    assert set(digests) == files
    for path, digest in digests.items():
        assert digest == {"bytes": path.stat().st_size, "xxh3": hash_file(path)}
        assert contents(path) == contents(folder / "at once" / "step_2" / path.name), path


def contents(path):
    """Tensors as lists and objects as text, so that both can be compared. Whether a tensor wants a gradient does not matter."""
    values, form = tree_flatten(torch.load(path, weights_only=False))
    return form, [value.tolist() if isinstance(value, torch.Tensor) else str(value) for value in values]


def save_one(folder):
    run, engine = start({})
    before = steps(engine, run, [0, 1])
    engine.save(folder, "step_2", STATE)
    engine.close()
    return before


def load_with_other_settings(folder):
    """The optimizer's settings after loading into a run with others, and the weights."""
    optimizer = {"betas": [0.7, 0.8], "eps": 1e-6, "weight_decay": 0.3}
    run, engine = start({}, optimizer=optimizer)
    engine.load(folder, "step_2")
    groups = [{key: group[key] for key in optimizer} for group in engine._engine.optimizer.param_groups]
    loaded = weights(engine)
    engine.close()
    return groups, loaded


def refuse(folder, layout, changes):
    """The message that building an engine of this layout and loading ends with."""
    from incr_ds.train.engine import build_engine

    run = pico_run(layout=layout, **changes)
    guide = drawn_checkpoint(pico_architecture("llama", vocab_size=99))
    try:
        engine = build_engine(run, pico_architecture("qwen3"), None, guide if run.distillation else None)
        engine.load(folder, "step_2")
    except IncrError as error:
        return type(error).__name__, str(error)
    return None


def test_the_run_file_overrides_the_optimizer_settings_of_a_checkpoint(tmp_path):
    run_processes(save_one, 1, tmp_path)
    ((groups, values),) = run_processes(load_with_other_settings, 1, tmp_path)
    assert groups == [
        {"betas": (0.7, 0.8), "eps": 1e-6, "weight_decay": 0.3},
        {"betas": (0.7, 0.8), "eps": 1e-6, "weight_decay": 0.0},
    ]
    saved = torch.load(tmp_path / "step_2" / "mp_rank_00_model_states.pt", weights_only=False)["module"]
    names = [name for name in saved if name != "lm_head.weight"]
    assert names[0] == "model.embed_tokens.weight" and len(names) == len(values)
    assert all(torch.equal(saved[name], value) for name, value in zip(names, values, strict=True))


REFUSALS = [
    ({"data_parallel": 2}, {}, "ConfigError", r"data_parallel 2 needs 2 processes, but 1 were started"),
    ({"zero_stage": 0}, {}, "ConfigError", r"zero_stage 0: training needs 1, 2 or 3.*zero_stage 1 computes the same"),
    ({"zero_stage": 3}, {}, "LayoutError", r"step_2: written with another layout: zero_format 1 or 2 \(this run: 3\)"),
    ({}, {"distillation": {"teacher": "t", "anneal_steps": 1}}, "ConfigError", "vocabulary has 99 entries"),
]


@pytest.mark.parametrize(("layout", "changes", "kind", "text"), REFUSALS)
def test_what_does_not_fit_is_refused(layout, changes, kind, text, tmp_path):
    (tmp_path / "step_2").mkdir()
    for name in ("mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_optim_states.pt"):
        (tmp_path / "step_2" / name).touch()
    ((found, message),) = run_processes(refuse, 1, tmp_path, layout, changes)
    assert found == kind and re.search(text, message, re.DOTALL), message


class TestLayoutOfACheckpoint:
    def folder(self, path, *names):
        for name in names:
            (path / name).touch()
        return path

    def test_of_a_pipeline_with_tensor_and_data_ranks(self, tmp_path):
        models = [f"mp_rank_0{rank}_model_states.pt" for rank in range(4)]
        shards = [f"bf16_zero_pp_rank_{d}_mp_rank_0{m}_optim_states.pt" for d in range(2) for m in range(4)]
        layers = [f"layer_0{layer}-model_0{rank}-model_states.pt" for layer in range(6) for rank in range(2)]
        folder = self.folder(tmp_path, *models, *shards, *layers)
        check_checkpoint_layout(folder, ParallelLayout(tensor_parallel=2, pipeline_parallel=2, data_parallel=2))
        with pytest.raises(LayoutError, match=r"pipeline_parallel 2 \(this run: 1\), data_parallel 2 \(this run: 1\)"):
            check_checkpoint_layout(folder, ParallelLayout(tensor_parallel=2))

    def test_of_a_pipeline_is_not_that_of_tensor_ranks(self, tmp_path):
        names = [f"mp_rank_0{rank}_model_states.pt" for rank in range(2)]
        shards = [f"zero_pp_rank_0_mp_rank_0{rank}_optim_states.pt" for rank in range(2)]
        with pytest.raises(
            LayoutError, match=r"tensor_parallel 2 \(this run: 1\), pipeline_parallel 1 \(this run: 2\)"
        ):
            check_checkpoint_layout(self.folder(tmp_path, *names, *shards), ParallelLayout(pipeline_parallel=2))

    def test_needs_a_checkpoint(self, tmp_path):
        with pytest.raises(CheckpointError, match="no such checkpoint folder"):
            check_checkpoint_layout(tmp_path / "absent", ParallelLayout())
        with pytest.raises(CheckpointError, match="expected a checkpoint that DeepSpeed or"):
            check_checkpoint_layout(self.folder(tmp_path, "model.safetensors"), ParallelLayout())
