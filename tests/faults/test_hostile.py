"""Hostile input: no code runs, time and memory are bounded, and a message says what is wrong."""

import json
import os
import subprocess
import sys
from pathlib import Path

import hostile
import pytest

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hostile")
    return folder, hostile.write_sources(folder / "sources"), folder / "canary"


GROUPS = {
    "pickles": lambda folder, sources, canary: hostile.pickle_attacks(sources, folder, canary),
    "archives": lambda folder, sources, canary: hostile.archive_attacks(sources, folder),
    "weights": lambda folder, sources, canary: hostile.huggingface_attacks(sources, folder),
    "configs": lambda folder, sources, canary: hostile.config_attacks(sources, folder, canary),
    "names": lambda folder, sources, canary: hostile.folder_attacks(sources, folder),
    "settings": lambda folder, sources, canary: hostile.settings_attacks(folder),
    "data": lambda folder, sources, canary: hostile.data_attacks(folder, canary),
}
# Some changes are harmless, and the input may be opened: what counts then is that nothing of it ran.
MAY_OPEN = (
    "code of its own (",
    "an activation from elsewhere",
    "1,000 more records each",
    "archive in the archive",
    "names that leave the archive",
    "latest: '.'",
    "a template that reads files",
    "rotary positions from elsewhere",
)


def watched(attacks, folder):
    """The outcome of each attack, in order; fewer if the process that opened them died."""
    (folder / "attacks.json").write_text(json.dumps([(attack.kind, str(attack.path)) for attack in attacks]))
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests' / 'support'}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, hostile.__file__, folder / "attacks.json"], capture_output=True, text=True, env=environment
    )
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"number"')]
    return [line for line in lines if "outcome" in line], f"{done.returncode}: {done.stderr[-2000:]}"


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("group", GROUPS)
def test_hostile_input(world, tmp_path, tried, group):
    _, sources, canary = world
    attacks = list(GROUPS[group](tmp_path, sources, canary))
    outcomes, end = watched(attacks, tmp_path)
    refused = 0
    for number, attack in enumerate(attacks):
        with tried.case(attack.name):
            assert number < len(outcomes), f"the process ended: {end}" if number == len(outcomes) else "not reached"
            found = outcomes[number]
            assert not found["seen"], found["seen"]
            assert found["seconds"] < hostile.LONGEST and found["memory"] < hostile.MOST_MEMORY, found
            if not attack.harmless and not any(words in attack.name for words in MAY_OPEN):
                assert found["outcome"] == "refused", found
            assert found["outcome"] != "another error", found
            assert len(found["said"]) < 4000 and "\x1b" not in found["said"], found["said"]
            refused += found["outcome"] == "refused"
    with tried.case("the canary"):
        assert not canary.exists(), "code of an input ran"
    tried.note = f"{refused} refused with a message, the others opened without harm; no code ran"
