"""The advice beside a grown checkpoint: its values, their reasons, and that pretrain.py takes it."""

from pathlib import Path

import pytest
import torch
import yaml

from incr_ds.arch.freezing import frozen_tensors
from incr_ds.checkpoint.publish import verify_manifest
from incr_ds.config.fields import load_settings, parse_settings
from incr_ds.config.growth import GrowthRecipe
from incr_ds.config.training import RunSettings
from incr_ds.errors import ConfigError
from incr_ds.growth.advice import Trained, advice_text, advise
from incr_ds.growth.planner import plan_growth
from incr_ds.growth.published import rate_near, shapes_near
from incr_ds.offline.plan import GrowthRequest, plan_request
from incr_ds.offline.run import grow_checkpoint
from incr_ds.testing.memory import drawn_model, small_architecture

EVEN = {"ffn": {"new": "copy"}, "heads": {"new": "copy"}, "symmetry_breaking": {"method": "none"}}
DOUBLE = {"hidden_size": 192, "num_attention_heads": 12, "num_key_value_heads": 6, "intermediate_size": 500}
ADAMW = [{"lr": 2e-4, "betas": (0.9, 0.99), "eps": 1e-7, "weight_decay": decay} for decay in (0.1, 0.0)]
SETTINGS = {"schedule": {"learning_rate": 1e-3}, "optimizer": {"gradient_clipping": 2.0}}
RUN = {
    "output": "run",
    "model": {"initialize_from": "grown"},
    "batch": {"sequence_length": 8, "micro_batch_size": 1, "global_batch_size": 2},
    "schedule": {"train_steps": 1000, "learning_rate": 0.1, "decay": "constant"},
    "data": {"train": [{"prefix": "a"}]},
    "checkpoint": {"interval": 1},
}


def advised(ratio=0.7, source=None, **recipe):
    plan = plan_growth(small_architecture("llama"), parse_settings(recipe, GrowthRecipe, "test"))
    found = advise(plan, source or Trained(SETTINGS, ADAMW, False), ratio)
    return yaml.safe_load(advice_text(found)), advice_text(found)


def test_moments_that_go_on():
    found, text = advised(target=DOUBLE, width=EVEN)
    # The source's last step took a fifth of its maximum; 2 / (1 - 0.99) steps; 0.7 of the source's threshold of 2.
    assert found == {
        "schedule": {"learning_rate": 1e-3, "warmup_from": 0.2, "warmup_steps": 200},
        "optimizer": {"betas": [0.9, 0.99], "eps": 1e-7, "weight_decay": 0.1, "gradient_clipping": 1.4},
    }
    assert "# the source's 2, times 0.7: 0.7 times the source's norm" in text
    lines = [line.strip() for line in text.splitlines()]
    keys = [i for i, line in enumerate(lines) if ": " in line and not line.startswith("#")]
    assert len(keys) == 7 and all(lines[i - 1].startswith("# ") for i in keys), "every number has its reason"


def test_at_the_maximum_there_is_nothing_to_warm_up_to():
    found, _ = advised(source=Trained({}, ADAMW, False), target=DOUBLE, width=EVEN)
    assert found["schedule"] == {"learning_rate": 2e-4, "warmup_steps": 0}


@pytest.mark.parametrize(
    ("recipe", "start", "reason"),
    [
        ({"target": DOUBLE, "width": EVEN, "optimizer": "reset"}, 0.0, "the moments start at zero"),
        ({"target": DOUBLE, "layout": {"format": "huggingface"}}, 0.0, "the moments start at zero"),
        ({"target": DOUBLE, "width": EVEN, "optimizer": "reset-new"}, 0.1, "new entries have estimated moments"),
        ({"target": {"num_hidden_layers": 4}}, 0.1, "0.1 is a cautious choice, not a measured one"),
        ({"target": {"intermediate_size": 260}}, 0.1, "new entries have estimated moments"),
    ],
)
def test_where_the_warm_up_begins(recipe, start, reason):
    found, text = advised(**recipe)
    assert found["schedule"]["warmup_from"] == start and reason in text
    assert ("betas" in found["optimizer"]) == (start > 0), "fresh moments need no old AdamW settings"


def test_a_source_with_frozen_tensors_is_warmed_up():
    found, text = advised(source=Trained(SETTINGS, ADAMW, True), target=DOUBLE, width=EVEN)
    assert found["schedule"]["warmup_from"] == 0.1 and "tensors that were frozen have no moments" in text


def test_what_is_not_known_is_said_instead():
    found, text = advised(None, Trained({}, (), False), target=DOUBLE, optimizer="reset")
    assert found == {"schedule": {"warmup_from": 0.0, "warmup_steps": "1%"}}
    assert "# learning_rate: the source does not state its own" in text
    assert (
        "# gradient_clipping: how the norm of the gradients changes is not known, since the source has no second moments"
        in text
    )
    assert "with the run file's default 0.95" in text
    _, text = advised(None, target={"num_hidden_layers": 6}, depth={"method": "stack", "new": "copy"})
    assert (
        "since this growth does not keep the function" in text
        and "after stacked copies the source's did better than half of it in docs/study.md" in text
    )
    _, text = advised(0.7, Trained({"optimizer": {"gradient_clipping": 0.0}}, ADAMW, False), target=DOUBLE)
    assert "multiply the threshold by 0.7; the source was trained without" in text


def test_another_layout_alone_needs_none():
    assert advised(target={}) == (None, "")


def test_llama_pro_end_to_end(tmp_path: Path):
    drawn_model(small_architecture("llama"), torch.float32).save_pretrained(tmp_path / "source")
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({"recipe": "llama-pro", "target": {"num_hidden_layers": 5}}))
    planned = plan_request(GrowthRequest(tmp_path / "source", tmp_path / "recipe.yaml", tmp_path / "grown"))
    grow_checkpoint(planned)
    assert "advice.yaml" in verify_manifest(tmp_path / "grown")["files"]
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(RUN))
    run = load_settings([tmp_path / "run.yaml", tmp_path / "grown" / "advice.yaml"], RunSettings, ["seed=3"])
    new = [layer for layer, source in enumerate(planned.plan.layers) if source.is_new]
    assert run.model.freeze == ["*", *(f"!model.layers.{layer}.*" for layer in new)] and len(new) == 2
    trained = {spec.layer for spec in planned.plan.target.stored} - {
        planned.plan.target.by_name[name].layer for name in frozen_tensors(planned.plan.target, run.model.freeze)
    }
    assert trained == set(new)
    assert (run.schedule.learning_rate, run.schedule.warmup_steps, run.seed) == (0.1, 10, 3)
    assert run.model.initialize_from == "grown"


def test_later_files_win_and_mistakes_name_all_files(tmp_path: Path):
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(RUN))
    (tmp_path / "more.yaml").write_text("schedule: {learning_rate: 0.2, warmup_step: 3}\n")
    with pytest.raises(
        ConfigError, match=r"run.yaml \+ .*more.yaml: 1 problem\(s\)\n  schedule.warmup_step: unknown key"
    ):
        load_settings([tmp_path / "run.yaml", tmp_path / "more.yaml"], RunSettings)
    (tmp_path / "more.yaml").write_text("schedule: {learning_rate: 0.2}\n")
    first, second = (
        [tmp_path / name for name in names] for names in (("run.yaml", "more.yaml"), ("more.yaml", "run.yaml"))
    )
    assert load_settings(first, RunSettings).schedule.learning_rate == 0.2
    assert load_settings(second, RunSettings).schedule.learning_rate == 0.1
    assert load_settings(first, RunSettings).schedule.train_steps == 1000


def test_a_source_without_a_rate_gets_the_published_one_of_its_size():
    """SmolLM2-135M to 264 million parameters: GPT-3 at 125M and 350M, Pythia at 162M and 405M."""
    sizes = {
        "hidden_size": 576,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "head_dim": 64,
        "vocab_size": 49152,
    }
    source = small_architecture(
        "llama", **sizes, intermediate_size=1536, num_hidden_layers=30, tie_word_embeddings=True
    )
    target = {"hidden_size": 768, "num_attention_heads": 12, "num_key_value_heads": 4, "num_hidden_layers": 36}
    recipe = {"target": {**target, "intermediate_size": 2048}, "optimizer": "reset"}
    plan = plan_growth(source, parse_settings(recipe, GrowthRecipe, "test"))
    text = advice_text(advise(plan, Trained({}, (), False), None))
    assert yaml.safe_load(text)["schedule"] == {"learning_rate": 4.5e-4, "warmup_from": 0.0, "warmup_steps": "1%"}
    assert (
        "published, not this source's, which does not state its own: the median of peaks from scratch near 264," in text
    )
    assert "GPT-3 (arXiv 2005.14165) 0.0006, 0.0003" in text and "1% of train_steps" not in text


def test_published_rates_and_shapes_by_size():
    assert rate_near(1000) is None and shapes_near(1000) is None
    assert rate_near(7 * 10**9).value == 1.2e-4
    assert "Llama 2 (arXiv 2307.09288) 0.0003, 0.0003" in rate_near(7 * 10**9).of
    near = shapes_near(150 * 10**6)
    assert (near.deepest, near.deepest_model, near.widest) == (576 / 30, "SmolLM2-135M", 64.0)
    assert 20.0 in near and 64 in near and 7.5 not in near and 90 not in near
