"""Sources that tests write, and what they compare."""

from incr_ds.config.fields import parse_settings
from incr_ds.config.growth import GrowthRecipe
from incr_ds.offline.plan import GrowthRequest, plan_files
from incr_ds.offline.run import grow_checkpoint
from incr_ds.testing.synthetic import SyntheticCheckpoint

TARGET = {"hidden_size": 42, "num_hidden_layers": 5, "intermediate_size": 77}


def write_synthetic(folder, architecture, **layout):
    """A native checkpoint of ``architecture`` at folder/source."""
    (folder / "same.yaml").write_text("target: {}\n")
    recipe = parse_settings({"target": {}, "layout": layout}, GrowthRecipe, "test")
    request = GrowthRequest(folder, folder / "same.yaml", folder / "source")
    grow_checkpoint(plan_files(request, SyntheticCheckpoint(architecture), recipe))


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def hidden(folder):
    return [path.name for path in folder.iterdir() if path.name.startswith(".")]
