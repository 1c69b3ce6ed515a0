"""A run file that no longer fits its checkpoint: refused with every difference, and nothing is lost."""

import shutil

import pytest
from fault_runs import curve, newest, run_content, train_each, write_material
from token_data import write_random_documents

from incr_ds.testing.memory import SMALL
from incr_ds.testing.processes import run_processes

pytestmark = pytest.mark.slow
SINGLE = {"layout": {"data_parallel": 1, "zero_stage": 1}, "growth": [], "checkpoint": {"interval": 3, "keep_last": 0}}


def content_of(material, output, end=9, **changes):
    schedule = {"train_steps": 9, "end_step": end, "learning_rate": 1e-2, "warmup_steps": 2}
    return run_content(material, output, **{"schedule": schedule, **SINGLE, **changes})


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("changed")
    material = write_material(folder / "material")
    (folder / "other").mkdir()
    write_random_documents(folder / "other", documents=50, length=50)
    (folder / "tokenizer").mkdir()
    last = SMALL["vocab"] - 1
    write_random_documents(folder / "tokenizer", documents=60, length=50, number=lambda tokens: last - tokens)
    runs = [content_of(material, folder / name, end) for name, end in (("base", 6), ("whole", 9))]
    assert run_processes(train_each, 1, runs) == [[None, None]]
    return folder


def changes_of(folder):
    """What is changed, and what the message must name."""
    validation = str(folder / "material" / "x_validation_text_document")
    other, renumbered = (
        {"train": [{"prefix": str(folder / name / "x_train_text_document")}], "validation": validation}
        for name in ("other", "tokenizer")
    )
    batch = {"sequence_length": 16, "micro_batch_size": 1, "global_batch_size": 4}
    return {
        "seed": ({"seed": 6}, "seed: 5 there, 6 in this run file"),
        "sequence length": ({"batch": batch | {"sequence_length": 8}}, "batch.sequence_length: 16 there, 8"),
        "global batch": ({"batch": batch | {"global_batch_size": 2}}, "batch.global_batch_size"),
        "precision": ({"precision": "bf16"}, "precision: fp32 there, bf16"),
        "data": ({"data": other}, "data.train"),
        "the tokenizer of the data": ({"data": renumbered}, "data.train"),
        "multipliers": ({"optimizer": {"multipliers": "none"}}, "optimizer.multipliers"),
        "frozen tensors": (
            {"model": {"config": str(folder / "material" / "config.json"), "freeze": ["*norm*"]}},
            "freeze",
        ),
        "ZeRO stage": ({"layout": {"data_parallel": 1, "zero_stage": 2}}, "zero_stage 1 (this run: 2)"),
        "a growth that was passed": (
            {"growth": [{"at_step": 4, "recipe": str(folder / "material" / "recipe.yaml"), "rewarmup_steps": 1}]},
            "growth.0.at_step: 4, but the run took 6 steps without it",
        ),
    }


@pytest.mark.timeout(600)
def test_changes_on_resume(world, tried):
    changes = changes_of(world)
    runs = []
    for number, (change, _) in enumerate(changes.values()):
        shutil.copytree(world / "base", world / f"copy{number}")
        runs.append(content_of(world / "material", world / f"copy{number}", **change))
    again = [content_of(world / "material", world / f"copy{number}") for number in range(len(changes))]
    (errors,) = run_processes(train_each, 1, [*runs, *again], timeout=300.0)
    for number, (name, (_, said)) in enumerate(changes.items()):
        with tried.case(name):
            assert errors[number] is not None and said in errors[number], errors[number]
            assert errors[len(changes) + number] is None
            assert curve(world / f"copy{number}") == curve(world / "whole")
            assert newest(world / f"copy{number}").name == newest(world / "whole").name
    tried.note = f"{', '.join(changes)}: refused by name, and the unchanged file goes on with the same curve"
