"""What data sets state of themselves: the token that ends a document, for runs that keep documents apart."""

import json

import pytest

from incr_ds.data.facts import document_end
from incr_ds.errors import ConfigError
from incr_ds.launch.preflight import missing_here
from incr_ds.testing.runs import pico_run


def run_of(folder, *names, reset=True, **sections):
    data = {"train": [{"prefix": str(folder / f"{name}_train_text_document")} for name in names]}
    return pico_run(data=data | {"reset_at_document_end": reset} | sections.pop("data", {}), **sections)


def write_facts(folder, name, **facts):
    (folder / f"{name}_facts.json").write_text(json.dumps({"splits": {}} | facts))


def test_the_end_is_what_all_data_sets_state(tmp_path):
    for name in ("a", "b"):
        write_facts(tmp_path, name, end_of_text=7)
    assert document_end(run_of(tmp_path, "a", "b")) == 7
    assert document_end(run_of(tmp_path, "gone", reset=False)) is None


def test_data_sets_that_state_none_or_another_are_refused(tmp_path):
    write_facts(tmp_path, "a", end_of_text=7)
    write_facts(tmp_path, "b", end_of_text=8)
    write_facts(tmp_path, "none", end_of_text=None)
    for name in ("none", "gone"):
        with pytest.raises(ConfigError, match=rf"reset_at_document_end: .*{name}_train_text_document: its facts file"):
            document_end(run_of(tmp_path, "a", name))
    with pytest.raises(ConfigError, match=r"documents end with different tokens \(7 in .*a_train.*, 8 in .*b_train"):
        document_end(run_of(tmp_path, "a", "b"))
    validation = {"validation": {"old": str(tmp_path / "b_validation_text_document")}}
    evaluated = run_of(tmp_path, "a", data=validation, evaluation={"interval": 1, "samples": 4})
    assert any("documents end with different tokens" in line for line in missing_here(evaluated))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"attention": "cudnn"}, "does not work with model.attention: cudnn; set sdpa"),
        ({"layer_kernels": "liger"}, "does not work with model.layer_kernels: liger; set transformers"),
    ],
)
def test_kernels_that_were_not_tested_with_it_are_refused(tmp_path, model, message):
    with pytest.raises(ConfigError, match=f"data.reset_at_document_end {message}"):
        run_of(tmp_path, "a", model={"config": "pico", **model})
