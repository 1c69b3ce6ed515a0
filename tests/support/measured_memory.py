"""Child process of test_predicted_memory: what engines of several layouts really hold after a step, and save."""

from dataclasses import dataclass
from pathlib import Path

import torch
from engine_cases import micro_batches

from incr_ds.launch import deepspeed_config as settings
from incr_ds.testing.checkpoint import drawn_checkpoint
from incr_ds.testing.pico import pico_architecture
from incr_ds.testing.runs import pico_run
from incr_ds.train import engine as engines

ROWS, LENGTH, THRESHOLD = 2, 12, 5000  # ZeRO-3 keeps norms whole and spreads matrices


@dataclass(frozen=True)
class Layout:
    zero: int
    precision: str
    data: int = 1
    pipeline: int = 1
    tensor: int = 1
    tied: bool = False
    offload: str = "none"
    muon: bool = False


def architecture_of(case):
    """About 1.1 million parameters, so that padding and fixed parts of files are small beside them."""
    sizes = {
        "hidden_size": 128,
        "intermediate_size": 360,
        "num_hidden_layers": 5,
        "num_attention_heads": 4,
        "head_dim": 32,
    }
    return pico_architecture("llama", tied=case.tied, vocab_size=502, num_key_value_heads=2, **sizes)


def run_of(case, folder=None):
    """The case's run. With a ``folder``, the DeepSpeed JSON and the run's output are written there."""
    batch = {"sequence_length": LENGTH, "micro_batch_size": ROWS, "global_batch_size": ROWS * case.data * 2}
    layout = {"tensor_parallel": case.tensor, "pipeline_parallel": case.pipeline, "data_parallel": case.data}
    optimizer = {"name": "muon", "gradient_clipping": 0.0} if case.muon else {"offload": case.offload}
    changes = {} if folder is None else {"deepspeed": str(Path(folder) / "deepspeed.json")}
    return pico_run(
        layout={**layout, "zero_stage": case.zero},
        batch=batch,
        precision=case.precision,
        optimizer=optimizer,
        **changes,
    )


def measure(folder, cases):
    """Bytes by name: of weights, masters and moments on this rank, and of the files that all ranks saved, with their number."""
    return {name: _measure(Path(folder), name, case) for name, case in cases.items()}


def _measure(folder, name, case):
    run, weights = run_of(case, folder), drawn_checkpoint(architecture_of(case), seed=1)
    built = _build(run, weights, case)
    mine = micro_batches(2 * case.data, 0)[built.data_parallel_rank :: case.data]
    batches = iter(mine) if built.reads_data else None
    built._runner.train(batches, 0.0, 1.0)  # the engine's own step needs the gradient norm, which ZeRO-0 has not
    found = held(built)
    if case.zero:
        built.save(folder / name, "tag", {})
        torch.distributed.barrier()
    files = [path for path in (folder / name).rglob("*") if path.is_file()]
    built.release()
    return {**found, "saved": sum(path.stat().st_size for path in files), "files": len(files)}


def _build(run, weights, case):
    """Build the engine; ZeRO-0, which training refuses, by the config of ZeRO-1 with the stage changed."""
    if case.zero:
        return engines.build_engine(run, weights.architecture, weights, None)
    staged = run.model_copy(update={"layout": run.layout.model_copy(update={"zero_stage": 1})})
    config = settings.deepspeed_config(staged)
    config["zero_optimization"]["stage"] = 0
    original, engines.deepspeed_config = engines.deepspeed_config, lambda _: config
    try:
        return engines.build_engine(run, weights.architecture, weights, None)
    finally:
        engines.deepspeed_config = original


def held(built):
    """Bytes of weights, masters and moments, every storage counted once."""
    wrapped = built._engine.optimizer
    optimizer = getattr(wrapped, "optimizer", wrapped)
    weights = {}
    for parameter in built.module.parameters():
        _note(weights, parameter.data)
        if hasattr(parameter, "ds_tensor"):
            _note(weights, parameter.ds_tensor)
    masters, moments = {}, {}
    for master, state in optimizer.state.items():  # after a step, ZeRO-3's parameter groups are empty
        _note(masters, master)
        for name in {"exp_avg", "exp_avg_sq", "momentum_buffer"} & state.keys():
            _note(moments, state[name])
    own = {place: size for place, size in masters.items() if place not in weights}
    return {"weights": sum(weights.values()), "masters": sum(own.values()), "moments": sum(moments.values())}


def _note(storages, tensor):
    storage = tensor.untyped_storage()
    storages[storage.data_ptr()] = storage.nbytes()
