"""Weights & Biases: what an offline run holds, that it sends nothing, and that nothing is loaded without the section."""

import json
import os
import struct
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from one_number import make_world, settings
from run_folders import growth, held_out, train_row

from incr_ds.config.fields import parse_settings
from incr_ds.config.training import WandbSettings
from incr_ds.errors import ConfigError
from incr_ds.launch.preflight import check_run
from incr_ds.testing.runs import pico_run
from incr_ds.train import boards
from incr_ds.train.boards import WandbBoard
from incr_ds.train.metrics import Position, row
from incr_ds.train.pretraining import pretrain

RUN = """
import json, sys
from pathlib import Path
from incr_ds.config.training import WandbSettings
from incr_ds.train.boards import WandbBoard
given = json.loads(sys.argv[1])
settings = WandbSettings(**given["settings"])
board = WandbBoard(Path(given["output"]), settings, {"seed": 7}, resumes=given["resumes"], say=print)
for content in given["rows"]:
    board.write(content)
board.close(failed=False)
"""


class Server:
    """Counts the requests that reach a local stand-in of the service, and refuses all of them."""

    def __enter__(self):
        requests = self.requests = []

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                requests.append(self.path)
                self.send_error(404)

            def do_GET(self):
                self.do_POST()

            def log_message(self, *given):
                pass

        self._server = HTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        self.address = f"http://127.0.0.1:{self._server.server_port}"
        return self

    def __exit__(self, *given):
        self._server.shutdown()
        self._server.server_close()


def board(output, rows=(), *, server, resumes=False, **stated):
    """Write ``rows`` in a process of its own, whose only way to any service is ``server``."""
    given = {"output": str(output), "settings": {"project": "growth", **stated}, "rows": rows, "resumes": resumes}
    closed = "http://127.0.0.1:9"
    environment = {**os.environ, "WANDB_BASE_URL": server.address, "WANDB_API_KEY": "0" * 40, "WANDB_INIT_TIMEOUT": "8"}
    environment |= {
        "HTTPS_PROXY": closed,
        "WANDB_CACHE_DIR": str(output.parent),
        "WANDB_CONFIG_DIR": str(output.parent),
    }
    environment = {name: value for name, value in environment.items() if name != "WANDB_MODE"}
    return subprocess.run(
        [sys.executable, "-c", RUN, json.dumps(given)], capture_output=True, text=True, timeout=120, env=environment
    )


def records(content):
    """The records of a file in LevelDB's log format, after a header of 7 bytes. Parts have a CRC, a length and a kind."""
    assert content.startswith(b":W&B")
    place, whole = 7, b""
    while place < len(content):
        if 32768 - place % 32768 < 7:
            place += 32768 - place % 32768
            continue
        length, kind = struct.unpack("<HB", content[place + 4 : place + 7])
        whole += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield whole
            whole = b""


def history(output):
    """Every logged row, the config and the ids in the files of the offline runs."""
    from wandb.proto import wandb_internal_pb2

    rows, config, ids = [], {}, set()
    for path in sorted((output / "wandb").glob("offline-run-*/run-*.wandb"), key=lambda path: path.stat().st_mtime):
        for data in records(path.read_bytes()):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(data)
            if record.WhichOneof("record_type") == "history":
                items = {"/".join(item.nested_key) or item.key: item.value_json for item in record.history.item}
                rows.append({key: json.loads(value) for key, value in items.items() if not key.startswith("_")})
            elif record.WhichOneof("record_type") == "run":
                ids.add(record.run.run_id)
                config |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
    return rows, config, ids


@pytest.fixture(scope="module")
def wandb():
    return pytest.importorskip("wandb", reason="wandb is not installed (extra wandb)")


def test_an_offline_run_holds_every_row_and_sends_nothing(wandb, tmp_path):
    content = [
        row(Position(step=1, tokens=8), train_row(4.0)),
        row(Position(step=1, tokens=8), held_out(3.5)),
        row(Position(step=1, tokens=8, stage=1), growth()),
    ]
    with Server() as server:
        done = board(tmp_path / "run", content[:2], server=server)
        assert done.returncode == 0, done.stderr
        done = board(tmp_path / "run", content[2:], server=server, resumes=True)
        assert done.returncode == 0 and server.requests == [], done.stderr
    rows, config, ids = history(tmp_path / "run")
    expected = [
        {
            f"{item['kind']}/{key}": value
            for key, value in item.items()
            if key not in ("kind", "step") and value is not None
        }
        | {"step": 1}
        for item in content
    ]
    assert rows == expected
    assert config["seed"] == 7 and ids == {(tmp_path / "run" / "wandb" / "run_id").read_text().strip()}
    assert not list((tmp_path / "run" / "wandb").rglob("requirements.txt")) and done.stdout == ""


def test_values_are_named_by_kind_and_set():
    content = {"kind": "evaluation", "step": 3, "loss": 2.0, "mfu": None, "sets": {"code": {"loss": 1.0, "bits": None}}}
    assert boards.named_values(content) == {"evaluation/loss": 2.0, "evaluation/code/loss": 1.0}


def test_a_run_keeps_its_id_when_it_resumes_and_a_new_one_has_another(tmp_path):
    path = tmp_path / "run_id"
    first = boards._run_id(path, resumes=False)
    assert boards._run_id(path, resumes=True) == first == path.read_text().strip()
    assert boards._run_id(path, resumes=False) != first
    path.write_text("../other")
    assert len(boards._run_id(path, resumes=True)) == 16


def test_an_online_run_asks_the_service_and_says_what_to_do_if_it_refuses(wandb, tmp_path):
    with Server() as server:
        done = board(tmp_path / "run", server=server, mode="online")
        assert server.requests  # so the test above would see a request
    assert "ConfigError: wandb: the run could not be opened (" in done.stderr
    assert "Log in with `wandb login`, set wandb.mode: offline, or remove the section wandb." in done.stderr


class Broken:
    """A run of the service that fails."""

    def log(self, content):
        raise OSError("no connection")


def test_a_board_that_fails_is_said_once_and_left(tmp_path):
    said = []
    failing = WandbBoard.__new__(WandbBoard)
    failing._run, failing._say = Broken(), said.append
    for step in (1, 2):
        failing.write(row(Position(step=step), train_row(4.0)))
    failing.close(failed=False)
    assert said == ["wandb: no further row is passed on (OSError: no connection); metrics.jsonl has all of them"]


def test_a_run_without_the_section_does_not_load_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)  # importing it fails
    run = settings(make_world(tmp_path, monkeypatch), "run")
    assert run.wandb is None and pretrain(run).position.step == 6
    assert not (Path(run.output) / "wandb").exists()


def test_a_run_passes_its_rows_and_settings_on(tmp_path, monkeypatch):
    seen = {}

    class Recorder:
        def __init__(self, output, settings, config, *, resumes, say):
            seen.update(output=output, settings=settings, config=config, resumes=resumes, rows=[])

        def write(self, content):
            seen["rows"].append((content["kind"], content["step"]))

        def close(self, *, failed):
            seen["failed"] = failed

    monkeypatch.setattr("incr_ds.train.monitoring.WandbBoard", Recorder)
    run = settings(make_world(tmp_path, monkeypatch), "run", wandb={"project": "growth"})
    pretrain(run)
    assert seen["rows"][:3] == [("evaluation", 0), ("train", 1), ("train", 2)] and seen["failed"] is False
    assert seen["config"] == run.model_dump(mode="json") and seen["resumes"] is False
    assert seen["settings"].mode == "offline" and seen["output"] == Path(run.output)
    pretrain(run)
    assert seen["resumes"] is True


def test_a_board_that_cannot_be_opened_ends_the_run_before_its_first_step(tmp_path, monkeypatch):
    def refuses(*given, **more):
        raise ConfigError("wandb: the run could not be opened")

    monkeypatch.setattr("incr_ds.train.monitoring.WandbBoard", refuses)
    world = make_world(tmp_path, monkeypatch)
    with pytest.raises(ConfigError, match="wandb: the run could not be opened"):
        pretrain(settings(world, "run", wandb={"project": "growth"}))
    assert world["engines"][0].steps == 0 and world["engines"][0].closed


def test_offline_is_the_default_and_a_wrong_mode_is_refused():
    assert WandbSettings(project="p").mode == "offline"
    with pytest.raises(ConfigError, match="mode: Input should be 'offline' or 'online'"):
        parse_settings({"project": "p", "mode": "on"}, WandbSettings, "test")


def test_a_missing_package_is_said_before_training(monkeypatch):
    monkeypatch.setattr("incr_ds.launch.packages._is_installed", lambda module: module != "wandb")
    with pytest.raises(ConfigError, match=r"wandb is not installed; run pip install 'incr_ds\[wandb\]'"):
        check_run(pico_run(wandb={"project": "p"}))
