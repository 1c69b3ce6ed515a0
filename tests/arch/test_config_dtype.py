"""A config's dtype is the name of one of torch's."""

import pytest

from incr_ds.arch.architecture import filled_config
from incr_ds.errors import ConfigError


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
@pytest.mark.parametrize("name", ["float33", "save", "nn", 5, ["bfloat16"]])
def test_what_is_not_a_dtype_is_refused(key, name):
    """transformers takes any attribute of torch."""
    with pytest.raises(ConfigError, match=f"here: {key} .*expected the name of a torch dtype, like bfloat16"):
        filled_config({"model_type": "llama", key: name}, "here")


def test_a_dtype_is_kept():
    assert filled_config({"model_type": "llama", "dtype": "bfloat16"}, "here")["dtype"] == "bfloat16"
