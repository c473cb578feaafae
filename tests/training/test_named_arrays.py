"""Arrays by name: what must fit, and what a digest sees."""

import numpy as np
import pytest

from spak_jax.training.named_arrays import digest, from_named, named_arrays

WEIGHTS = {
    "block": {"kernel": np.arange(6.0, dtype=np.float32).reshape(2, 3)},
    "scale": np.ones(3, np.float32),
}


def test_names_shapes_and_dtypes_must_fit():
    named = named_arrays(WEIGHTS)
    assert list(named) == ["block.kernel", "scale"]
    with pytest.raises(ValueError, match="scale"):
        from_named(WEIGHTS, {"block.kernel": named["block.kernel"]})
    with pytest.raises(ValueError, match=r"scale is float32\[2\], expected float32\[3\]"):
        from_named(WEIGHTS, named | {"scale": np.ones(2, np.float32)})
    with pytest.raises(ValueError, match="scale is float64"):
        from_named(WEIGHTS, named | {"scale": np.ones(3)})


def test_digest_sees_every_bit_shape_and_name():
    arrays = {"a": np.zeros((2, 3), np.float32)}
    flipped = {"a": np.array([[0, 0, 0], [0, -0.0, 0]], np.float32)}
    variants = [
        arrays,
        flipped,
        {"b": arrays["a"]},
        {"a": np.zeros((3, 2), np.float32)},
        {"a": np.zeros((2, 3), np.int32)},
    ]
    assert len({digest(variant) for variant in variants}) == len(variants)
