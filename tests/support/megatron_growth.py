"""Growth of a source, whose model stays as it is, into one of Megatron-LM's formats."""

from incr_ds.config.fields import parse_settings
from incr_ds.config.growth import GrowthRecipe
from incr_ds.offline.plan import GrowthRequest, plan_files


def planned(folder, source, layout, workers=1, name="out", **recipe):
    """The plan of a growth into ``folder``/``name``."""
    (folder / "recipe.yaml").write_text("target: {}\n")
    asked = {"target": {}, **recipe, "layout": layout}
    request = GrowthRequest(folder, folder / "recipe.yaml", folder / name, workers=workers)
    return plan_files(request, source, parse_settings(asked, GrowthRecipe, "test"))
