"""All loops in one launch against the scanned model: logits, halting, and what it is taken for.

On a machine without a GPU the kernel runs in interpret mode; with one, compiled for it.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from random_models import build, make_config, random_weights

from pallas_kernels import targets, tiles
from pallas_kernels.ops import looped
from spak_jax.evaluation import score as score_module
from spak_jax.evaluation.forward import PUBLISHED_HALTING, forward
from spak_jax.evaluation.loaded import load
from spak_jax.evaluation.score import Scorer, Settings
from spak_jax.models import LoopLM, fused
from spak_jax.tasks.arithmetic import Addition

ADDITION = Addition()

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("exact_products")]

FRONTIER = {
    "positions": "coupled-bias",
    "window": True,
    "inject_input": True,
    "normalize_state": True,
    "shared_step": True,
}


needs_gpu = pytest.mark.skipif(
    jax.default_backend() != "gpu", reason="compares what is compiled for a GPU; needs one"
)


def network_of(**architecture):
    """A model with large random weights; attention is named, so that a call runs loop by loop."""
    config = make_config(**({"kind": "loop", "loops": 4} | architecture))
    network = build(config, random_weights(config))
    network.block.attention_implementation = "xla"
    return network


def texts(rows: int, length: int) -> jax.Array:
    """Random tokens: some say which digits belong together, others do not."""
    return jnp.asarray(np.random.default_rng(length).integers(0, 13, (rows, length)), jnp.int32)


@nnx.jit(static_argnames=("how", "loops", "rule"))
def run(network, how, tokens, thresholds=None, rule="confidence", loops=None, positions=None):
    options = {
        "loops": loops,
        "positions": positions,
        "position_ids": ADDITION.position_ids(tokens),
    }
    if how == "launched":
        return network.fused_forward(tokens, thresholds, rule=rule, **options)
    if thresholds is None:
        return network(tokens, **options), None
    return network.halting_logits(tokens, thresholds, rule=rule, **options)


def error(value, truth) -> float:
    """The largest difference, relative to the largest number."""
    value, truth = np.asarray(value, np.float64), np.asarray(truth, np.float64)
    assert np.isfinite(value).all()
    return np.abs(value - truth).max() / np.abs(truth).max()


# Odd numbers of rows, several to a program, and one to a program; loops beyond the trained ones;
# every kind of position, MLP and loop.
MODELS = {
    "rope": ({}, (5, 24), {}),
    "whole rows, gated, injected": (
        {"width": 64, "heads": 4, "mlp": "swiglu", "inject_input": True}, (2, 64), {"loops": 6},
    ),
    "frontier": (FRONTIER | {"width": 24, "heads": 2, "hidden": 40}, (3, 24), {"loops": 7}),
    "pointer": ({"positions": "learned", "window": True, "heads": 4}, (7, 12), {}),
    "positions by row": ({"loops": 1}, (3, 40), {"positions": np.arange(120).reshape(3, 40) % 50}),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_one_launch_equals_the_scanned_model(name):
    architecture, shape, options = MODELS[name]
    network, tokens = network_of(**architecture), texts(*shape)
    truth, _ = run(network, "scanned", tokens, **options)
    logits, steps = run(network, "launched", tokens, **options)
    assert error(logits, truth) < 1e-5
    assert (steps == options.get("loops", network.loops)).all() and steps.shape == shape


@pytest.mark.parametrize("length", [24, 100])
def test_one_launch_equals_the_scanned_model_to_bfloat16(length):
    """As far from the truth as the scanned model is in bfloat16."""
    tokens = texts(3, length)
    exact, _ = run(network_of(width=64, heads=2), "scanned", tokens)
    network = network_of(width=64, heads=2, dtype="bfloat16")
    scanned, _ = run(network, "scanned", tokens)
    logits, _ = run(network, "launched", tokens)
    assert error(logits, exact) < 1.5 * error(scanned, exact) < 0.1


@pytest.mark.parametrize("rule, low, high", [("confidence", 0.3, 1.05), ("convergence", 0.2, 2.0)])
def test_halting_equals_the_scanned_model(rule, low, high):
    network, tokens = network_of(), texts(5, 24)
    thresholds = jnp.asarray(np.random.default_rng(3).uniform(low, high, tokens.shape))
    truth, taken = run(network, "scanned", tokens, thresholds, rule, loops=6)
    logits, steps = run(network, "launched", tokens, thresholds, rule, loops=6)
    assert len(np.unique(taken)) >= 4
    np.testing.assert_array_equal(steps, taken)
    assert error(logits, truth) < 1e-5


@pytest.mark.parametrize("implementation", ["pallas", "xla"])
def test_one_argument_is_traced_while_the_others_are_numpy_arrays(implementation):
    normal = lambda *shape: np.random.default_rng(0).standard_normal(shape, np.float32)  # noqa: E731
    x, row, square, thresholds = normal(1, 3, 16), normal(16), normal(16, 16), normal(1, 3)
    weights = looped.Weights(
        row, normal(16, 48), square, row, square, square, row, square, square, None, normal(2, 4)
    )

    def block(x, weights):
        return looped.looped_block(
            x, weights, heads=2, loops=3, positions=np.arange(3), ids=np.array([[1, 2, 0]]),
            window=1, thresholds=thresholds, implementation=implementation,
        )  # fmt: skip

    shapes = jax.eval_shape(block, x, weights)
    assert jax.eval_shape(lambda x: block(x, weights), x) == shapes
    for name, value in weights._asdict().items():
        around = lambda weight, name=name: block(x, weights._replace(**{name: weight}))  # noqa: E731
        assert jax.eval_shape(around, value) == shapes


def test_a_program_stops_once_all_its_tokens_have():
    """With more loops than could be run here, were they run."""
    network, tokens = network_of(), texts(4, 32)
    never = run(network, "launched", tokens, jnp.zeros(tokens.shape), loops=2**30)
    once, _ = run(network, "scanned", tokens, loops=1)
    assert (never[1] == 1).all() and error(never[0], once) < 1e-5
    # One row goes on for as long as it may, its neighbours in other programs do not.
    thresholds = jnp.zeros((3, 64)).at[1, 5].set(2.0)
    _, steps = run(network, "launched", texts(3, 64), thresholds, loops=9)
    expected = np.ones((3, 64), int)
    expected[1, 5] = 9
    np.testing.assert_array_equal(steps, expected)


def test_a_token_is_still_once_its_state_does_not_move():
    """Rows of one token, where nobody else's halting matters, loop after loop by hand."""
    network = network_of(loops=8)
    tokens = jnp.arange(13)[:, None]

    @nnx.jit
    def states(network):
        step, (state, _), (shifts, _) = network._loop(
            tokens, 8, None, ADDITION.position_ids(tokens), None
        )

        def once(state, shift):
            stream, _ = step(fused.Stream(state), (shift, None))
            after = fused.apply_pending(stream, None, 0.0)
            return after, after

        return jnp.concatenate([state[None], jax.lax.scan(once, state, shifts)[1]])

    found = np.asarray(states(network))[:, :, 0]
    moved = np.linalg.norm(np.diff(found, axis=0), axis=-1) / np.linalg.norm(found[1:], axis=-1)
    thresholds = np.linspace(0, 1, 13)
    halted = moved <= thresholds
    expected = np.where(halted.any(0), halted.argmax(0) + 1, 8)
    assert len(np.unique(expected)) >= 3
    _, steps = run(
        network, "scanned", tokens, jnp.asarray(thresholds)[:, None], "convergence", loops=8
    )
    np.testing.assert_array_equal(steps[:, 0], expected)


@pytest.mark.parametrize("how", ["scanned", "launched"])
def test_no_token_is_still_before_those_in_front_of_it(how):
    network, tokens = network_of(), texts(3, 12)
    # Rows of 12 share a program: what one waits for is nothing to the others.
    thresholds = jnp.full((3, 12), looped.AT_ONCE["convergence"]).at[1, 4].set(-1.0)
    _, steps = run(network, how, tokens, thresholds, "convergence", loops=6)
    expected = np.ones((3, 12), int)
    expected[1, 4:] = 6
    np.testing.assert_array_equal(steps, expected)


def test_what_follows_a_problem_is_not_waited_for():
    config = make_config(kind="loop", loops=4)
    weights = nnx.state(build(config, random_weights(config)))
    tokens = np.array([ADDITION.encode("1+2=3\n\n\n"), ADDITION.encode("7+9=61\n\n")])
    over = np.asarray(jax.jit(ADDITION.after_end)(tokens))
    assert over.tolist() == [[False] * 5 + [True] * 3, [False] * 6 + [True] * 2]
    run = jax.jit(forward(config, halt=PUBLISHED_HALTING))
    steps = np.asarray(run(weights, jnp.asarray(tokens))[1])
    assert (steps[over] == 1).all() and (steps[~over] > 1).any()


@pytest.mark.parametrize("rule", [None, "confidence", "convergence"])
def test_what_is_broken_in_a_token_is_nothing_to_those_before_it(rule):
    """Nor to other rows of its program."""
    network, tokens = network_of(), texts(3, 12)
    thresholds = None if rule is None else jnp.full((3, 12), 0.6)

    @nnx.jit
    def logits(network, broken):
        embed = LoopLM._embed

        def embedded(self, *given):
            found = embed(self, *given)
            x = found.x.at[1, 7].set(jnp.where(broken, jnp.nan, found.x[1, 7]))
            return found._replace(x=x)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(LoopLM, "_embed", embedded)
            return network.fused_forward(tokens, thresholds, rule=rule or "confidence")

    whole, found = (jax.tree.map(np.asarray, logits(network, broken)) for broken in (False, True))
    others = np.ones((3, 12), bool)
    others[1, 7:] = False
    for value, expected in zip(found, whole, strict=True):
        np.testing.assert_array_equal(value[others], expected[others])
    assert np.isnan(found[0][~others]).all()


def drawn(length: int, width=32, heads=2, dtype="float32", **sizes) -> tuple:
    """A state and weights of any size, and ids."""
    random = np.random.default_rng(length)

    def array(*shape):
        return random.standard_normal(shape, np.float32) / np.float32(shape[0] ** 0.5)

    hidden = sizes.get("hidden", 2 * width)
    weights = looped.Weights(
        norm1=1 + array(width), qkv=3 * array(width, 3 * width), attention_out=array(width, width),
        norm2=1 + array(width), mlp_in=3 * array(width, hidden), mlp_out=array(hidden, width),
        final_norm=1 + array(width), head=array(sizes.get("vocabulary", 13), width),
        steps=array(3, width),
        mlp_value=array(width, hidden) if sizes.get("gated") else None,
        bias_table=array(heads, 4) if sizes.get("biased") else None,
    )  # fmt: skip
    ids = np.random.default_rng(length).integers(0, 6, (2, length), np.int32)
    return array(2, length, width), weights, ids


looped_block = jax.jit(
    looped.looped_block,
    static_argnames=(
        "heads", "loops", "dtype", "rule", "inject_input", "normalize_state", "implementation"
    ),
)  # fmt: skip


@settings(deadline=None, max_examples=6)
@given(
    length=st.integers(1, 64),
    heads=st.sampled_from([1, 2]),
    gated=st.booleans(),
    biased=st.booleans(),
    rule=st.sampled_from([None, *looped.RULES]),
    starts=st.sampled_from([{}, {"inject_input": True}, {"normalize_state": True}]),
)
def test_one_launch_equals_plain_code(length, heads, gated, biased, rule, starts):
    x, weights, ids = drawn(length, heads=heads, gated=gated, biased=biased)
    options = starts | {"heads": heads, "loops": 4, "dtype": jnp.float32}
    options |= {"ids": ids} if biased else {"positions": np.arange(length)}
    if rule:
        thresholds = np.random.default_rng(length).uniform(0.1, 0.5, (2, length))
        options |= {"rule": rule, "thresholds": thresholds.astype("f")}
    found = looped_block(x, weights, **options, implementation="pallas")
    plain = looped_block(x, weights, **options, implementation="xla")
    np.testing.assert_array_equal(found[1], plain[1])
    # Loops pass rounding on, and with a sharp softmax make more of it.
    assert error(found[0], plain[0]) < 1e-4


@pytest.mark.parametrize(
    ("length", "sizes"),
    [
        (300, {}),
        (24, {"width": 288, "heads": 4}),
        (24, {"vocabulary": 100}),
        (24, {"dtype": "float16"}),
    ],
)
def test_what_no_program_holds_goes_loop_by_loop(length, sizes):
    heads = sizes.get("heads", 2)
    x, weights, _ = drawn(length, **sizes)
    options = {"heads": heads, "loops": 3, "dtype": sizes.get("dtype", "float32")}
    with pytest.raises(ValueError, match=r"no program on h100 holds"):
        looped.looped_block(x, weights, **options, implementation="pallas")
    assert not looped.supports_fused(
        length, x.shape[-1], heads, len(weights.head), options["dtype"], with_ids=False
    )

    @jax.jit
    def gradient(x, weights):
        squared = lambda *given: (looped.looped_block(*given, **options)[0] ** 2).mean()  # noqa: E731
        return jax.grad(squared, (0, 1))(x, weights)

    found = looped_block(x, weights, **options)[0]
    assert found.shape == (2, length, len(weights.head))
    plain = looped_block(x, weights, **options, implementation="xla")[0]
    np.testing.assert_array_equal(found, plain)
    gradients = gradient(x, weights)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradients))


def test_no_rows_give_no_logits():
    network = network_of()
    for shape in ((0, 12), (3, 0)):
        for how in ("launched", "scanned"):
            logits, _ = run(network, how, jnp.zeros(shape, jnp.int32))
            assert logits.shape == (*shape, 13)


def test_models_take_it_on_a_gpu_where_it_applies(monkeypatch):
    taken = []

    def launched(self, tokens, thresholds=None, **_):
        taken.append(tokens.shape)
        return "logits", "steps"

    monkeypatch.setattr(LoopLM, "fused_forward", launched)
    network = network_of()
    chosen = {}
    for implementation in (None, "pallas"):
        network.block.attention_implementation = implementation
        for gpu in (False, True):
            monkeypatch.setattr(targets, "kernels_run", lambda gpu=gpu: gpu)
            for length in (64, 129):
                chosen[implementation, gpu, length] = network.supports_fused(texts(1, length))
    assert [case for case, takes in chosen.items() if takes] == [(None, True, 64)]
    network.block.attention_implementation = None
    assert network(texts(2, 64)) == "logits"
    assert network.halting_logits(texts(3, 64), jnp.zeros(())) == ("logits", "steps")
    assert taken == [(2, 64), (3, 64)]


def test_shapes_that_no_program_holds_are_named():
    fits = {"length": 64, "width": 64, "heads": 4, "vocabulary": 13, "dtype": "bfloat16"}
    with targets.compiling_for("rtx5070"):
        assert looped.supports_fused(**fits, with_ids=True)
        for changed in (
            {"length": 129}, {"width": 768, "heads": 12}, {"width": 128, "heads": 1},
            {"vocabulary": 100}, {"dtype": "float16"}, {"width": 60},
        ):  # fmt: skip
            assert not looped.supports_fused(**fits | changed, with_ids=False), changed
        assert not looped.supports_fused(**fits | {"length": 128}, with_ids=True)
    with pytest.raises(ValueError, match=r"x is \(1, 129, 32\)"):
        run(network_of(), "launched", texts(1, 129))
    with pytest.raises(ValueError, match="rule = 'tired'"):
        run(network_of(), "launched", texts(1, 8), jnp.zeros(()), "tired")


def test_every_target_has_tiles_for_the_configurations():
    for target in targets.TARGETS:
        for width, item_size in ((64, 2), (128, 2), (256, 2), (16, 4), (32, 4)):
            line = tiles.settings(target, tiles.LOOPED, tiles.looped_key(64, width, item_size))
            assert line["block_width"] <= width


@needs_gpu
@pytest.mark.parametrize("width", [64, 128, 256])
@pytest.mark.parametrize("length", [24, 64, 128])
def test_compiled_equals_the_scanned_model(width, length):
    """bfloat16 and halting at the configurations' widths; ties with a threshold may differ."""
    exact = network_of(width=width, heads=4, loops=12)
    network = network_of(width=width, heads=4, loops=12, dtype="bfloat16")
    tokens = texts(37, length)
    if width == 256 and length == 128:
        assert not looped.supports_fused(length, width, 4, 13, "bfloat16", with_ids=False)
        return
    truth, _ = run(exact, "scanned", tokens)
    scanned, _ = run(network, "scanned", tokens)
    logits, _ = run(network, "launched", tokens)
    assert error(logits, truth) < 1.5 * error(scanned, truth)
    thresholds = jnp.full(tokens.shape, 0.7)
    _, taken = run(network, "scanned", tokens, thresholds)
    _, steps = run(network, "launched", tokens, thresholds)
    assert len(np.unique(taken)) >= 3 and (steps == taken).mean() > 0.9


@needs_gpu
@pytest.mark.parametrize("halt", [False, True])
def test_the_evaluator_scores_the_same_in_one_launch(half_trained, halt, monkeypatch):
    trained = load(half_trained)
    problems = ADDITION.sample_exact(jax.random.key(0), 1, 300)
    settings = Settings((1,), 300, 0, halt=PUBLISHED_HALTING if halt else None)
    launched = Scorer(trained, settings)(problems)
    score_module._compiled_rows.cache_clear()
    monkeypatch.setattr(fused, "supports_fused", lambda model, tokens: False)
    scanned = Scorer(trained, settings)(problems)
    score_module._compiled_rows.cache_clear()
    # A probability at its threshold, or two of the same size, may come out the other way round.
    assert (launched.correct == scanned.correct).mean() > 0.98
    assert np.abs(launched.loops - scanned.loops).mean() < 0.05
