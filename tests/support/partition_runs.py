"""Child processes of test_partitioning: how much memory a rank takes while its model is built, and what it trains."""

import ctypes
import threading
import time

import deepspeed
import torch
from engine_cases import pieces

from incr_ds.offline.memory_budget import anonymous_bytes
from incr_ds.testing.checkpoint import drawn_checkpoint
from incr_ds.testing.pico import pico_architecture
from incr_ds.testing.runs import pico_run
from incr_ds.train import engine as engines

LENGTH = 12
M_MMAP_THRESHOLD = -3  # of malloc.h: larger blocks are pages of their own, and the allocator keeps none of them


class Peak:
    """The most anonymous memory above that at the start, while the context is open."""

    def __enter__(self):
        self._start, self.bytes, self._over = anonymous_bytes(), 0, threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self):
        while not self._over.is_set():
            self.bytes = max(self.bytes, anonymous_bytes() - self._start)
            time.sleep(0.001)

    def __exit__(self, *_):
        self._over.set()
        self._thread.join()


def build_both_ways(case, sizes, steps):
    """Build and train with modules that are cut as they are built, and with a model that the engine cuts, by that name."""
    return {name: _trained(case, sizes, steps, early) for name, early in (("early", True), ("late", False))}


def measure_both_ways(case, sizes):
    """The same without a step, after a small model, so that imports are done. Freed memory goes back to the system at once."""
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 1 << 20)
    build_both_ways(case, {}, 1)
    return build_both_ways(case, sizes, 0)


def _trained(case, sizes, steps, early):
    cut, build, peaks = engines._cut_early, engines.build_rank_model, []

    def building(*arguments):
        with Peak() as peak:
            built = build(*arguments)
        peaks.append(peak.bytes)
        return built

    engines.build_rank_model = building
    if not early:
        engines._cut_early = lambda config: None
    try:
        return _run(case, sizes, steps, peaks)
    finally:
        engines._cut_early, engines.build_rank_model = cut, build


def _run(case, sizes, steps, peaks):
    architecture = pico_architecture("llama", tied=case["tied"], **sizes)
    batch = {"sequence_length": LENGTH, "micro_batch_size": 1, "global_batch_size": 4}
    layout = {"data_parallel": 2, "zero_stage": 3, "tensor_parallel": case.get("tensor", 1)}
    run = pico_run(
        layout=layout, batch=batch, precision=case["precision"], model={"config": "pico", "freeze": case["freeze"]}
    )
    weights = drawn_checkpoint(architecture, seed=1) if case["loaded"] else None
    engine = engines.build_engine(run, architecture, weights, None)
    losses = []
    for step in range(steps):
        ids = torch.randint(architecture.sizes["vocab"], (4, LENGTH + 1), generator=torch.Generator().manual_seed(step))
        mine = [(row[None, :-1], row[None, 1:]) for row in ids[engine.data_parallel_rank :: 2]]
        found = engine.train_step(iter(mine), learning_rate=1e-2)
        losses.append((found.loss, found.gradient_norm))
    parameters = list(engine.module.parameters())
    values = {}
    if steps:
        with deepspeed.zero.GatheredParameters(parameters):
            values = pieces(engine.shards, parameters)
    engine.release()
    return {"building": peaks[-1], "losses": losses, "values": values}
