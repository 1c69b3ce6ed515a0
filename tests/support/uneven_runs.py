"""Child processes of test_uneven_stages: runs whose pipeline stages have unlike numbers of layers."""

from pathlib import Path

from progressive_runs import content_of, refusal, settings_of

from incr_ds.config.fields import merged
from incr_ds.offline.plan import GrowthRequest, plan_request
from incr_ds.offline.run import grow_checkpoint
from incr_ds.train.distributed import initialize_distributed
from incr_ds.train.pretraining import train_run
from incr_ds.train.ranks import on_rank_zero

UNEVEN, EVEN = ({"pipeline_parallel": 2, **stages} for stages in ({"stages": [1, 2]}, {}))
PLAIN = {
    "schedule": {"train_steps": 4, "warmup_steps": 0},
    "checkpoint": {"interval": 2},
    "evaluation": {"interval": 2},
}


def train_everything(folder):
    """Returns what was refused, by name."""
    folder = Path(folder)

    def start(output, layout, **changes):
        return settings_of(content_of(folder, output, layout=layout, **merged(PLAIN, changes)))

    initialize_distributed(start("x", EVEN).layout)
    half, reshard = {"schedule": {"end_step": 2}}, {"resume": {"reshard": True}}
    train_run(start("even", EVEN))
    whole = str(train_run(start("uneven", UNEVEN)).checkpoint)
    for output, first, second, changes in (
        ("stopped", UNEVEN, UNEVEN, {}),
        ("to even", UNEVEN, EVEN, reshard),
        ("to uneven", EVEN, UNEVEN, reshard),
    ):
        train_run(start(output, first, **half))
        train_run(start(output, second, **changes))
    recipe = folder / "recipe.yaml"
    on_rank_zero(lambda: grow_checkpoint(plan_request(GrowthRequest(Path(whole), recipe, folder / "grown"))))
    grown = {"model": {"config": None, "initialize_from": str(folder / "grown")}}
    train_run(start("on grown", {"pipeline_parallel": 2, "stages": [1, 3]}, **grown))
    on_load = {"model": {"config": None, "initialize_from": {"source": whole, "recipe": str(folder / "deeper.yaml")}}}
    train_run(start("on load", {"pipeline_parallel": 2, "stages": [1, 3]}, **on_load))
    step = {"at_step": 2, "recipe": str(folder / "deeper.yaml"), "rewarmup_steps": 0}
    train_run(start("growing", {"pipeline_parallel": 2, "stages": "balanced"}, growth=[step]))
    refused = {
        "resumed": start("uneven", EVEN),
        "grown": start("x", {"pipeline_parallel": 2}, **grown),
        "layers": start("x", {"pipeline_parallel": 2, "stages": [2, 3]}),
    }
    return {name: refusal(run) for name, run in refused.items()}
