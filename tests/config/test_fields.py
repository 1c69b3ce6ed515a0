"""Settings files: every mistake is named with its key, all at once."""

import pytest

from incr_ds.config.fields import Settings, load_settings, parse_settings, read_yaml
from incr_ds.errors import ConfigError


class Inner(Settings):
    rate: float = 1.0
    steps: int = 2


class Outer(Settings):
    name: str
    inner: Inner = Inner()
    other: Inner | None = None


def load(tmp_path, text, overrides=None):
    path = tmp_path / "settings.yaml"
    path.write_text(text)
    return load_settings(path, Outer, overrides)


def test_values_are_read(tmp_path):
    found = load(tmp_path, "name: x\ninner: {rate: 1e-3}\n", ["inner.steps=5", "other.rate=.5"])
    assert found == Outer(name="x", inner=Inner(rate=0.001, steps=5), other=Inner(rate=0.5))


def test_all_mistakes_are_reported_together(tmp_path):
    with pytest.raises(ConfigError, match=r"settings\.yaml: 4 problem\(s\)") as caught:
        load(tmp_path, "inner: {rate: fast, stpes: 3}\nunheard: 1\n")
    for line in (
        "name: Field required",
        "inner.rate: Input should be a valid number, found 'fast'",
        "inner.stpes: unknown key; did you mean steps?",
        "unheard: unknown key; known keys: name, inner, other",
    ):
        assert line in str(caught.value)


def test_no_type_is_guessed():
    with pytest.raises(ConfigError, match=r"inner\.steps: Input should be a valid integer, found '3'"):
        parse_settings({"name": "x", "inner": {"steps": "3"}}, Outer, "test")
    with pytest.raises(ConfigError, match=r"other\.stepz: unknown key; did you mean steps\?"):
        parse_settings({"name": "x", "other": {"stepz": 3}}, Outer, "test")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: x\nname: y\n", r"line 2: key 'name' appears twice"),
        ("name: [\n", r"settings\.yaml: not valid YAML"),
        ("- a\n", r"expected a mapping of keys at the top, found list"),
        ("", r"expected a mapping of keys at the top, found NoneType"),
    ],
)
def test_files_that_cannot_be_settings(tmp_path, text, message):
    with pytest.raises(ConfigError, match=message):
        load(tmp_path, text)


def test_missing_file(tmp_path):
    with pytest.raises(ConfigError, match=r"nowhere\.yaml: cannot be read .*expected a YAML settings file"):
        read_yaml(tmp_path / "nowhere.yaml")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("inner.rate", r"--set inner\.rate: expected key\.path=value"),
        ("=3", r"--set =3: expected key\.path=value"),
        ("name.x=1", r"--set name\.x=1: name is a single value in the file, not a section"),
        ("inner.stepz=1", r"inner\.stepz: unknown key; did you mean steps"),
    ],
)
def test_bad_overrides(tmp_path, override, message):
    with pytest.raises(ConfigError, match=message):
        load(tmp_path, "name: x\n", [override])
