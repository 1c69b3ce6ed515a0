"""Settings files: every mistake is named with its key, all at once."""

import os

import pytest

from incr_ds.config.fields import Settings, load_settings, parse_settings
from incr_ds.config.growth import GrowthRecipe
from incr_ds.config.yaml_file import parse_yaml, read_yaml, yaml_text
from incr_ds.errors import ConfigError
from incr_ds.testing.runs import pico_run


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


TEXTS = {
    "a tag that makes an object": (
        "name: !!python/object:os.system x\n",
        r"could not determine a constructor for the tag",
    ),
    "a tag of bytes": ("name: !!binary aGVsbG8=\n", r"could not determine a constructor for the tag .*binary"),
    "a set": ("name: !!set {a, b}\n", r"could not determine a constructor for the tag .*set"),
    "a date by its tag": ("name: !!timestamp 2024-01-01\n", r"could not determine a constructor .*timestamp"),
    "no number under its tag": ("inner: {steps: !!int abc}\n", r"not valid YAML: invalid literal for int"),
    "no truth under its tag": ("inner: {steps: !!bool abc}\n", r"not valid YAML: 'abc'"),
    "a date": ("name: x\ninner: {steps: 2024-01-01}\n", r"inner\.steps: .*valid integer, found '2024-01-01'"),
    "a date as a key": ("name: x\n2024-01-01: y\n", r"2024-01-01: unknown key"),
    "yes": ("name: x\ninner: {steps: yes}\n", r"inner\.steps: .*valid integer, found 'yes'"),
    "a time of day": ("name: x\ninner: {steps: 1:30}\n", r"inner\.steps: .*valid integer, found '1:30'"),
    "a leading zero": ("name: x\ninner: {steps: 010}\n", r"inner\.steps: .*valid integer, found '010'"),
    "a list as a key": ("? [a, b]\n: x\n", r"line 1: a key that is a list or a mapping: expected a name"),
    "a mapping as a key": ("name: x\n? {a: b}\n: x\n", r"line 2: a key that is a list or a mapping: expected a name"),
    "true as a key": ("true: x\n", r"line 1: key True: expected a name; put it in quotes"),
    "nothing as a key": ("~: x\n", r"line 1: key None: expected a name"),
    "a number as a key": ("name: x\n5: y\n", r"5: (Keys should be strings|unknown key)"),
    "a key merged": ("name: x\n<<: {inner: {}}\n", r"<<: unknown key"),
    "deep nesting": (
        "name: " + "[" * 5000 + "]" * 5000 + "\n",
        r"not valid YAML here: nested more than 64 levels deep",
    ),
    "some nesting": ("name: " + "[" * 80 + "]" * 80 + "\n", r"not a settings file: more than 64 levels deep"),
    "a mapping of itself": ("name: &a {b: *a}\n", r"not valid YAML: found unconstructable recursive node"),
    "references that unfold": (
        "a0: &a0 [x, x]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]\n" for n in range(1, 40)),
        r"not a settings file: more than 4,194,304 values",
    ),
    "a NUL": ('name: "a\\0b"\n', r": name: 'a\\x00b': text must not contain a NUL"),
    "infinity": ("name: x\ninner: {rate: .inf}\n", r": inner\.rate: inf: expected a finite number"),
    "a number past all": (
        "name: x\ninner: {rate: 1e999}\n",
        r": inner\.rate: inf: expected a finite number",
    ),
    "ten thousand digits": ("name: x\ninner: {steps: 1" + "0" * 10_000 + "}\n", r"not valid YAML: Exceeds the limit"),
    "two documents": ("name: x\n---\nname: y\n", r"not valid YAML: expected a single document"),
    "a tab": ("name:\n\tx\n", r"not valid YAML: .*cannot start any token"),
    "a control character": ("name: a\x07b\n", r"not valid YAML: unacceptable character"),
}


@pytest.mark.parametrize("name", TEXTS)
def test_yaml_that_is_not_settings_is_one_message(tmp_path, name):
    text, message = TEXTS[name]
    with pytest.raises(ConfigError, match=rf"(?s)settings\.yaml.*{message}"):
        load(tmp_path, text)


@pytest.mark.parametrize(
    ("text", "value"),
    [("1", 1), ("-7", -7), ("0x1F", 31), ("1_000", 1000), ("+3", 3), ("0", 0)]
    + [("1e-3", 1e-3), (".5", 0.5), ("2.", 2.0), ("1_0.5e+2", 1050.0), ("-1.5E2", -150.0)]
    + [("~", None), ("null", None), ("true", True), ("False", False), ("no", "no"), ("0o17", "0o17"), ('"1"', "1")]
    + [("1.2.3", "1.2.3"), ("2026-11-25", "2026-11-25"), ("[1, a]", [1, "a"]), ("{a: 1}", {"a": 1})],
)
def test_plain_values(text, value):
    found = parse_yaml(text, "test")
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize("text", ["[", "{a", "!!python/name:os.system", "*gone", "1" * 5000, "@"])
def test_an_override_that_is_not_yaml_is_named(tmp_path, text):
    with pytest.raises(ConfigError, match=r"--set inner\.steps: not valid YAML: "):
        load(tmp_path, "name: x\n", [f"inner.steps={text}"])


def test_a_hundred_mistakes_fit_on_a_screen(tmp_path):
    with pytest.raises(ConfigError, match=r"settings\.yaml: 101 problem\(s\)") as caught:
        load(tmp_path, "name: x\n" + "".join(f"key{n}: {'y' * 500}\n" for n in range(101)))
    assert str(caught.value).endswith("\n  and 81 more") and len(str(caught.value).splitlines()) == 22


@pytest.mark.parametrize("seed", [-1, 1 << 32, 10**40, 1.5, "1", True])
def test_a_seed_that_no_generator_takes_is_refused(seed):
    with pytest.raises(ConfigError, match=r"seed: Input should be "):
        pico_run(seed=seed)
    content = {"target": {}, "width": {"symmetry_breaking": {"seed": seed}}}
    with pytest.raises(ConfigError, match=r"width\.symmetry_breaking\.seed: Input should be "):
        parse_settings(content, GrowthRecipe, "test")


def test_settings_behind_a_pipe_are_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "settings.yaml")
    with pytest.raises(
        ConfigError, match=r"settings\.yaml: cannot be read \(a pipe, not a regular file\); expected a YAML"
    ):
        load_settings(tmp_path / "settings.yaml", Outer)


def test_what_is_written_is_read_back():
    content = {
        "texts": [
            "1e3",
            "1.",
            "yes",
            "on",
            "1:30",
            "010",
            "0x1F",
            "null",
            "~",
            "true",
            "2026-11-25",
            "",
            "a: b",
            "#",
            "1_0",
        ],
        "numbers": [1e-5, 1e20, 0.1, -3, 2**40, 1e-300, 5e-324, 1.0],
        "others": {"none": None, "flag": False, 3: [{"deep": {}}]},
    }
    assert parse_yaml(yaml_text(content), "test") == content
