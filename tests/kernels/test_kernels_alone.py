"""The kernels in somebody else's project: without ours, and on their mesh."""

import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from conftest import ROOT
from jax.sharding import AbstractMesh, AxisType, PartitionSpec

from pallas_kernels import add_layer_norm, add_layer_norm_cross_entropy, attention

# What JAX itself needs.
JAX = ("jax", "jaxlib", "numpy", "numpy.libs", "ml_dtypes", "opt_einsum", "scipy", "scipy.libs")
PROGRAM = """
import importlib
import sys

import jax
import jax.numpy as jnp

import pallas_kernels

q = jax.random.normal(jax.random.key(0), (1, 24, 2, 16))
x, key = q.reshape(1, 24, 32), jax.random.key(1)
dropped = {"dtype": jnp.float32, "dropout_rate": 0.1, "dropout_key": key}
for function in (
    lambda x: pallas_kernels.attention(q, q, q, positions=jnp.arange(24), implementation="pallas"),
    lambda x: pallas_kernels.add_layer_norm(x, x, jnp.ones(32), **dropped)[1],
    pallas_kernels.gelu,
):
    assert jnp.isfinite(jax.jit(function)(x)).all()
    assert jax.grad(lambda x: function(x).sum())(x).shape == x.shape
for name in pallas_kernels.__all__:
    getattr(pallas_kernels, name)
# What the models call beside these, and compiling for absent GPUs.
for name in ("ops.attention.reference", "ops.linear", "ops.looped", "tuning.aot", "tuning.timing"):
    importlib.import_module(f"pallas_kernels.{name}")
assert not any(name.startswith(("spak_jax", "rich")) for name in sys.modules)
"""


def test_the_kernels_need_jax_and_nothing_else(tmp_path):
    """In an environment that holds JAX, what it needs, and them."""
    for name in JAX:
        package = Path(jax.__file__).parents[1] / name
        if package.exists():
            (tmp_path / name).symlink_to(package)
    (tmp_path / "pallas_kernels").symlink_to(ROOT / "pallas_kernels")
    # Without the packages that are installed beside them.
    result = subprocess.run(
        [sys.executable, "-S", "-c", PROGRAM],
        env={"PYTHONPATH": str(tmp_path), "JAX_PLATFORMS": "cpu", "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr


def dropping(x, key):
    q = x.reshape(*x.shape[:2], 2, -1)
    return attention(q, q, q, dropout_rate=0.5, dropout_key=key, implementation="xla")


def adding(x, key):
    options = {"dtype": jnp.float32, "dropout_rate": 0.5, "dropout_key": key}
    return add_layer_norm(x, x, jnp.ones(x.shape[-1]), **options)[1]


def scoring(x, key):
    tokens, weights = jnp.zeros(x.shape[:2], jnp.int32), jnp.ones(x.shape[:2])
    table = jnp.ones((13, x.shape[-1]))
    options = {"dropout_rate": 0.5, "dropout_key": key}
    add_layer_norm_cross_entropy(x, x, jnp.ones(x.shape[-1]), table, tokens, weights, **options)
    return x


@pytest.mark.parametrize("function", [dropping, adding, scoring])
@pytest.mark.parametrize(("axis", "devices"), [("data", 2), ("batch", 1)])
def test_every_shard_drops_its_own(function, axis, devices):
    assert traced(function, {axis: devices}, axis).shape[0] == 4


@pytest.mark.parametrize("function", [dropping, adding, scoring])
@pytest.mark.parametrize("axes", [{"batch": 2}, {"x": 2, "y": 2}])
def test_shards_that_would_drop_the_same_are_refused(function, axes):
    names = ", ".join(map(repr, axes))
    with pytest.raises(ValueError, match=f"dropout_key: .* the axes {names} .* 'data'"):
        traced(function, axes, next(iter(axes)))


def traced(function, axes, rows):
    """The shape of its result for 4 rows split over a mesh axis, of devices that are not there."""
    split, whole = PartitionSpec(rows), PartitionSpec()
    mapped = jax.shard_map(
        function,
        mesh=AbstractMesh(tuple(axes.values()), tuple(axes), (AxisType.Auto,) * len(axes)),
        in_specs=(split, whole),
        out_specs=split,
        check_vma=False,
    )
    return jax.eval_shape(mapped, jnp.ones((4, 8, 32)), jax.random.key(0))
