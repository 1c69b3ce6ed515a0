"""DeepSpeed's config follows from the run file; a JSON that says otherwise is refused."""

import json

import pytest

from incr_ds.errors import ConfigError
from incr_ds.testing.runs import pico_run
from incr_ds.train.deepspeed_config import deepspeed_config


def with_json(tmp_path, content):
    path = tmp_path / "zero.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return pico_run(
        deepspeed=str(path),
        precision="bf16",
        layout={"data_parallel": 2, "zero_stage": 2},
        batch={"sequence_length": 8, "micro_batch_size": 3, "global_batch_size": 24},
        optimizer={"gradient_clipping": 0.7},
    )


def test_the_run_file_is_enough():
    config = deepspeed_config(pico_run(layout={"zero_stage": 3}))
    assert config["train_batch_size"] == 4
    assert config["train_micro_batch_size_per_gpu"] == 2
    assert config["gradient_accumulation_steps"] == 2
    assert config["zero_optimization"] == {"stage": 3}
    assert config["bf16"] == {"enabled": False}
    assert config["gradient_clipping"] == 1.0


def test_what_deepspeed_owns_is_kept_and_the_rest_derived(tmp_path):
    own = {"zero_optimization": {"overlap_comm": False, "stage": 2}, "comms_logger": {"enabled": True}}
    config = deepspeed_config(with_json(tmp_path, own))
    assert config["zero_optimization"] == {"overlap_comm": False, "stage": 2}
    assert config["comms_logger"] == {"enabled": True}
    assert (config["train_batch_size"], config["gradient_accumulation_steps"]) == (24, 4)
    assert config["bf16"] == {"enabled": True} and config["gradient_clipping"] == 0.7


def test_every_disagreement_is_named_at_once(tmp_path):
    own = {
        "train_batch_size": 16,
        "zero_optimization": {"stage": 1},
        "bf16": {"enabled": False},
        "optimizer": {"type": "Adam"},
        "data_types": {"grad_accum_dtype": "fp32"},
    }
    with pytest.raises(ConfigError) as caught:
        deepspeed_config(with_json(tmp_path, own))
    message = str(caught.value)
    assert "zero.json: 5 problem(s)" in message
    assert "train_batch_size: 16, but the run file derives 24 from batch.global_batch_size; remove it here" in message
    assert "zero_optimization.stage: 1, but the run file derives 2 from layout.zero_stage" in message
    assert "bf16.enabled: False, but the run file derives True from precision: bf16" in message
    assert "optimizer: state it in the run file's section 'optimizer' instead" in message
    assert "data_types.grad_accum_dtype: 'fp32' makes DeepSpeed switch to an optimizer" in message


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("{", "not valid JSON"),
        ("[]", "expected a JSON object, found list"),
        ({"bf16": True}, "bf16: expected a section of DeepSpeed's config, found True"),
    ],
)
def test_a_malformed_json_is_named(tmp_path, content, text):
    with pytest.raises(ConfigError, match=text):
        deepspeed_config(with_json(tmp_path, content))


def test_a_missing_json_is_named():
    with pytest.raises(ConfigError, match="absent.json: cannot be read .*; the run file names it as deepspeed"):
        deepspeed_config(pico_run(deepspeed="absent.json"))
