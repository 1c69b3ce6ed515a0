"""Output folders of training runs, as they are on disk, without training."""

import json

from incr_ds.checkpoint.publish import publish
from incr_ds.report.history import note_end, note_start
from incr_ds.testing.memory import small_architecture
from incr_ds.testing.runs import pico_run
from incr_ds.train.metrics import EvaluationRow, GrowthRow, MetricsFile, Position, TrainRow, row


def train_row(loss, **changes):
    values = {
        "loss": loss, "ce": loss, "divergence": None, "alpha": 0.0, "temperature": 1.0, "learning_rate": 1e-3,
        "gradient_norm": 1.5, "skipped": False, "tokens_per_second": 1000.0, "tflops_per_rank": 0.5, "mfu": None,
        "seconds": 2.0, "data_seconds": 0.25, "save_seconds": 0.5, "memory_bytes": 10**9, "peak_memory_bytes": 2 * 10**9,
    }  # fmt: skip
    return TrainRow(**(values | changes))


def held_out(loss, teacher_kl=None):
    return EvaluationRow(loss=loss, perplexity=2.0, bits_per_byte=loss / 3, teacher_kl=teacher_kl, seconds=1.0)


def growth(recipe="deep.yaml"):
    return GrowthRow(recipe=recipe, parameters_before=1000, parameters=2500, function_preserving=True, seconds=1.5)


def write_metrics(folder, rows):
    """``rows`` are (step, values) or (step, values, further keys of the row)."""
    metrics, stage = MetricsFile(folder, None), 0
    for step, values, *more in rows:
        stage += isinstance(values, GrowthRow)
        position = Position(step=step, consumed_samples=4 * step, tokens=100 * step, flops=1e6 * step, stage=stage)
        metrics.append(row(position, values) | (more[0] if more else {}))
    metrics.close()
    return folder


def losses(*values, start=1):
    return [(number, train_row(value)) for number, value in enumerate(values, start=start)]


def write_settings(folder, **sections):
    note_start(folder, pico_run(output=str(folder), **sections).model_dump(mode="json"))


def write_checkpoint(folder, step, **sections):
    """A published checkpoint without tensors: its config and its manifest."""
    facts = {
        "layout": {}, "tag": "t", "evaluated_step": -1, "data": {"corpus": "f" * 64},
        "position": {"step": step, "tokens": 100 * step, "flops": 1e6 * step, "stage": 0},
        "settings": pico_run(output=str(folder), **sections).model_dump(mode="json"),
    }  # fmt: skip
    final = folder / "checkpoints" / f"step_{step:08d}"
    final.parent.mkdir(parents=True, exist_ok=True)
    with publish(final, "deepspeed training checkpoint", facts) as made:
        (made / "config.json").write_text(json.dumps(dict(small_architecture("llama").config)))
    return final


def finished_run(folder, values=(4.0, 3.0, 2.5, 2.25), **sections):
    """A run of four steps that was evaluated on two validation sets, with a checkpoint at its end."""
    rows = losses(*values)
    rows.insert(0, (0, held_out(4.5), {"validation_loss/code": 4.0, "validation_loss/prose": 5.0}))
    rows.append((len(values), held_out(2.5), {"validation_loss/code": 2.0, "validation_loss/prose": 3.0}))
    write_metrics(folder, rows)
    write_settings(folder, **sections)
    write_checkpoint(folder, len(values), **sections)
    note_end(folder, f"finished after step {len(values)}")
    return folder
