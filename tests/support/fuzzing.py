"""Fuzzes one target in a process of its own, guided by coverage (atheris): fuzzing.py TARGET FOLDER FINDINGS CORPUS OPTIONS.

OPTIONS are libFuzzer's. Errors that are not for the user, code that runs, and files that are written outside the folder go to
FINDINGS, one JSON line for each place, and fuzzing goes on. A time limit or a crash ends the process; its input is left there.
"""

import json
import os
import sys
import traceback
from pathlib import Path

import atheris

WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
LONGEST = 20_000  # bytes of an input, or as many as the valid one has: libFuzzer cuts what is longer


def watch(folder, seen, forbidden):
    """Note in ``seen`` what an input must never cause. The folder, and what the library itself writes, is left out."""

    def hook(event, arguments):
        if event.startswith(forbidden):
            seen.append(f"{event} {arguments!r:.200}")
        elif event == "open" and isinstance(arguments[2], int) and arguments[2] & WRITES:
            path = os.fspath(arguments[0]) if not isinstance(arguments[0], int) else ""
            if isinstance(path, str) and not path.startswith((str(folder), "/dev/null")):
                seen.append(f"wrote {path:.200}")

    sys.addaudithook(hook)


def place_of(error):
    """Where the package raised or called what raised: the innermost of its own lines."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if "/incr_ds/" in frame.filename] or frames
    return f"{type(error).__name__} at {Path(own[-1].filename).name}:{own[-1].lineno}"


class Findings:
    """Defects, one for each place."""

    def __init__(self, folder):
        self.folder, self.known = folder, set()

    def add(self, place, text, content):
        if place in self.known:
            return
        self.known.add(place)
        (self.folder / f"input-{len(self.known)}").write_bytes(content)
        with open(self.folder / "findings.jsonl", "a") as stream:
            stream.write(json.dumps({"place": place, "text": text}) + "\n")


def main(name, folder, findings, corpus, *options):
    with atheris.instrument_imports(include=["incr_ds", "yaml"]):
        from fuzz_targets import prepare
        from hostile import FORBIDDEN

        prepared = prepare(name, Path(folder))
        accepted = any(prepared.try_content(content) for content in prepared.contents())  # imports what readers need
    assert accepted, f"{name}: the valid content was refused"
    seeds = prepared.contents()
    for number, content in enumerate(seeds):
        (Path(corpus) / f"seed-{number}").write_bytes(content)
    seen, found = [], Findings(Path(findings))
    watch(folder, seen, FORBIDDEN)

    def one(content):
        seen.clear()
        try:
            prepared.try_content(content)
            problem = None
        except Exception as error:
            problem = place_of(error), "".join(traceback.format_exception(error))[-3000:]
        if seen:
            problem = seen[0][:60], "; ".join(seen)
        if problem:
            found.add(*problem, content)

    longest = max(LONGEST, *map(len, seeds))
    atheris.Setup([sys.argv[0], corpus, f"-max_len={longest}", *options], one)
    atheris.Fuzz()


if __name__ == "__main__":
    main(*sys.argv[1:])
