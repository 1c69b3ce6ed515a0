"""DeepSpeed's config follows from the run file; a JSON that says otherwise is refused."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from incr_ds.config.deepspeed_file import known_keys
from incr_ds.errors import ConfigError
from incr_ds.launch.deepspeed_config import deepspeed_config
from incr_ds.testing.runs import pico_run

ROOT = Path(__file__).parents[2]


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


def test_what_deepspeed_owns_is_kept_and_the_rest_derived(tmp_path: Path):
    own = {"zero_optimization": {"overlap_comm": False, "stage": 2}, "comms_logger": {"enabled": True}}
    config = deepspeed_config(with_json(tmp_path, own))
    assert config["zero_optimization"] == {"overlap_comm": False, "stage": 2}
    assert config["comms_logger"] == {"enabled": True}
    assert (config["train_batch_size"], config["gradient_accumulation_steps"]) == (24, 4)
    assert config["bf16"] == {"enabled": True} and config["gradient_clipping"] == 0.7


def test_the_optimizer_on_the_host(tmp_path: Path):
    run = pico_run(optimizer={"offload": "cpu"}, layout={"zero_stage": 2})
    assert deepspeed_config(run)["zero_optimization"]["offload_optimizer"] == {"device": "cpu"}
    own = {"zero_optimization": {"offload_optimizer": {"pin_memory": True}}}
    content = with_json(tmp_path, own).model_dump() | {"optimizer": {"offload": "cpu"}}
    section = deepspeed_config(pico_run(**content))["zero_optimization"]["offload_optimizer"]
    assert section == {"device": "cpu", "pin_memory": True}
    own["zero_optimization"]["offload_optimizer"]["device"] = "nvme"
    with_json(tmp_path, own)
    with pytest.raises(
        ConfigError, match="offload_optimizer.device: 'nvme', but the run file derives 'cpu' from optimizer"
    ):
        deepspeed_config(pico_run(**content))


def test_every_disagreement_is_named_at_once(tmp_path: Path):
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
        ({"bf16": {"enabled": "yes"}}, "bf16.enabled: expected true or false, found 'yes'"),
        ({"bf16": [1]}, r"bf16: expected a section of DeepSpeed's config, found \[1\]"),
        ({"data_types": 5}, "data_types: expected a section of DeepSpeed's config, found 5"),
        ({"zero_optimisation": {}}, "zero_optimisation: not a DeepSpeed key; did you mean zero_optimization?"),
        ({"zero_optimization": {"reduce_bucket": 5}}, "zero_optimization.reduce_bucket: not a DeepSpeed key; did"),
        (
            {"zero_optimization": {"reduce_bucket_size": "auto"}},
            "reduce_bucket_size: expected a whole number, found 'auto'",
        ),
        ({"zero_optimization": {"reduce_bucket_size": -1}}, "reduce_bucket_size: expected a whole number, found -1"),
        (
            {"zero_optimization": {"offload_optimizer": {"devise": "cpu"}}},
            "offload_optimizer.devise: not a DeepSpeed key.*device?",
        ),
        ({"train_batch_size": "24"}, "train_batch_size: expected a whole number, found '24'"),
        ({"wall_clock_breakdown": 1}, "wall_clock_breakdown: expected true or false, found 1"),
        ({"pipeline": None, "x": 1, "y": 2}, r"zero\.json: 3 problem\(s\)"),
        (
            '{"bf16": ' + "[" * 1000 + "]" * 1000 + "}",
            "nested more than 64 levels deep; the run file names it as deepspeed",
        ),
        ('{"gradient_clipping": NaN}', "NaN is not a JSON number"),
    ],
)
def test_a_malformed_json_is_named(tmp_path: Path, content, text):
    with pytest.raises(ConfigError, match=text):
        deepspeed_config(with_json(tmp_path, content))


def test_a_missing_json_is_named():
    with pytest.raises(ConfigError, match="absent.json: cannot be read .*; the run file names it as deepspeed"):
        deepspeed_config(pico_run(deepspeed="absent.json"))


def test_numbers_and_sections_as_deepspeed_files_have_them(tmp_path: Path):
    own = {
        "zero_optimization": {"reduce_bucket_size": 5e8, "offload_param": None, "overlap_comm": None},
        "log_level": "info",
    }
    assert deepspeed_config(with_json(tmp_path, own))["zero_optimization"]["reduce_bucket_size"] == 5e8


class Asked(dict):
    """A config that notes which keys it is asked for."""

    def __init__(self, content):
        super().__init__(content)
        self.keys_asked = set()

    def get(self, key, default=None):
        self.keys_asked.add(key)
        return super().get(key, default)

    def __contains__(self, key):
        self.keys_asked.add(key)
        return super().__contains__(key)


def test_the_known_keys_are_the_installed_deepspeeds():
    from deepspeed.runtime import precision_config
    from deepspeed.runtime.config import DeepSpeedConfig
    from deepspeed.runtime.zero import offload_config
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    known, asked = known_keys(), Asked({"train_batch_size": 4})
    object.__new__(DeepSpeedConfig)._initialize_params(asked)
    assert len(asked.keys_asked) > 30 and asked.keys_asked <= set(known)
    zero = known["zero_optimization"]
    for section, model in (
        (zero, DeepSpeedZeroConfig),
        (zero["offload_param"], offload_config.DeepSpeedZeroOffloadParamConfig),
        (zero["offload_optimizer"], offload_config.DeepSpeedZeroOffloadOptimizerConfig),
        (known["bf16"], precision_config.DeepSpeedBF16Config),
    ):
        fields = model.model_fields
        assert set(section) == set(fields) | {field.alias for field in fields.values() if field.alias}


def test_the_check_needs_neither_torch_nor_deepspeed():
    program = (
        "import sys; from pathlib import Path; from incr_ds.config.deepspeed_file import read_deepspeed_file\n"
        "assert read_deepspeed_file(Path('ds_configs/deepspeed/zero3.json'))\n"
        "assert not {'torch', 'deepspeed'} & set(sys.modules), sorted(sys.modules)[:5]"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False, cwd=ROOT).returncode == 0
