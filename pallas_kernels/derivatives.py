"""Derivatives of what kernels compute, of every kind and order: `differentiable`.

JAX differentiates no kernel. By hand it can be told how gradients go back (`jax.custom_vjp`), which
forbids forward mode, or how tangents go forward (`jax.custom_jvp`), which kernels have no part in.
Here tangents are told, as one linear operation: evaluated, it is plain `jnp`; transposed, it is the
backward kernels. What is differentiated further is plain `jnp`.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_derivatives import SymbolicZero
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir


def differentiable(
    run: Callable, plain: Callable, gradient: tuple[Callable, Callable] | None = None
) -> Callable:
    """`run` with derivatives.

    All functions here take `(given, others, options)`: two pytrees of arrays, and what is hashable.

    Args:
      run: gives a pytree of arrays; taken where nothing is differentiated.
      plain: the same in what JAX differentiates.
      gradient: what makes first gradients of `given`. The first of it, forward, gives the outputs,
        all of floating point, and what is to be kept. The second, `backward(given, others, kept,
        d_out, options)`, gives the gradients, shaped as given, with None for zeros. None leaves all
        derivatives to `plain`.

    Returns:
      A function like `run`. Gradients of `given` come from `gradient`; those of `others`, forward
      mode and all higher derivatives from `plain`.
    """

    def keeping(given, others, options):
        """What forward gives. What it keeps has no derivative: `pulled` needs none."""
        structure = []

        @jax.custom_jvp
        def flat(given, others):
            out, kept = gradient[0](given, others, options)
            leaves, structure[:] = jax.tree.flatten(kept)[0], [jax.tree.structure(kept)]
            return out, leaves

        @functools.partial(flat.defjvp, symbolic_zeros=True)
        def _(primals, tangents):
            out, kept = keeping(*primals, options)
            leaves = jax.tree.leaves(kept)
            d_out = tangents_of(*map(_Moved, primals, tangents), out, kept, options)
            return (out, leaves), (d_out, [_zeros(x) for x in leaves])

        out, leaves = flat(given, others)
        return out, jax.tree.unflatten(structure[0], leaves)

    @functools.partial(jax.custom_jvp, nondiff_argnums=(4, 5))
    def pulled(given, others, kept, d_out, places, options):
        """The gradients of those leaves of given that stand at `places`."""
        made = gradient[1](given, others, kept, d_out, options)
        filled = jax.tree.map(
            lambda made, given: jax.tree.map(jnp.zeros_like, given) if made is None else made,
            made,
            given,
            is_leaf=lambda made: made is None,
        )
        leaves = jax.tree.leaves(filled)
        return [leaves[place] for place in places]

    @functools.partial(pulled.defjvp, symbolic_zeros=True)
    def _(places, options, primals, tangents):
        def again(primals):
            given, others, d_out = primals
            at = _Leaves(given, places)
            _, pull = jax.vjp(lambda x: plain(at.replaced(x), others, options), at.values)
            return pull(d_out)[0]

        made = pulled(*primals, places, options)
        # What was kept follows from the rest, of which all is made again.
        given, others, _, d_out = primals
        d_given, d_others, _, d_d_out = tangents
        moved = _Moved((given, others, d_out), (d_given, d_others, d_d_out))
        return made, moved.pushed(again)[1]

    def tangents_of(given, others, out, kept, options):
        """The tangents of the outputs; of given and of others, which of them are `_Moved`."""
        parts = [jax.tree.map(_zeros, out)]
        if given.values:
            parts.append(_linear(given, others.tree, kept, out, plain, pulled, options))
        if others.values:
            parts.append(others.pushed(lambda others: plain(given.tree, others, options))[1])
        return jax.tree.map(lambda *x: functools.reduce(jnp.add, x), *parts[1:] or parts)

    @functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
    def function(given, others, options):
        return run(given, others, options)

    @functools.partial(function.defjvp, symbolic_zeros=True)
    def _(options, primals, tangents):
        given, others = map(_Moved, primals, tangents)
        if gradient is None or not given.values:
            return _Moved(primals, tangents).pushed(lambda primals: plain(*primals, options))
        out, kept = keeping(*primals, options)
        return out, tangents_of(given, others, out, kept, options)

    return function


def by_vjp(function: Callable) -> tuple[Callable, Callable]:
    """The `gradient` of what JAX can go back through, but not otherwise differentiate."""

    def forward(given, others, options):
        return jax.vjp(lambda given: function(given, others, options), given)

    def backward(given, others, pull, d_out, options):
        return pull(d_out)[0]

    return forward, backward


class _Leaves:
    """Some leaves of a pytree, by their places."""

    def __init__(self, tree, places):
        self.tree, self.places = tree, tuple(places)
        self._leaves, self._structure = jax.tree.flatten(tree)
        self.values = [self._leaves[place] for place in self.places]

    def replaced(self, values):
        """The tree with others in their places."""
        leaves = list(self._leaves)
        for place, value in zip(self.places, values, strict=True):
            leaves[place] = value
        return jax.tree.unflatten(self._structure, leaves)


class _Moved(_Leaves):
    """The leaves of a pytree that have a tangent, and these tangents."""

    def __init__(self, tree, tangents):
        tangents = jax.tree.leaves(tangents)
        moved = [not isinstance(x, SymbolicZero) and x.dtype != jax.dtypes.float0 for x in tangents]
        super().__init__(tree, np.flatnonzero(moved).tolist())
        self.tangents = [tangents[place] for place in self.places]

    def pushed(self, function: Callable):
        """What a function gives for the tree, and the tangents of that."""
        return jax.jvp(lambda values: function(self.replaced(values)), [self.values], [self.tangents])


def _zeros(x):
    """The tangent of what does not move."""
    if jnp.issubdtype(x.dtype, jnp.inexact):
        return jnp.zeros_like(x)
    return np.zeros(x.shape, jax.dtypes.float0)


def _linear(given: _Moved, others, kept, out, plain, pulled, options):
    """The tangents of the outputs of `plain`, transposed by `pulled`."""
    residuals, structure = jax.tree.flatten((given.tree, others, kept))
    places, of_out = given.places, jax.tree.structure(out)

    def push(residuals, tangents):
        tree, others, _ = jax.tree.unflatten(structure, residuals)
        at = _Leaves(tree, places)
        moved = jax.jvp(lambda x: plain(at.replaced(x), others, options), [at.values], [tangents])
        return jax.tree.leaves(moved[1])

    def pull(residuals, d_out):
        tree, others, kept = jax.tree.unflatten(structure, residuals)
        return pulled(tree, others, kept, jax.tree.unflatten(of_out, d_out), places, options)

    made = _linear_p.bind(
        *residuals,
        *given.tangents,
        push=push,
        pull=pull,
        count=len(residuals),
        avals=tuple(map(jax.typeof, jax.tree.leaves(out))),
    )
    return jax.tree.unflatten(of_out, made)


# Linear in what follows the first `count` arguments: `push(residuals, tangents)`, whose transpose
# is `pull(residuals, gradients)`. avals: types of what it gives.
_linear_p = Primitive("linear_by_kernels")
_linear_p.multiple_results = True


def _evaluated(*arguments, push, pull, count, avals):
    return push(list(arguments[:count]), list(arguments[count:]))


_linear_p.def_impl(_evaluated)
_linear_p.def_abstract_eval(lambda *_, avals, **__: avals)
mlir.register_lowering(_linear_p, mlir.lower_fun(_evaluated, multiple_results=True))


def _jvp(primals, tangents, **fixed):
    place = [i for i, x in enumerate(tangents) if type(x) is not ad.Zero]
    at = _Leaves(list(primals), place)
    evaluated = lambda values: _evaluated(*at.replaced(values), **fixed)  # noqa: E731
    moved = jax.jvp(evaluated, [at.values], [[tangents[i] for i in place]])
    return _linear_p.bind(*primals, **fixed), moved[1]


def _transposed(d_out, *arguments, push, pull, count, avals):
    gradients = pull(list(arguments[:count]), [ad.instantiate_zeros(x) for x in d_out])
    return [None] * count + [
        gradient if ad.is_undefined_primal(x) else None
        for x, gradient in zip(arguments[count:], gradients, strict=True)
    ]


def _batched(arguments, axes, *, push, pull, count, avals):
    residuals, of_residuals = list(arguments[:count]), list(axes[:count])
    size = next(
        x.shape[axis] for x, axis in zip(arguments, axes, strict=True) if axis is not None
    )
    tangents = [
        jnp.broadcast_to(x, (size, *x.shape)) if axis is None else jnp.moveaxis(x, axis, 0)
        for x, axis in zip(arguments[count:], axes[count:], strict=True)
    ]
    made = _linear_p.bind(
        *residuals,
        *tangents,
        push=jax.vmap(push, (of_residuals, 0)),
        pull=jax.vmap(pull, (of_residuals, 0)),
        count=count,
        avals=tuple(jax.core.ShapedArray((size, *x.shape), x.dtype) for x in avals),
    )
    return made, [0] * len(made)


ad.primitive_jvps[_linear_p] = _jvp
ad.primitive_transposes[_linear_p] = _transposed
batching.primitive_batchers[_linear_p] = _batched
