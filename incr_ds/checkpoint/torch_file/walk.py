"""Walks a pickle without running it: which tensors it builds, and whether building it would take more work than its size.

Every global is replaced by a stand-in that stores its arguments. A few bytes of a pickle can cause any amount of work. For
example, a tuple of two references to a tuple of two references, sixty times, has 2^60 leaves for code that hashes or walks it.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Iterable
from typing import Any, ClassVar

REBUILDS = ("torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_tensor_v3")
_OF_A_SUBCLASS = "torch._tensor._rebuild_from_type_v2"
_OF_PARAMETERS = ("torch._utils._rebuild_parameter", "torch._utils._rebuild_parameter_with_state")
_MOST_READS = 8 << 20  # roughly two per entry
_MOST_STEPS = 1 << 24
_MOST_GLOBALS = 1000
_DEEPEST = 64
_HOSTILE = "The file is damaged, or was made to mislead; it was refused."


class WalkError(Exception):
    """A pickle that must not be loaded: what it does, and what the user can do about it."""


class StandIn:
    """Replaces anything that a pickle names. It stores its arguments and does nothing."""

    name = ""

    def __new__(cls, *arguments: Any, **_: Any) -> StandIn:
        """Store the arguments."""
        made = super().__new__(cls)
        made.arguments, made.held = arguments, [arguments]
        return made

    def __init__(self, *_: Any, **__: Any) -> None:
        self.arguments: tuple[Any, ...]
        self.held: list[Any]

    def __setstate__(self, state: Any) -> None:
        self.held.append(state)

    def __setitem__(self, key: Any, value: Any) -> None:
        self.held += (key, value)

    def append(self, value: Any) -> None:
        """Store the value."""
        self.held.append(value)

    def extend(self, values: Iterable[Any]) -> None:
        """Store the values."""
        self.held.extend(values)

    def __call__(self, *arguments: Any) -> StandIn:
        """Store the arguments."""
        self.held.append(arguments)
        return self


class _Stream(io.BytesIO):
    """A pickle of which only a limited amount is read."""

    def __init__(self, content: bytes, most: int) -> None:
        super().__init__(content)
        self._reads, self._most = 0, most

    def read(self, size: int | None = -1) -> bytes:
        self._reads += 1
        if self._reads > self._most:
            raise WalkError(f"its pickle has more than {self._most // 2:,} entries. {_HOSTILE}")
        return super().read(size)


class Walker(pickle._Unpickler):  # the one in C reserves as much memory as a pickle's numbering asks for
    """Collects storage, offset, size and strides of each tensor in a pickle, and counts the steps of building it.

    Steps are leaves of hashed keys and of arguments of function calls. ``times`` is how many times the work of a large
    model's pickle is allowed.
    """

    dispatch: ClassVar[dict[int, Any]] = dict(pickle._Unpickler.dispatch)

    def __init__(self, content: bytes, times: int = 1) -> None:
        super().__init__(_Stream(content, times * _MOST_READS))
        self._most_steps = times * _MOST_STEPS
        self._found: list[tuple[Any, ...]] = []
        self._classes: dict[str, type[StandIn]] = {}
        self._leaves: dict[int, int] = {}  # of each tuple by its id; the code that builds tuples overwrites it
        self._steps = 0

    def tensors(self) -> list[tuple[Any, ...]]:
        """(persistent id of the storage, offset, size, strides, dtype if stated) of each tensor.

        Raises WalkError, or any error if the pickle is damaged.
        """
        self.content()
        return self._found

    def content(self) -> Any:
        """What the pickle holds, with a StandIn for everything that it names; errors as in ``tensors``."""
        content = self.load()
        _check_unfolded(content, self._most_steps)
        return content

    @property
    def tensors_found(self) -> list[tuple[Any, ...]]:
        """The tensors found so far, as in ``tensors``."""
        return self._found

    @property
    def named(self) -> Iterable[str]:
        """Every global that the pickle names, with its module."""
        return self._classes

    def find_class(self, module: str, name: str) -> type[StandIn]:
        """Return a stand-in that remembers its name and the tensors that it builds."""
        full = f"{module}.{name}"
        if full not in self._classes:
            if len(self._classes) == _MOST_GLOBALS:
                raise WalkError(f"its pickle names more than {_MOST_GLOBALS} globals. {_HOSTILE}")

            def built(cls: type[StandIn], *arguments: Any, **_: Any) -> StandIn:
                self._called(full, arguments)
                return StandIn.__new__(cls, *arguments)

            self._classes[full] = type(name, (StandIn,), {"name": name, "__new__": built})
        return self._classes[full]

    def persistent_load(self, identity: Any) -> StandIn:
        """Return a stand-in for a storage."""
        return StandIn(identity)

    def _called(self, full: str, arguments: tuple[Any, ...]) -> None:
        self._spend(sum(map(self._weight, arguments)) + 1)
        if full in REBUILDS:
            storage, offset, size, strides, _, _, *more = arguments
            if max(len(size), len(strides)) > _DEEPEST:
                raise WalkError(f"a tensor has {len(size)} dimensions. {_HOSTILE}")
            dtype = more[:1] if full == REBUILDS[1] else []
            self._found.append((storage.arguments[0], offset, size, strides, *dtype))
        elif full == _OF_A_SUBCLASS:
            function, _, inner, _ = arguments
            function(*inner)  # a stand-in's call, which comes here again
        elif full.startswith("torch._utils._rebuild") and full not in _OF_PARAMETERS or _is_a_constructor(full):
            raise WalkError(
                f"contains the result of {full}: a tensor that is sparse, quantized or without a storage. Save it as an "
                "ordinary tensor."
            )
        elif full == "builtins.bytearray" and any(isinstance(value, int) for value in arguments):
            _refuse_a_reservation(self)

    def _weight(self, value: Any) -> int:
        """Steps of walking through a value that is hashed or passed to a function."""
        if isinstance(value, tuple):
            return self._leaves.get(id(value), 1)
        if isinstance(value, list | set):
            self._spend(len(value))  # the cost of looking at them
            return sum(self._leaves.get(id(item), 1) for item in value if isinstance(item, tuple))
        return len(value) if isinstance(value, str | bytes | dict) else 1

    def _spend(self, steps: int) -> None:
        self._steps += steps
        if self._steps > self._most_steps:
            raise WalkError(f"its pickle takes more than {self._most_steps:,} steps to build. {_HOSTILE}")

    def _weigh_tuple(self) -> None:
        made = self.stack[-1]  # type: ignore[attr-defined]
        if made:
            self._leaves[id(made)] = sum(
                self._leaves.get(id(item), 1) if isinstance(item, tuple) else 1 for item in made
            )

    def _spend_keys(self, first: int) -> None:
        """Spend steps on every second value on the stack from ``first`` on, since these are keys."""
        for key in self.stack[first::2]:  # type: ignore[attr-defined]
            self._spend(self._weight(key))


def _then_weighed(code: bytes) -> None:
    original = Walker.dispatch[code[0]]

    def load(walker: Walker) -> None:
        original(walker)
        walker._weigh_tuple()

    Walker.dispatch[code[0]] = load


def _keys_first(code: bytes, first: int) -> None:
    original = Walker.dispatch[code[0]]

    def load(walker: Walker) -> None:
        walker._spend_keys(first)
        original(walker)

    Walker.dispatch[code[0]] = load


def _refuse_a_reservation(_: Walker) -> None:
    raise WalkError(f"its pickle reserves memory by a number. {_HOSTILE}")


Walker.dispatch[pickle.BYTEARRAY8[0]] = _refuse_a_reservation  # Python's fills the stated size before it reads
for _code in (pickle.TUPLE, pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3):
    _then_weighed(_code)
for _code in (pickle.SETITEMS, pickle.DICT, pickle.ADDITEMS, pickle.FROZENSET):  # the keys are above a mark
    _keys_first(_code, 0)
_keys_first(pickle.SETITEM, -2)
_keys_first(pickle.BUILD, -1)  # the attributes of an object


def _is_a_constructor(full: str) -> bool:
    """Whether a global constructs a tensor or a storage of any size."""
    return full.startswith("torch.") and full.endswith(("Tensor", "Storage"))


def _check_unfolded(content: Any, most: int) -> None:
    """Raise WalkError if code that walks ``content`` would go too deep or meet shared parts too often."""
    seen: dict[int, tuple[int, int]] = {}

    def measured(value: Any, depth: int) -> tuple[int, int]:
        """Number of entries below a value, and its height."""
        if not isinstance(value, dict | list | tuple | set | StandIn):
            return 1, 0
        if id(value) not in seen:
            if depth > _DEEPEST:
                raise WalkError(f"its content is nested more than {_DEEPEST} levels deep. {_HOSTILE}")
            found = [measured(inner, depth + 1) for inner in _inside(value)]
            entries, height = sum(size for size, _ in found), max((high for _, high in found), default=0)
            seen[id(value)] = entries + 1, height + 1
        return seen[id(value)]

    entries, height = measured(content, 0)
    if height > _DEEPEST:
        raise WalkError(f"its content is nested more than {_DEEPEST} levels deep. {_HOSTILE}")
    if entries > most:
        raise WalkError(f"its content unfolds to more than {most:,} entries. {_HOSTILE}")


def _inside(value: Any) -> Iterable[Any]:
    if isinstance(value, StandIn):
        return value.held
    return [*value, *value.values()] if isinstance(value, dict) else value
