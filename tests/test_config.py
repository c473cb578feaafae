"""Configurations: what ships is valid, what is wrong is named."""

import contextlib
import tempfile
import tomllib
from pathlib import Path

import pytest
from conftest import ROOT, TINY, tiny_config
from hypothesis import given
from hypothesis import strategies as st

from spak_jax.command_line import InputError
from spak_jax.config import first_difference, leaves, parse_config, read_config

SHIPPED = sorted((ROOT / "configs").glob("*.toml"))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_configurations_are_valid_and_named_by_their_file(path):
    assert read_config(path).name == path.stem


def test_the_five_systems_follow_the_originals_recipe():
    names = {
        "gpt12": (256, 15_000),
        "loop12": (256, 15_000),
        "loop30": (256, 20_000),
        "loop128e": (128, 15_000),
    }
    for name, (width, steps) in names.items():
        config = read_config(ROOT / "configs" / f"{name}.toml")
        assert (config.model.width, config.model.heads, config.train.steps) == (width, 4, steps)
        assert (config.model.dropout, config.model.mlp) == (0.1, "gelu")
        data, train = config.data, config.train
        assert (data.max_digits, data.bridge_fraction, data.bridge_digits) == (4, 0.3, (5, 6))
        assert (data.layout, data.row_length, data.examples) == ("packed", 64, 180_000)
        assert (train.batch, train.learning_rate, train.final_learning_rate) == (128, 1e-3, 1e-4)
        assert (train.warmup_steps, train.decay_steps, train.betas) == (100, 15_000, (0.9, 0.99))
        assert (train.weight_decay, train.clip_norm) == (1e-4, 1.0)


def test_overrides_are_toml(tiny_toml):
    config = read_config(
        tiny_toml,
        ["model.loops=24", 'name="trial"', "data.bridge_digits=[7]", "train.betas=[0,0.5]"],
    )
    assert (config.model.loops, config.name, config.data.bridge_digits) == (24, "trial", (7,))
    assert config.train.steps == 12


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("model.positions=random-rope", "model.positions", "random-rope"),
        ("name=trial", "name", "trial"),
        ("model.mlp = swiglu ", "model.mlp", "swiglu"),
        ("system.name=My model", "system", "My model"),
        ("system.name=C# and = [red]", "system", "C# and = [red]"),
        ("system.name='2024'", "system", "2024"),
        ('system.name=\\ "quoted', "system", '\\ "quoted'),
        ("system.name=Größe\x7f", "system", "Größe\x7f"),
        ("model.inject_input=true", "model.inject_input", True),
        ("train.learning_rate=1e-2", "train.learning_rate", 1e-2),
    ],
)
def test_an_override_that_is_no_toml_is_a_string(tiny_toml, override, key, value):
    assert dict(leaves(read_config(tiny_toml, [override]).model_dump()))[key] == value


@given(st.text(st.characters(codec="utf-8"), min_size=1, max_size=40))
def test_any_text_is_itself_as_an_override_or_is_refused(text):
    """Where it is no other value of TOML, such as `1` or `"a"`."""
    try:
        tomllib.loads(f"x={text}")
    except ValueError:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "tiny.toml"
            path.write_text(TINY)
            with contextlib.suppress(InputError):
                assert read_config(path, [f"system.name={text}"]).system == text.strip()


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("model.loopz=3", ["model.loopz", "did you mean loops", "heads"]),
        ("modl.loops=3", ["modl", "did you mean model"]),
        ("model.loops=0", ["model.loops = 0", "greater than or equal to 1"]),
        ("model.loops=-1", ["model.loops = -1"]),
        ("model.loops=2.0", ["model.loops = 2.0", "integer"]),
        ("model.loops=true", ["model.loops = True", "integer"]),
        ('model.width="wide"', ["model.width = 'wide'", "integer"]),
        ("model.heads=3", ["model.heads = 3", "model.width = 16"]),
        ("model.heads=16", ["model.heads = 16", "even"]),
        ('model.kind="rnn"', ["model.kind = 'rnn'", "gpt", "loop"]),
        ('model.mlp="relu"', ["model.mlp", "'gelu'", "'swiglu'"]),
        ('model.positions="sine"', ["model.positions", "'rope'"]),
        ("model.window=true", ["model.window = true", "'rope'", "coupled-bias"]),
        ("model.free_loops=3", ["model.free_loops = 3", "model.shared_step = true"]),
        ('data.task="division"', ["data.task", "'subtraction'"]),
        ('data.task="three-operands"', ["data.row_length = 24", "28 tokens"]),
        ("model.dropout=1", ["model.dropout", "less than 1"]),
        ("model.dropout=nan", ["model.dropout"]),
        ("model.layers=3", ["model.layers", "loops"]),
        ("train.steps=0", ["train.steps = 0"]),
        ("train.batch=0", ["train.batch = 0"]),
        ("train.seed=-1", ["train.seed = -1"]),
        ("train.decay_steps=2", ["train.decay_steps = 2", "train.warmup_steps = 2"]),
        ("train.betas=[0.9]", ["train.betas"]),
        ("data.max_digits=9", ["data.row_length = 24", "9", "30"]),
        ("data.max_digits=10001", ["data.max_digits = 10001", "10000"]),
        ("data.max_digits=101", ["data.row_length = 24", "101 digits", "306 tokens"]),
        ("data.bridge_digits=[]", ["data.bridge_digits"]),
        ("data.examples=5", ["data.examples = 5"]),
        ("evaluation.digits=[0]", ["evaluation.digits.0 = 0"]),
        ('name="a/b"', ["name = 'a/b'"]),
        ('name=".."', ["name"]),
        ("model=3", ["model = 3"]),
        ("name.x=3", ["name.x=3", "a value, not a section"]),
        ("model.loops", ["model.loops", "key.path=value"]),
        ("model.mlp=relu", ["model.mlp = 'relu'", "'gelu'"]),
        ("train.steps=abc", ["train.steps = 'abc'", "integer"]),
        ("train.steps=", ["train.steps = ''", "integer"]),
        ("train.betas=[0.9,", ["train.betas = '[0.9,'"]),
        ("model.inject_input=True", ["model.inject_input = 'True'", "true or false"]),
        ("system.name=2024", ["system.name = 2024", "in quotes", "'system.name=\"2024\"'"]),
        ("system.name=", ["system.name = ''", "at least 1 character"]),
        ("sys tem=x", ["'sys tem=x'", "key.path=value"]),
        ("\udc80=x", ["key.path=value"]),
        ("=3", ["=3", "key.path=value"]),
        ("", ["key.path=value"]),
    ],
)
def test_a_bad_value_is_named(tiny_toml, override, said):
    with pytest.raises(InputError) as refused:
        read_config(tiny_toml, [override])
    for words in said:
        assert words in str(refused.value)
    assert "\n" not in str(refused.value).strip()


@pytest.mark.parametrize(
    "content", ["", "model = [", "\x00", "[model]\nkind='loop'", "a=" + "[" * 9999]
)
def test_a_bad_file_is_named(tmp_path, content):
    path = tmp_path / "bad.toml"
    path.write_text(content)
    with pytest.raises(InputError, match="bad.toml"):
        read_config(path)


def test_a_missing_file_or_a_folder_is_named(tmp_path):
    for path in (tmp_path / "none.toml", tmp_path):
        with pytest.raises(InputError, match=str(path)):
            read_config(path)


def test_json_round_trip():
    config = tiny_config()
    assert parse_config(config.model_dump(mode="json"), "again") == config
    assert first_difference(config, config) is None


@given(
    st.sampled_from(
        [
            ("model", "loops", 4),
            ("model", "inject_input", True),
            ("train", "seed", 7),
            ("data", "bridge_fraction", 0.5),
            ("evaluation", "examples", 3),
        ]
    )
)
def test_first_difference_names_the_field(change):
    section, key, value = change
    difference = first_difference(tiny_config(), tiny_config(**{section: {key: value}}))
    assert f"{section}.{key}" in difference and repr(value) in difference


def test_first_difference_of_another_kind():
    values = parse_config(
        {
            "name": "x",
            "system": "x",
            "model": {"kind": "gpt", "width": 16, "heads": 2, "layers": 3},
        },
        "test",
    )
    assert first_difference(tiny_config(), values) is not None


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(
                st.sampled_from(["model", "name", "kind", "width", "train", "x"]), inner
            )
        ),
        max_leaves=12,
    )
)
def test_any_value_is_a_configuration_or_an_input_error(values):
    with contextlib.suppress(InputError):
        parse_config(values, "fuzz")
