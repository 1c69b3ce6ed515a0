"""Errors that a user can cause. Each message says where, what was expected, what was found and what to do."""


class IncrError(Exception):
    """A mistake in the user's input. The command line prints its text and exits with code 2.

    A message may quote an untrusted file. What a terminal would obey, everything but printable letters and line ends, is
    written as an escape.
    """

    def __init__(self, message: object = "") -> None:
        text = str(message)
        shown = (letter if letter.isprintable() or letter == "\n" else ascii(letter)[1:-1] for letter in text)
        super().__init__(text if text.isprintable() else "".join(shown))


class ConfigError(IncrError):
    """A settings file, a command-line value or a model configuration is wrong."""


class CheckpointError(IncrError):
    """A checkpoint is missing, damaged, untrusted or of an unsupported kind."""


class GrowthError(IncrError):
    """The requested growth is impossible, or not function-preserving where the recipe requires it."""


class KernelError(IncrError):
    """The CUDA kernels cannot be built here."""


class LayoutError(IncrError):
    """A model cannot be laid out over the requested ranks, or a checkpoint's layout is not the expected one."""
