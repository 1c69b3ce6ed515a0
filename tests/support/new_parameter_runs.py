"""Child processes of test_new_parameters: runs whose new layers train at a rate of their own."""

from pathlib import Path

from progressive_runs import content_of, settings_of

from incr_ds.config.fields import merged
from incr_ds.offline.plan import GrowthRequest, plan_request
from incr_ds.offline.run import grow_checkpoint
from incr_ds.train.distributed import initialize_distributed
from incr_ds.train.pretraining import train_run
from incr_ds.train.ranks import on_rank_zero

RATE, RATIO = 1e-3, 3.0
SETTINGS = {"learning_rate_ratio": RATIO, "warmup_steps": 2, "warmup_from": 0.1}
PLAIN = {
    "schedule": {"train_steps": 4, "learning_rate": RATE, "warmup_steps": 0, "decay": "constant"},
    "optimizer": {"weight_decay": 0.0, "gradient_clipping": 0.0, "eps": 1e-12},
    "checkpoint": {"interval": 1, "keep_last": 0},
    "evaluation": None,
    "report": False,
}


def train_everything(folder, layout):
    """A source of two steps, then runs of its growth to twice the layers."""
    folder = Path(folder)

    def start(output, **changes):
        content = merged(content_of(folder, output, layout=layout), merged(PLAIN, changes))
        if "initialize_from" in content["model"]:
            content["model"]["config"] = None
        return settings_of(content)

    initialize_distributed(start("x").layout)
    source = train_run(start("source", schedule={"train_steps": 2})).checkpoint
    recipe = folder / "recipe.yaml"
    grows = {"model": {"initialize_from": {"source": str(source), "recipe": str(recipe)}, "load_optimizer": False}}
    # One run without a stop, and the same stopped after two steps inside of the warm-up, and resumed.
    train_run(start("calm", optimizer={"new_parameters": SETTINGS}, **grows))
    train_run(start("stopped", optimizer={"new_parameters": SETTINGS}, **merged(grows, {"schedule": {"end_step": 2}})))
    train_run(start("stopped", optimizer={"new_parameters": SETTINGS}, **grows))
    on_rank_zero(lambda: grow_checkpoint(plan_request(GrowthRequest(source, recipe, folder / "grown"))))
    from_grown = {"model": {"initialize_from": str(folder / "grown"), "load_optimizer": False}}
    train_run(start("from_grown", optimizer={"new_parameters": SETTINGS}, **from_grown))
    # A run that does not ask for it keeps the marks for one that does.
    plain = train_run(start("plain", **grows)).checkpoint
    later = {"model": {"initialize_from": str(plain)}, "schedule": {"train_steps": 1}}
    train_run(start("later", optimizer={"new_parameters": SETTINGS}, **later))
