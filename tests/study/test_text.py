import json

import pytest

from incr_ds.errors import ConfigError
from incr_ds.study.text import code_and_prose, write_texts

SOURCE = '''"""Adds numbers."""

LIMIT = 3


def add(first, second):
    """Return the sum.

    Both are numbers.
    """
    return first + second  # "quoted"
'''


def test_a_module_is_split_into_its_code_and_its_docstrings():
    code, prose = code_and_prose(SOURCE)
    assert prose == "Adds numbers.\n\nReturn the sum.\n\nBoth are numbers."
    assert code == '\nLIMIT = 3\n\n\ndef add(first, second):\n    return first + second  # "quoted"\n'
    assert code_and_prose("def broken(:") == ("", "")


def test_texts_are_written_once_each_and_bounded(tmp_path):
    long = SOURCE.replace("Both are numbers.", "Both are numbers. " * 20) + "VALUES = [" + "1, " * 80 + "]\n"
    packages = tmp_path / "packages"
    packages.mkdir()
    for name in ("a.py", "copy_of_a.py"):
        (packages / name).write_text(long)
    (packages / "b.py").write_text(long.replace("numbers", "values"))
    (packages / "accents.py").write_text(long.replace("numbers", "n\xfcmbers").replace("LIMIT", "L\xcfMIT"))
    facts = {item.path.name: item for item in write_texts(tmp_path / "out", 10_000, packages)}
    assert {name: item.documents for name, item in facts.items()} == {"code.jsonl": 1, "prose.jsonl": 2}
    rows = [json.loads(line)["text"] for line in (tmp_path / "out/prose.jsonl").read_text().splitlines()]
    assert sum(len(row) for row in rows) == facts["prose.jsonl"].bytes and all(row.startswith("Adds") for row in rows)
    few = write_texts(tmp_path / "few", 450, packages)
    assert [item.documents for item in few] == [1, 1]


def test_a_folder_without_packages_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"no code and no prose in .py files of at least 200 bytes; name a folder"):
        write_texts(tmp_path / "out", 1000, tmp_path)
    assert not (tmp_path / "out").exists()
