"""Blocks of a file are the file, any part of it, and lie where the kernel copies fastest."""

import mmap
import subprocess
import sys

import numpy as np
import pytest

from incr_ds.config.json_file import file_blocks

SIZE = (2 << 20) + 4097


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("reading") / "file"
    path.write_bytes(np.random.default_rng(0).bytes(SIZE))
    return path


@pytest.mark.parametrize(
    ("offset", "length"), [(0, None), (4097, None), (5, 11), (1 << 20, 1 << 20), (SIZE, None), (SIZE - 1, 1), (7, 0)]
)
def test_blocks_are_the_file(file, offset, length):
    expected = file.read_bytes()[offset : None if length is None else offset + length]
    assert b"".join(bytes(block) for block in file_blocks(file, offset, length)) == expected


def test_a_file_that_ends_early_ends_the_blocks(file):
    assert sum(len(block) for block in file_blocks(file, SIZE - 10, 100)) == 10


def test_blocks_begin_on_a_page(file):
    for block in file_blocks(file, 13):
        assert np.frombuffer(block, np.uint8).ctypes.data % mmap.PAGESIZE == 0


def test_help_and_wrong_options_need_no_torch():
    """Torch takes seconds to load, and --help need not wait for it."""
    program = "import sys; sys.path.insert(0, 'tools'); import grow_checkpoint; assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
