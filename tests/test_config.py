"""Configurations: what ships is valid, what is wrong is named."""

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

import pytest
from conftest import ROOT, TINY, tiny_config
from hypothesis import given
from hypothesis import strategies as st

from spak_jax.command_line import InputError
from spak_jax.config import (
    first_difference,
    leaves,
    parse_config,
    read_config,
    read_specification,
)
from spak_jax.config_files import shipped_configs, specification_file

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
        assert (data.max_length, data.bridge_fraction, data.bridge_lengths) == (4, 0.3, (5, 6))
        assert (data.layout, data.row_length, data.examples) == ("packed", 64, 180_000)
        assert (train.batch, train.learning_rate, train.final_learning_rate) == (128, 1e-3, 1e-4)
        assert (train.warmup_steps, train.decay_steps, train.betas) == (100, 15_000, (0.9, 0.99))
        assert (train.weight_decay, train.clip_norm) == (1e-4, 1.0)


def invariant(name: str, check: str = "parameters > 0") -> str:
    return f'[[invariant]]\nname = "{name}"\nlaw = "x"\ncheck = "{check}"\n'


FACT = '[[fact]]\nname = "{}"\nclaim = "Learned."\n'


def test_a_file_starts_from_others_and_its_own_word_is_the_last(tmp_path):
    write = lambda name, text: (tmp_path / f"{name}.toml").write_text(text)  # noqa: E731
    write("common", "[train]\nsteps = 5\nbatch = 3\n" + invariant("a") + invariant("b"))
    write("small", 'base = ["common"]\n[model]\nwidth = 8\nheads = 2\n[train]\nbatch = 4\n')
    looped = '[model]\nkind = "loop"\nloops = 2\nheads = 4\n[data]\nbridge_lengths = [5]\n'
    write("looped", 'base = ["common"]\n' + looped + invariant("c") + FACT.format("of-looped"))
    own = 'base = ["small", "looped"]\nname = "own"\n[system]\nname = "Own"\n[model]\nloops = 3\n'
    write("own", own + invariant("b", "parameters > 1") + FACT.format("own"))
    found = read_specification(tmp_path / "own.toml", ["train.steps=7"])
    assert (found.model.width, found.model.heads, found.model.loops) == (8, 4, 3)
    # What `looped` starts from counts after what `small` says.
    assert (found.train.steps, found.train.batch, found.data.bridge_lengths) == (7, 3, (5,))
    checks = {each.name: each.check for each in found.invariant}
    assert checks == {"a": "parameters > 0", "c": "parameters > 0", "b": "parameters > 1"}
    assert [each.name for each in found.fact] == ["own"]


@pytest.mark.parametrize(
    ("base", "said"),
    [
        ('"common"', "base must be a list of at most 4 names"),
        ("[1]", "base must be a list of at most 4 names"),
        ('["a", "a", "a", "a", "a"]', "base must be a list of at most 4 names"),
        ('["nowhere"]', "base = 'nowhere': there is no .*nowhere.toml nor .*nowhere.toml"),
        ('["../own"]', "must be a name such as loop12"),
        ('["/etc/passwd"]', "must be a name such as loop12"),
        ('["base/../own"]', "must be a name such as loop12"),
        ('["own"]', "is a base of itself: own.toml -> own.toml"),
        ('["other"]', "is a base of itself: own.toml -> other.toml -> own.toml"),
        ('["1"]', "bases are nested more than 4 deep"),
        ('["broken"]', "broken.toml is not TOML"),
        ('["base/looped", "odd"]', "own.toml: unknown key odd"),
        ('["deep"]\nx' + 3000 * ".x" + " = 1", "own.toml: keys are nested too deeply"),
    ],
)
def test_a_base_that_cannot_be_is_refused(tmp_path, base, said):
    write = lambda name, text: (tmp_path / f"{name}.toml").write_text(text)  # noqa: E731
    write("own", f'base = {base}\nname = "own"\n[system]\nname = "Own"\n')
    write("other", 'base = ["own"]\n')
    write("broken", "base = [\n")
    write("deep", "x" + 3000 * ".x" + " = 1\n")
    write("odd", "odd = 1\n[model]\nwidth = 8\nheads = 2\nloops = 1\n")
    for i in range(1, 6):
        write(str(i), f'base = ["{i + 1}"]\n')
    with pytest.raises(InputError, match=said) as refused:
        read_specification(tmp_path / "own.toml")
    assert "\n" not in str(refused.value)


def test_a_name_is_not_inherited(tmp_path):
    """It names the run folder."""
    (tmp_path / "own.toml").write_text('base = ["loop12"]\n')
    with pytest.raises(InputError, match="own.toml: name is missing"):
        read_specification(tmp_path / "own.toml")


def test_configurations_are_found_from_any_folder_and_own_ones_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shipped = specification_file("loop12")
    assert read_config(shipped).name == "loop12" and shipped.parent == shipped_configs()
    with pytest.raises(InputError, match="did you mean loop.*gpt12"):
        specification_file("loop13")
    Path("configs").mkdir()
    Path("configs/loop12.toml").write_text('base = ["loop128e"]\nname = "mine"\n')
    assert read_config(specification_file("loop12")).name == "mine"
    assert specification_file("gpt12") == shipped_configs() / "gpt12.toml"


def test_a_wheel_holds_them_within_the_package(tmp_path):
    """As the packages of pyproject.toml say, which name every folder of them."""
    with (ROOT / "pyproject.toml").open("rb") as file:
        settings = tomllib.load(file)["tool"]["setuptools"]
    for package, folder in settings["package-dir"].items():
        assert package in settings["packages"]
        assert settings["package-data"][package] == ["*.toml"]
        shutil.copytree(
            ROOT / folder, tmp_path / package.replace(".", "/"), ignore=lambda *_: ["base"]
        )
    for package in ("spak_jax", "pallas_kernels"):
        shutil.copytree(ROOT / package, tmp_path / package, dirs_exist_ok=True)
    program = (
        "from spak_jax.config_files import specification_file;"
        " from spak_jax.config import read_config; print(read_config(specification_file('loop12')))"
    )
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    said = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert "name='loop12'" in said.stdout, said.stderr
    held = {path.name for path in (tmp_path / "spak_jax/configs").rglob("*.toml")}
    assert held == {path.name for path in (ROOT / "configs").rglob("*.toml")}


def test_every_package_is_in_a_wheel():
    with (ROOT / "pyproject.toml").open("rb") as file:
        settings = tomllib.load(file)["tool"]["setuptools"]
    for package in ("spak_jax", "pallas_kernels"):
        for folder in (path.parent for path in (ROOT / package).rglob("__init__.py")):
            name = ".".join(folder.relative_to(ROOT).parts)
            assert name in settings["packages"], name


def test_overrides_are_toml(tiny_toml):
    config = read_config(
        tiny_toml,
        ["model.loops=24", 'name="trial"', "data.bridge_lengths=[7]", "train.betas=[0,0.5]"],
    )
    assert (config.model.loops, config.name, config.data.bridge_lengths) == (24, "trial", (7,))
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
        ('model.positions="sine"', ["model.positions", "'sine'", "random-rope"]),
        ('model.block="transformers"', ["model.block", "did you mean transformer?"]),
        ("model.window=true", ["model.window = true", "'rope'", "coupled-bias"]),
        (
            "model.no_grad_warmup_loops=3",
            ["model.no_grad_warmup_loops = 3", "model.shared_step = true"],
        ),
        ("model.causal=false", ["model.causal = false", 'data.answers = "one-pass"']),
        ("model.supervised_loops=4", ["model.supervised_loops = 4", "at most model.loops = 3"]),
        ("data.curriculum=0.5", ["data.curriculum = 0.5", "data.examples = 0"]),
        ("data.answers=at-once", ["data.answers = 'at-once'", "'one-pass'"]),
        ('data.task="division"', ["data.task", "subtraction"]),
        ('data.task="three-operands"', ["data.row_length = 24", "28 tokens"]),
        ("model.dropout=1", ["model.dropout", "less than 1"]),
        ("model.dropout=nan", ["model.dropout"]),
        ("model.layers=3", ["model.layers", "loops"]),
        ("train.steps=0", ["train.steps = 0"]),
        ("train.batch=0", ["train.batch = 0"]),
        ("train.seed=-1", ["train.seed = -1"]),
        ("train.decay_steps=2", ["train.decay_steps = 2", "train.warmup_steps = 2"]),
        ("train.betas=[0.9]", ["train.betas"]),
        ("data.max_length=9", ["data.row_length = 24", "9", "30"]),
        ("data.max_length=10001", ["data.max_length = 10001", "10000"]),
        ("data.max_length=101", ["data.row_length = 24", "101 digits", "306 tokens"]),
        ("data.bridge_lengths=[]", ["data.bridge_lengths"]),
        ("data.examples=5", ["data.examples = 5"]),
        ("evaluation.lengths=[0]", ["evaluation.lengths.0 = 0"]),
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
