"""What fuzzing has found so far, tried again: each input is accepted, or refused with a message."""

import zipfile

import pytest
from fuzz_targets import CORPUS, TARGETS, corpus_file, prepare

KNOWN = [name for name in TARGETS if corpus_file(name).exists()]


def test_every_archive_belongs_to_a_target():
    assert {path.name for path in CORPUS.glob("*.zip")} == {corpus_file(name).name for name in KNOWN} != set()


@pytest.mark.parametrize("name", KNOWN)
def test_corpus(tmp_path, name):
    prepared = prepare(name, tmp_path / "work")
    with zipfile.ZipFile(corpus_file(name)) as archive:
        for entry in archive.namelist():
            prepared.try_content(archive.read(entry))
    assert any(prepared.try_content(content) for content in prepared.contents())
    assert not prepared.canary.exists()
