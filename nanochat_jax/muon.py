"""Muon as one optax transformation: momentum, row equilibration, Polar Express, NorMuon, cautious decay.

Kernels here are (in, out), so that a "row" of the papers and of torch, which belongs to one output, is a column.
Matrices of one shape are orthogonalised together as a stack; all state keeps its per-parameter shape.

Sources: Muon (kellerjordan.github.io/posts/muon), Polar Express (arXiv:2505.16932), NorMuon (arXiv:2510.05491),
cautious weight decay (arXiv:2510.12402); composed as in nanochat/optim.py.
"""

from collections import defaultdict
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from nanochat_jax import sharding
from nanochat_jax.gram import gram

POLAR_EXPRESS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)
NORMUON_BETA2 = 0.9

Schedule = Callable[[jax.Array], jax.Array]


class MuonState(NamedTuple):
    """What Muon carries from update to update, in float32."""

    updates: jax.Array  # int32, how many were made
    momentum: Any  # like the parameters
    second_moment: Any  # of each parameter, one number per output (wide kernels) or per input


def orthogonalize(x_SIO: jax.Array) -> jax.Array:
    """Bring all singular values of each matrix of a stack near one, by five Polar Express iterations.

    Args:
        x_SIO: S matrices, in the dtype to compute in.

    Returns:
        The same shape and dtype.
    """
    rows, cols = x_SIO.shape[-2:]
    squares_S1O = _squares(x_SIO, -2)
    scale_S1O = _total(squares_S1O) / cols**0.5 / jnp.maximum(jnp.sqrt(squares_S1O), 1e-6)
    x_SIO = (x_SIO * (scale_S1O / (_total(squares_S1O * scale_S1O**2) * 1.01 + 1e-6))).astype(x_SIO.dtype)
    wide = rows < cols
    for coefficients in POLAR_EXPRESS:
        polynomial_SMM = gram(gram(x_SIO, of_columns=not wide), coefficients)  # on the short side
        x_SIO = polynomial_SMM @ x_SIO if wide else x_SIO @ polynomial_SMM
    return x_SIO


def _squares(x_SIO: jax.Array, axis: int) -> jax.Array:
    return jnp.sum(x_SIO.astype(jnp.float32) ** 2, axis=axis, keepdims=True)


def _normuon_axis(shape: tuple[int, ...]) -> int:
    """The axis whose mean square is tracked: the longer side keeps a number per entry."""
    return -2 if shape[-1] >= shape[-2] else -1


def _normuon(x_SIO: jax.Array, second_moment: jax.Array) -> tuple[jax.Array, jax.Array]:
    """What evens out the mean squares of a stack's rows or columns, and leaves each matrix norm sqrt(min(I, O)).

    All norms come from one pass over the matrices, which stay as they are.

    Returns:
        Factors for the rows or columns, and the new second moment, both in its shape.
    """
    axis = _normuon_axis(x_SIO.shape)
    squares = _squares(x_SIO, axis)
    target_norm = min(x_SIO.shape[-2:]) ** 0.5
    to_target = target_norm / jnp.maximum(_total(squares), 1e-6)
    squares = squares * to_target**2
    second_moment = second_moment + (1 - NORMUON_BETA2) * (squares / x_SIO.shape[axis] - second_moment)
    even = jax.lax.rsqrt(jnp.maximum(second_moment, 1e-10))
    keep_norm = _total(squares) / jnp.maximum(_total(squares * even**2), 1e-10)
    return to_target * even * keep_norm, second_moment


def _total(squares: jax.Array) -> jax.Array:
    """Of rows' or columns' sums of squares, each matrix's norm."""
    return jnp.sqrt(jnp.sum(squares, axis=(-2, -1), keepdims=True))


def _direction(x_SIO: jax.Array, second_moment: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    x_SIO = orthogonalize(x_SIO)
    return x_SIO, _normuon(x_SIO, second_moment)


def muon(
    learning_rate: Schedule, momentum: Schedule, weight_decay: Schedule, dtype: str
) -> optax.GradientTransformation:
    """The update for matrices; schedules map the update count to a number, dtype is that of the iterations.

    Given a layout (shardings of the gradients, in a tree like theirs), each matrix is orthogonalised on one device.
    """

    def init(params: Any) -> MuonState:
        def second_moment(param: jax.Array) -> jax.Array:
            shape = list(param.shape)
            shape[_normuon_axis(param.shape)] = 1
            return jnp.zeros(shape, jnp.float32)

        return MuonState(jnp.zeros([], jnp.int32), optax.tree.zeros_like(params), jax.tree.map(second_moment, params))

    def update(grads: Any, state: MuonState, params: Any, *, layout: Any = None) -> tuple[Any, MuonState]:
        lr, mu, decay = (schedule(state.updates) for schedule in (learning_rate, momentum, weight_decay))
        buffers = jax.tree.map(lambda m, g: m + (1 - mu) * (g - m), state.momentum, grads)
        nesterov = jax.tree.map(lambda g, m: (g + mu * (m - g)).astype(dtype), grads, buffers)

        leaves, old_moments = jax.tree.leaves(nesterov), jax.tree.leaves(state.second_moment)
        places = [None] * len(leaves) if layout is None else jax.tree.leaves(layout)
        alike: dict[Any, list[int]] = defaultdict(list)
        for index, (leaf, at) in enumerate(zip(leaves, places, strict=True)):
            alike[leaf.shape, at].append(index)
        directions, moments = list(leaves), list(old_moments)
        for (_, at), indices in alike.items():
            stack, moment = (jnp.stack([of[i] for i in indices]) for of in (leaves, old_moments))
            stack, (factor, moment) = sharding.on_whole_matrices(_direction, stack, moment, at)
            for position, i in enumerate(indices):
                directions[i], moments[i] = stack[position] * factor[position], moment[position]

        def delta(direction: jax.Array, param: jax.Array) -> jax.Array:
            shape_lr = lr * max(1.0, param.shape[-1] / param.shape[-2]) ** 0.5
            agrees = (direction * param >= 0).astype(param.dtype)  # decay only where the step shrinks the weight too
            return -shape_lr * (direction + decay * param * agrees)

        treedef = jax.tree.structure(params)
        updates = jax.tree.map(delta, jax.tree.unflatten(treedef, directions), params)
        return updates, MuonState(state.updates + 1, buffers, jax.tree.unflatten(treedef, moments))

    return optax.GradientTransformationExtraArgs(init, update)
