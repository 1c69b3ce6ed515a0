"""What a dry run predicts is what DeepSpeed's engines hold and save: weights, fp32 masters, moments, files."""

import json

import pytest
from measured_memory import THRESHOLD, Layout, architecture_of, measure, run_of

from incr_ds.launch.model_states import ZeroSettings, model_states
from incr_ds.launch.rank_plan import holdings, states_of
from incr_ds.launch.retention import checkpoint_size
from incr_ds.testing.processes import run_processes

CASES = {
    "ZeRO-0": Layout(zero=0, precision="fp32", data=2),
    "ZeRO-1": Layout(zero=1, precision="bf16", data=2, tied=True),
    "ZeRO-2": Layout(zero=2, precision="fp32", data=2),
    "ZeRO-3": Layout(zero=3, precision="bf16", data=2),
    "ZeRO-3 in fp32": Layout(zero=3, precision="fp32", data=2),
    "ZeRO-2 on the host": Layout(zero=2, precision="bf16", data=2, offload="cpu"),
    "ZeRO-3 on the host": Layout(zero=3, precision="fp32", data=2, offload="cpu"),
    "Muon": Layout(zero=1, precision="bf16", data=2, muon=True),
    "Muon in a pipeline": Layout(zero=1, precision="fp32", pipeline=2, muon=True),
    "pipeline": Layout(zero=1, precision="bf16", pipeline=2, tied=True),
    "tensor": Layout(zero=1, precision="bf16", tensor=2),
}
WITHIN = 0.05

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    folder = tmp_path_factory.mktemp("measured")
    # Small buckets: DeepSpeed's default of a billion bytes would be allocated whole.
    zero = {
        "reduce_bucket_size": 100000,
        "allgather_bucket_size": 100000,
        "stage3_param_persistence_threshold": THRESHOLD,
    }
    (folder / "deepspeed.json").write_text(json.dumps({"zero_optimization": zero}))
    return folder, run_processes(measure, 2, str(folder), CASES, timeout=280.0)


def predicted(case, folder, rank):
    run, architecture = run_of(case, folder), architecture_of(case)
    held = holdings(run, architecture)[rank if case.pipeline > 1 else 0][rank if case.tensor > 1 else 0]
    if case.zero:
        return states_of(run, held)
    plain = ZeroSettings()
    return model_states(held.groups, held.frozen, zero_stage=0, data_parallel=2, element=4, settings=plain)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("rank", [0, 1])
def test_weights_masters_and_moments_are_as_predicted(measured, name, rank):
    folder, ranks = measured
    found, expected = ranks[rank][name], predicted(CASES[name], folder, rank)
    for kind in ("weights", "masters", "moments"):
        assert found[kind] == pytest.approx(getattr(expected, kind), rel=WITHIN), kind
    assert found["moments"] > 0


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.zero])
def test_a_checkpoint_has_the_predicted_files_and_size(measured, name):
    folder, ranks = measured
    run, architecture = run_of(CASES[name], folder), architecture_of(CASES[name])
    expected = checkpoint_size(run, holdings(run, architecture))
    assert ranks[0][name]["saved"] == pytest.approx(expected.num_bytes, rel=WITHIN)
    # latest, config.json and manifest.json come from the run; DeepSpeed's own scripts are counted.
    assert ranks[0][name]["files"] == expected.files - 3
