"""Child processes of test_offload: optimizer states in the host's memory."""

from pathlib import Path

import torch
from engine_cases import micro_batches
from progressive_runs import content_of, settings_of

from incr_ds.config.fields import merged
from incr_ds.testing.pico import pico_architecture
from incr_ds.testing.runs import pico_run
from incr_ds.train.distributed import initialize_distributed
from incr_ds.train.engine import build_engine
from incr_ds.train.pretraining import train_run

HOST = {"optimizer": {"offload": "cpu"}}


def spoil_a_step(zero_stage, optimizer):
    """Three steps, the second with gradients that are not finite. Results, and whether the weights stayed."""
    batch = {"sequence_length": 12, "micro_batch_size": 2, "global_batch_size": 8}
    run = pico_run(layout={"zero_stage": zero_stage}, batch=batch, optimizer=optimizer)
    engine = build_engine(run, pico_architecture(), None, None)
    found = []
    for step in range(3):
        batches = micro_batches(run.accumulation_steps, step)
        if step == 1:
            batches[-1][1][1, 3] = 101  # outside of the vocabulary: the loss is infinite
        before = [parameter.detach().clone() for parameter in engine.module.parameters()]
        result = engine.train_step(iter(batches), learning_rate=0.01)
        found.append((result, all(map(torch.equal, before, engine.module.parameters()))))
    engine.close()
    return found


def train_either_way(folder, layout):
    """Six steps on the device, six on the host, and three of each after three of the other."""
    folder = Path(folder)

    def start(output, **changes):
        return settings_of(
            content_of(folder, output, layout=layout, **merged({"schedule": {"train_steps": 6}}, changes))
        )

    initialize_distributed(start("x").layout)
    half = {"schedule": {"end_step": 3}}
    train_run(start("device"))
    train_run(start("host", **HOST))
    for output, first, second in (("to host", {}, HOST), ("to device", HOST, {}), ("stopped", HOST, HOST)):
        train_run(start(output, **merged(half, first)))
        train_run(start(output, **second))
