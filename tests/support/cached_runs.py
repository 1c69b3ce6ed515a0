"""Runs with a live and with a cached teacher, as child processes of test_teacher_cache."""

import json
import weakref
from pathlib import Path

import torch
from token_data import write_random_documents

from incr_ds.checkpoint.opening import open_source
from incr_ds.config.fields import merged, parse_settings
from incr_ds.config.training import RunSettings
from incr_ds.errors import IncrError
from incr_ds.testing.memory import drawn_model, small_architecture
from incr_ds.train import loop, pretraining
from incr_ds.train.caching import CacheRequest, CachingTeacher, join_ranks, write_cache
from incr_ds.train.distributed import initialize_distributed
from incr_ds.train.pretraining import train_run
from incr_ds.train.ranks import all_ranks

LENGTH, STEPS, TAUGHT = 16, 6, 5
FIRST_SAMPLE = 8
# Two tensor ranks need an even number of heads.
STUDENT = small_architecture("llama", tie_word_embeddings=True, num_key_value_heads=2)


def write_material(folder):
    """A student's config, data, and a smaller teacher with other weights."""
    write_random_documents(folder, documents=30, length=50)
    (folder / "config.json").write_text(json.dumps(dict(STUDENT.config)))
    for name, layers in (("teacher", 2), ("other_teacher", 1)):
        sizes = {"hidden_size": 48, "num_hidden_layers": layers, "num_key_value_heads": 2, "initializer_range": 0.5}
        drawn_model(small_architecture("llama", **sizes), torch.float32).save_pretrained(folder / name)


def settings(folder, output, **changes):
    """A run of 6 steps; its teacher counts in the first 5. ``changes`` are merged section by section."""
    folder = Path(folder)
    content = {
        "output": str(folder / output),
        "seed": 5,
        "precision": "fp32",
        "model": {"config": str(folder / "config.json")},
        "batch": {"sequence_length": LENGTH, "micro_batch_size": 1, "global_batch_size": 4},
        "schedule": {"train_steps": STEPS, "learning_rate": 1e-2, "warmup_steps": 2},
        "optimizer": {"eps": 1e-2},  # a step is then a smooth function of the gradient
        "data": {"train": [{"prefix": str(folder / "x_train_text_document")}], "start_sample": FIRST_SAMPLE},
        "checkpoint": {"interval": 3, "keep_last": 0},
        "distillation": {
            "teacher": str(folder / "teacher"),
            "weight": 0.5,
            "anneal_steps": TAUGHT,
            "temperature": 1.5,
        },
        "log_interval": 1,
        "tensorboard": False,
        "report": False,
    }
    return parse_settings(merged(content, changes), RunSettings, "test")


def train_all(folder, cases):
    """Train each case, by name. Returns whether each built a teacher, and whether that was gone after its last step."""
    found, teachers = {}, []
    build, weigh = pretraining.build_engine, loop._teaching

    def building(run, architecture, weights, teacher, *rest):
        engine = build(run, architecture, weights, teacher, *rest)
        held = getattr(engine._runner, "_teacher", None) or getattr(engine.module, "_teacher", None)
        teachers.append(None if held is None else weakref.ref(held))
        return engine

    def weighing(job, step):
        weights = weigh(job, step)
        if teachers[-1] is not None:
            assert (teachers[-1]() is None) == (weights[0] == 0)
        return weights

    pretraining.build_engine, loop._teaching = building, weighing
    for name, changes in cases.items():
        run = settings(folder, name, **changes)
        initialize_distributed(run.layout)
        train_run(run)
        found[name] = teachers[-1] is not None
    return found


def write_together(folder, requests):
    """Write caches, (top_k, stored) by name, on all ranks together. Returns the elements of the teacher that this rank holds."""
    join_ranks()
    run = settings(folder, "writing")
    for name, (top_k, stored) in requests.items():
        found = write_cache(CacheRequest(run, Path(folder) / name, top_k, stored, 6), lambda done, total: None)
        assert found.resumed_shards == 0
    teacher = CachingTeacher(run, open_source(Path(run.distillation.teacher)), all_ranks())
    return sum(parameter.numel() for parameter in teacher._teacher._model.parameters())


def refused_together(folder, name, top_k, **changes):
    """What a rank says about a request that cannot be met."""
    join_ranks()
    try:
        write_cache(
            CacheRequest(settings(folder, "writing", **changes), Path(folder) / name, top_k), lambda done, total: None
        )
    except IncrError as error:
        return str(error)
