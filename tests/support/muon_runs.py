"""Child processes of test_muon, and the same training by torch alone."""

from pathlib import Path

import torch
from engine_cases import LENGTH, ROWS, micro_batches, student, transformers_model
from progressive_runs import content_of, refusal, settings_of

from incr_ds.config.fields import merged
from incr_ds.testing.runs import pico_run
from incr_ds.train.distributed import initialize_distributed
from incr_ds.train.engine import build_engine
from incr_ds.train.pretraining import train_run

STEPS, RATE, RATIO = 4, 0.01, 3.0
# A large eps keeps AdamW's step a smooth function of the gradient: a wrong gradient shows, rounding does not.
MUON = {
    "name": "muon", "muon": {"learning_rate_ratio": RATIO, "momentum": 0.9}, "eps": 0.03, "weight_decay": 0.2,
    "gradient_clipping": 0.0,
}  # fmt: skip


def run_of(case, **changes):
    layout = {"pipeline_parallel": case.pipeline, "data_parallel": case.data, "zero_stage": case.zero}
    batch = {"sequence_length": LENGTH, "micro_batch_size": ROWS, "global_batch_size": ROWS * case.micro_batches}
    return pico_run(layout=layout, batch=batch, precision=case.precision, optimizer=MUON, **changes)


def train(case):
    """Losses, and this rank's final weights with their bounds."""
    weights = student(case)
    engine = build_engine(run_of(case), weights.architecture, weights, None)
    losses = []
    for step in range(STEPS):
        mine = micro_batches(case.micro_batches, step)[engine.data_parallel_rank :: case.data]
        batches = iter(mine) if engine.reads_data else None
        losses.append(engine.train_step(batches, learning_rate=RATE).loss)
    named = zip(engine.shards, engine.module.parameters(), strict=True)
    values = {(shard.tensor.name, shard.bounds): parameter.detach().clone() for shard, parameter in named}
    engine.close()
    return losses, values


def reference(case):
    """The same by transformers, torch's AdamW, and the published iteration, matrix by matrix, without ZeRO."""
    model = transformers_model(student(case))
    named = dict(model.named_parameters())
    apart = {name for name, value in named.items() if ".layers." in name and value.dim() > 1}
    rest = [value for name, value in named.items() if name not in apart]
    groups = [
        {"params": [value for value in rest if value.dim() > 1], "weight_decay": MUON["weight_decay"]},
        {"params": [value for value in rest if value.dim() == 1], "weight_decay": 0.0},
    ]
    adamw = torch.optim.AdamW(groups, lr=RATE, betas=(0.9, 0.95), eps=MUON["eps"])
    momenta = {name: torch.zeros_like(named[name]) for name in apart}
    losses = []
    for step in range(STEPS):
        model.zero_grad()
        parts = [_loss(model, *batch) for batch in micro_batches(case.micro_batches, step)]
        loss = torch.stack(parts).mean()
        loss.backward()
        adamw.step()
        for name in apart:
            _muon_step(named[name], momenta[name])
        losses.append(loss.item())
    return losses, named


def _loss(model, input_ids, labels):
    logits = model(input_ids).logits.flatten(0, 1)
    return torch.nn.functional.cross_entropy(logits, labels.flatten())


@torch.no_grad()
def _muon_step(parameter, momentum):
    """Jordan et al. (2024), kellerjordan.github.io/posts/muon: Nesterov momentum, five quintic Newton-Schulz iterations."""
    beta, rate = MUON["muon"]["momentum"], RATE * RATIO
    momentum.lerp_(parameter.grad, 1 - beta)
    update = parameter.grad.lerp(momentum, beta)
    tall = update.shape[0] > update.shape[1]
    x = update.T if tall else update
    x = x / (x.norm() + 1e-7)
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    x = (x.T if tall else x) * max(1.0, parameter.shape[0] / parameter.shape[1]) ** 0.5
    parameter.mul_(1 - rate * MUON["weight_decay"]).add_(x, alpha=-rate)


def train_runs(folder, layout):
    """Six steps and the same in two parts, in bf16 with the momentum of a wider and deeper model, and what is refused."""
    folder = Path(folder)

    def start(output, **changes):
        common = {"schedule": {"train_steps": 6}, "layout": layout, "optimizer": MUON}
        return settings_of(content_of(folder, output, **merged(common, changes)))

    initialize_distributed(start("x").layout)
    whole = str(train_run(start("whole")).checkpoint)
    train_run(start("parts", schedule={"end_step": 3}))
    train_run(start("parts"))
    new = {"optimizer": {"new_parameters": {"learning_rate_ratio": 2.0}}, "precision": "bf16"}
    source = {"source": whole, "recipe": str(folder / "rescale.yaml")}
    grown = {**new, "model": {"config": None, "initialize_from": source}}
    train_run(start("grown", **grown))
    train_run(start("grown parts", **merged(grown, {"schedule": {"end_step": 3}})))
    train_run(start("grown parts", **grown))
    # The last three steps as a run of their own, from the checkpoint of the third.
    third = {"model": {"config": None, "initialize_from": str(folder / "parts" / "checkpoints" / "step_00000003")}}
    train_run(start("after", **third, schedule={"start_step": 3}))
    train_run(start("in bf16", **third, schedule={"start_step": 3}, precision="bf16"))
    adamw = {"optimizer": {"name": "adamw", "muon": None}}
    adams = {"source": str(train_run(start("adam", **adamw)).checkpoint), "recipe": str(folder / "rescale.yaml")}
    cases = {
        "adamw": start("x", **third, **adamw),
        "resumed by adamw": start("parts", **adamw),
        "rescale": start("x", model={"config": None, "initialize_from": adams}),
    }
    return {name: refusal(run) for name, run in cases.items()}
