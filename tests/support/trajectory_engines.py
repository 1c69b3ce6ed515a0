"""Child processes of test_trajectory: the source's engine and grown ones, on the same tokens."""

import json
from pathlib import Path

import torch
from resuming_engines import load_own

from incr_ds.arch.multipliers import read_multipliers
from incr_ds.config.fields import parse_settings
from incr_ds.config.training import RunSettings
from incr_ds.testing.memory import drawn_model, model_checkpoint, small_architecture
from incr_ds.train.checkpoints import TrainingState, save_checkpoint
from incr_ds.train.engine import build_engine
from incr_ds.train.metrics import Position
from incr_ds.train.pretraining import load_start
from incr_ds.train.start import find_start

SAMPLES, LENGTH, RATE = 4, 16, 3e-3
BEFORE, AFTER = 5, 40


def run_settings(folder, model, layout, **optimizer):
    content = {
        "output": str(folder),
        "precision": "fp32",
        "model": model,
        "layout": layout,
        "batch": {"sequence_length": LENGTH, "micro_batch_size": 1, "global_batch_size": SAMPLES},
        "schedule": {"train_steps": 100, "learning_rate": RATE},
        # The norm of the gradients grows along, so clipping would set in at another point.
        "optimizer": {"eps": 1e-6, "weight_decay": 0.1, "gradient_clipping": 0.0, **optimizer},
        "data": {"train": [{"prefix": "unused"}]},
        "checkpoint": {"interval": 5},
    }
    return parse_settings(content, RunSettings, "test")


def architecture(tied):
    sizes = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2, "hidden_size": 64}
    return small_architecture("llama", tie_word_embeddings=tied, head_dim=16, **sizes)


def batches(engine, step):
    """Repeated after four steps, so that there is something to learn."""
    ids = torch.randint(101, (SAMPLES, 1, LENGTH + 1), generator=torch.Generator().manual_seed(step % 4))
    mine = ids[engine.data_parallel_rank :: engine._run.layout.data_parallel]
    return iter([(micro[:, :-1].contiguous(), micro[:, 1:].contiguous()) for micro in mine])


def train(engine, steps):
    return [engine.train_step(batches(engine, step), learning_rate=RATE).loss for step in steps]


def train_source(folder, tied, optimizer=None):
    """A few steps, a checkpoint in ``folder``/source, and the steps that the grown models must follow."""
    run = run_settings(folder, {"config": "unused"}, {"data_parallel": 2}, **(optimizer or {}))
    shape = architecture(tied)
    weights = model_checkpoint(shape, drawn_model(shape, torch.float32))
    engine = build_engine(run, shape, weights, None)
    train(engine, range(BEFORE))
    engine.save(Path(folder) / "source", "five", {})
    (Path(folder) / "source" / "latest").write_text("five")
    (Path(folder) / "source" / "config.json").write_text(json.dumps(dict(shape.config)))
    losses = train(engine, range(BEFORE, BEFORE + AFTER))
    engine.close()
    return losses


def follow(folder, model, layout, optimizer=None):
    """Start as a run does, go half the way, save as a run does; returns the losses and the groups' learning rates."""
    run = run_settings(folder, model, layout, **(optimizer or {}))
    start = find_start(run)
    engine = build_engine(run, start.architecture, start.weights, None, start.multipliers)
    load_start(engine, start)
    losses = train(engine, range(BEFORE, BEFORE + AFTER // 2))
    rates = sorted({group["lr"] / RATE for group in engine._engine.optimizer.param_groups})
    state = TrainingState(position=Position(step=25), evaluated_step=-1, data={}, settings=run.model_dump(mode="json"))
    saved = save_checkpoint(engine, run, start.architecture, state, start.multipliers)
    engine.close()
    return losses, rates, str(saved)


def resume(folder, saved, model, layout, optimizer=None):
    """Go on from the checkpoint that ``follow`` saved."""
    run = run_settings(folder, model, layout, **(optimizer or {}))
    shape = find_start(run).architecture
    engine = build_engine(run, shape, None, None, read_multipliers(Path(saved)))
    load_own(engine, run, Path(saved), shape)
    losses = train(engine, range(BEFORE + AFTER // 2, BEFORE + AFTER))
    engine.close()
    return losses
