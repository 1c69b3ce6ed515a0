"""Child processes of test_batch_ramp: runs whose global batch changes, and the same steps as runs of one size each."""

from progressive_runs import content_of, settings_of

from incr_ds.config.fields import merged
from incr_ds.train.distributed import initialize_distributed
from incr_ds.train.pretraining import train_run

RAMP = [{"at_step": 1, "global_batch_size": 8}, {"at_step": 3, "global_batch_size": 4}]
STEPS = 4
CHANGES = {
    "schedule": {"train_steps": STEPS, "learning_rate": 1e-2, "warmup_steps": 2},
    "evaluation": {"interval": 2, "samples": 4},
    "checkpoint": {"interval": 1, "keep_last": 0},
    "report": False,
}


def train_ramp_and_parts(folder, layout):
    """One run with a ramp, the same stopped within it and resumed, and three runs that start from each other."""

    def start(output, **changes):
        content = merged(content_of(folder, output, layout=layout), merged(CHANGES, changes))
        if "initialize_from" in content["model"]:
            content["model"]["config"] = None
        return settings_of(content)

    initialize_distributed(start("x").layout)
    batch = {"ramp": RAMP}
    train_run(start("ramp", batch=batch))
    train_run(start("stopped", batch=batch, schedule={"end_step": 2}))
    train_run(start("stopped", batch=batch))
    checkpoint = train_run(start("part0", schedule={"end_step": 1})).checkpoint
    # start_sample makes up for the samples that a run of one size would have read before its first step.
    for number, (first, last, size, sample) in enumerate([(1, 3, 8, 8 + 4 - 8), (3, 4, 4, 8 + 4 + 16 - 12)], start=1):
        part = {
            "model": {"initialize_from": str(checkpoint)},
            "schedule": {"start_step": first, "end_step": last},
            "batch": {"global_batch_size": size},
            "data": {"start_sample": sample},
        }
        checkpoint = train_run(start(f"part{number}", **part)).checkpoint
