"""Makes packages absent, as if they had never been installed: no import finds them, and no find_spec either."""

import sys


class _Without:
    """A finder of Python's that does not know ``packages``."""

    def __init__(self, finder, packages):
        self._finder, self._packages = finder, packages

    def find_spec(self, name, path=None, target=None):
        return None if name.partition(".")[0] in self._packages else self._finder.find_spec(name, path, target)

    def __getattr__(self, name):
        return getattr(self._finder, name)


def make_absent(*packages):
    assert not set(packages) & set(sys.modules)
    sys.meta_path[:] = [_Without(finder, packages) for finder in sys.meta_path]
