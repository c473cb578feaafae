"""Derivatives of what kernels compute, of every kind and order: `differentiable`.

JAX differentiates no kernel. By hand one can define how gradients go back (`jax.custom_vjp`), which
forbids forward mode, or how tangents go forward (`jax.custom_jvp`), which kernels have no part in.
Here tangents are defined, as one linear operation: evaluated, it is plain `jnp`; transposed, it is
the backward kernels. What is differentiated further is plain `jnp`.

Tangents are those of a primitive of our own (`_call`), since JAX (0.10 and 0.11) forgets a
`jax.custom_jvp` inside a scan where that is differentiated twice.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive, jaxpr_as_fun
from jax.interpreters import ad, batching, mlir


def differentiable(
    run: Callable, plain: Callable, gradient: tuple[Callable, Callable] | None = None
) -> Callable:
    """`run` with derivatives.

    All functions here take `(given, others, options)`: two pytrees of arrays, and what is fixed.

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

    def function(given, others, options):
        def rule(given, others):
            if gradient is None or not given.values:
                return _pushed(lambda *arguments: plain(*arguments, options), given, others)
            out, kept = keeping(given.tree, others.tree, options)
            return out, tangents(given, others, out, kept, options)

        return _call(lambda *arguments: run(*arguments, options), rule, (given, others))

    def keeping(given, others, options):
        """What forward gives. What it keeps gets no tangents: `pulled` asks for none."""

        def rule(given, others):
            out, kept = keeping(given.tree, others.tree, options)
            still = jax.tree.map(lambda _: _STILL, kept)
            return (out, kept), (tangents(given, others, out, kept, options), still)

        return _call(lambda *arguments: gradient[0](*arguments, options), rule, (given, others))

    def tangents(given: _Moved, others: _Moved, out, kept, options):
        """Those of the outputs."""
        parts = []
        if given.values:
            parts.append(linear(given, others.tree, out, kept, options))
        if others.values:
            plainly = lambda others: plain(given.tree, others, options)  # noqa: E731
            parts.append(_pushed(plainly, others)[1])
        return jax.tree.map(lambda *x: sum(x[1:], x[0]), *parts)

    def linear(given: _Moved, others, out, kept, options):
        """What those of given, as one operation, add to the tangents of the outputs."""
        places, structure = given.places, jax.tree.structure(out)

        def push(residuals, moved):
            tree, others, _ = residuals
            at = _Leaves(tree, places)
            plainly = lambda values: plain(at.replaced(values), others, options)  # noqa: E731
            return jax.tree.leaves(jax.jvp(plainly, [at.values], [moved])[1])

        def pull(residuals, d_out):
            return pulled(*residuals, jax.tree.unflatten(structure, d_out), places, options)

        rule = lambda *moved: _pushed(push, *moved)  # noqa: E731
        arguments = (given.tree, others, kept), given.tangents
        return jax.tree.unflatten(structure, _call(push, rule, arguments, transposed=pull))

    def pulled(given, others, kept, d_out, places, options):
        """Gradients of those leaves of given that stand at `places`."""

        def run(given, others, kept, d_out):
            made = gradient[1](given, others, kept, d_out, options)
            filled = jax.tree.map(
                lambda made, given: jax.tree.map(jnp.zeros_like, given) if made is None else made,
                made,
                given,
                is_leaf=lambda made: made is None,
            )
            return _Leaves(filled, places).values

        def plainly(given, others, d_out):
            at = _Leaves(given, places)
            _, pull = jax.vjp(lambda values: plain(at.replaced(values), others, options), at.values)
            return pull(d_out)[0]

        def rule(given, others, kept, d_out):
            # What was kept follows from the rest, of which all is made again.
            made = pulled(given.tree, others.tree, kept.tree, d_out.tree, places, options)
            return made, _pushed(plainly, given, others, d_out)[1]

        return _call(run, rule, (given, others, kept, d_out))

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
        self.tree, self.places = tree, places
        self._leaves, self._structure = jax.tree.flatten(tree)
        self.values = [self._leaves[place] for place in places]

    def replaced(self, values):
        """The tree with others in their places."""
        leaves = list(self._leaves)
        for place, value in zip(self.places, values, strict=True):
            leaves[place] = value
        return jax.tree.unflatten(self._structure, leaves)


class _Moved(_Leaves):
    """The leaves of a pytree that have a tangent, and these tangents; `_STILL` is none."""

    def __init__(self, tree, tangents):
        super().__init__(tree, [i for i, tangent in enumerate(tangents) if tangent is not _STILL])
        self.tangents = [tangents[place] for place in self.places]


# In the place of a tangent of what does not move.
_STILL = object()


def _pushed(function: Callable, *arguments: _Moved):
    """What a function gives for the trees of its arguments, and the tangents of that."""

    def of_moved(*values):
        return function(*(x.replaced(y) for x, y in zip(arguments, values, strict=True)))

    out, tangents = jax.jvp(
        of_moved, [x.values for x in arguments], [x.tangents for x in arguments]
    )
    still = lambda x: _STILL if x.dtype == jax.dtypes.float0 else x  # noqa: E731
    return out, jax.tree.map(still, tangents)


def _call(run: Callable, rule: Callable, arguments: tuple, transposed: Callable | None = None):
    """`run(*arguments)` as one operation that JAX does not look into to differentiate it.

    Args:
      run: gives a pytree of arrays.
      rule: given each argument as `_Moved`, gives the same and its tangents.
      arguments: pytrees of arrays.
      transposed: of an operation that is linear in the last of two arguments: of the first one and
        the gradients of what `run` gives, a list, the gradients of the last one, a list too.
    """
    leaves, structure = jax.tree.flatten(arguments)

    def flat_run(*leaves):
        return run(*jax.tree.unflatten(structure, leaves))

    def flat_rule(primals, tangents):
        moved, tangents = [], list(tangents)
        for argument in jax.tree.unflatten(structure, primals):
            count = len(jax.tree.leaves(argument))
            moved.append(_Moved(argument, tangents[:count]))
            del tangents[:count]
        return list(map(jax.tree.leaves, rule(*moved)))

    fixed, pull = 0, None
    if transposed is not None:
        first = jax.tree.structure(arguments[0])
        fixed = first.num_leaves
        pull = lambda residuals, d_out: transposed(jax.tree.unflatten(first, residuals), d_out)  # noqa: E731
    jaxpr, out = jax.make_jaxpr(flat_run, return_shape=True)(*leaves)
    made = _call_p.bind(*leaves, jaxpr=jaxpr, rule=flat_rule, pull=pull, fixed=fixed)
    return jax.tree.unflatten(jax.tree.structure(out), made)


# jaxpr: what is computed. rule: of primals and tangents. pull: of the first, `fixed` arguments and
# gradients of what is computed, the gradients of the others; None where it is not linear in these.
_call_p = Primitive("call_of_kernels")
_call_p.multiple_results = True


def _evaluated(*arguments, jaxpr, **_):
    return jaxpr_as_fun(jaxpr)(*arguments)


def _differentiated(primals, tangents, *, rule, **_):
    moved = [_STILL if type(tangent) is ad.Zero else tangent for tangent in tangents]
    out, tangents = rule(primals, moved)
    return out, [
        ad.Zero(jax.typeof(x).to_tangent_aval()) if tangent is _STILL else tangent
        for x, tangent in zip(out, tangents, strict=True)
    ]


def _transposed(d_out, *arguments, pull, fixed, **_):
    gradients = pull(list(arguments[:fixed]), list(map(ad.instantiate_zeros, d_out)))
    return [None] * fixed + [
        gradient if ad.is_undefined_primal(x) else None
        for x, gradient in zip(arguments[fixed:], gradients, strict=True)
    ]


def _batched(arguments, axes, *, jaxpr, rule, pull, fixed):
    size = next(x.shape[axis] for x, axis in zip(arguments, axes, strict=True) if axis is not None)
    arguments, axes = list(arguments), list(axes)
    if pull is not None:
        for i in range(fixed, len(axes)):
            x, axis = arguments[i], axes[i]
            wide = (size, *x.shape)
            arguments[i] = jnp.broadcast_to(x, wide) if axis is None else jnp.moveaxis(x, axis, 0)
            axes[i] = 0
        pull = jax.vmap(pull, (axes[:fixed], 0))

    def of_all(primals, tangents):
        places = [i for i, tangent in enumerate(tangents) if tangent is not _STILL]

        def of_one(primals, moved):
            everywhere = [_STILL] * len(primals)
            for place, tangent in zip(places, moved, strict=True):
                everywhere[place] = tangent
            out, tangents = rule(primals, everywhere)
            return out, [None if tangent is _STILL else tangent for tangent in tangents]

        moved = [tangents[place] for place in places]
        of_moved = [axes[place] for place in places]
        out, tangents = jax.vmap(of_one, (axes, of_moved))(list(primals), moved)
        return out, [_STILL if tangent is None else tangent for tangent in tangents]

    jaxpr = jax.make_jaxpr(jax.vmap(jaxpr_as_fun(jaxpr), tuple(axes)))(*arguments)
    made = _call_p.bind(*arguments, jaxpr=jaxpr, rule=of_all, pull=pull, fixed=fixed)
    return made, [0] * len(made)


_call_p.def_impl(_evaluated)
_call_p.def_abstract_eval(lambda *_, jaxpr, **__: jaxpr.out_avals)
mlir.register_lowering(_call_p, mlir.lower_fun(_evaluated, multiple_results=True))
ad.primitive_jvps[_call_p] = _differentiated
ad.primitive_transposes[_call_p] = _transposed
batching.primitive_batchers[_call_p] = _batched
