"""Packs what fuzzing has collected for tests/faults/corpus: fuzz_corpus.py COLLECTED (see --fuzz-corpus of pytest).

libFuzzer collects an input if it reaches code, or a number of repetitions, that none before it had reached. Of each target's, the
smallest are packed.
"""

import sys
import zipfile
from pathlib import Path

from fuzz_targets import CORPUS, TARGETS, corpus_file

MOST_INPUTS, MOST_BYTES = 60, 24_000  # of each target


def chosen(folder):
    """The smallest collected inputs, within the limits."""
    found = sorted((path.read_bytes() for path in folder.iterdir()), key=lambda content: (len(content), content))
    total = 0
    for content in found[:MOST_INPUTS]:
        total += len(content)
        if total <= MOST_BYTES:
            yield content


def pack(inputs, path):
    """Write an archive that is the same for the same inputs."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for number, content in enumerate(inputs):
            archive.writestr(zipfile.ZipInfo(f"{number:03}"), content, zipfile.ZIP_DEFLATED)


def main(collected):
    CORPUS.mkdir(exist_ok=True)
    for name in TARGETS:
        if (found := Path(collected) / name / "corpus").is_dir():
            pack(chosen(found), corpus_file(name))


if __name__ == "__main__":
    main(*sys.argv[1:])
