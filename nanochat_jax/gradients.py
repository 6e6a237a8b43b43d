"""A step's gradients over the mesh: who computes what, and when devices talk to each other.

Each device sums the gradients of its own rows over all micro-batches. Parameters cut over `fsdp` are gathered for each
micro-batch, once on the way forward and again on the way back, and their gradients scattered back. Over `data` devices
talk once a step: afterwards each has the sums for its part of the moments. What `tensor` needs is left to the compiler.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from nanochat_jax import sharding
from nanochat_jax.sharding import BATCH_AXES

TABLES = ("wte", "wpe")  # looked up in, in the dtype that they have

# (params, micro-batches (A, B, …), PRNG key) → ((summed loss, other sums), summed gradients)
Gradients = Callable[[Any, Any, jax.Array], tuple[tuple[jax.Array, dict[str, jax.Array]], Any]]


def make_gradients(loss_fn: Callable[..., Any], like: Any, gather_dtype: str = "float32") -> Gradients:
    """Gradients of a loss that is a sum over rows.

    Args:
        loss_fn: as state.LossFn.
        like: abstract parameters, with shardings.
        gather_dtype: of matrices on their way over fsdp; what the model computes in.

    Returns:
        A function for use inside jax.jit, whose gradients lie as the moments, in float32 where devices or micro-batches
        were added up.
    """
    mesh = jax.tree.leaves(like)[0].sharding.mesh
    if sharding.batch_devices(mesh) == 1:

        def whole(params: Any, batch: Any, key: jax.Array) -> Any:
            with sharding.on(mesh):
                return _accumulated(loss_fn, params, batch, key)

        return whole
    several = tuple(name for name in BATCH_AXES if mesh.shape[name] > 1)  # in one order: all processes compile alike
    manual = {name for name in mesh.axis_names if name in BATCH_AXES or mesh.shape[name] == 1}
    moments = sharding.moment_shardings(like)
    before = jax.tree.map(lambda leaf: _only(manual, leaf.sharding), like)
    after = jax.tree.map(lambda at: _only(manual, at), moments)

    def gathered_loss(params: Any, micro: Any, key: jax.Array) -> Any:
        return loss_fn(jax.tree_util.tree_map_with_path(gather, params, like), micro, key)

    def gather(path: tuple[Any, ...], x: jax.Array, like: Any) -> jax.Array:
        dtype = x.dtype if path[-1].key in TABLES else jnp.dtype(gather_dtype)
        return x if _axis_of("fsdp", like.sharding) is None else _gather(like.sharding, dtype, x)

    def local(params: Any, batch: Any, key: jax.Array, part: jax.Array) -> Any:
        loss = loss_fn
        if mesh.shape["fsdp"] > 1:  # gathered parameters are not kept until the way back
            loss = jax.checkpoint(gathered_loss, policy=lambda primitive, *_, **__: primitive.name != "all_gather")
        sums, grads = _accumulated(loss, params, batch, jax.random.fold_in(key, part[0]), each_anew=loss is not loss_fn)
        return jax.lax.psum(sums, several), jax.tree.map(reduce, grads, like, moments)

    def reduce(grad: jax.Array, like: Any, after: NamedSharding) -> jax.Array:
        """The sum over devices that had other rows, as far as they have not been added up for each micro-batch."""
        grad, axis = grad.astype(jnp.float32), _axis_of("data", after)
        if axis is not None:
            scatter = partial(jax.lax.psum_scatter, axis_name="data", scatter_dimension=axis, tiled=True)
            grad = _within_tensor(scatter, after)(grad)
        done = {"data"} if axis is not None else set()
        done |= {"fsdp"} if _axis_of("fsdp", like.sharding) is not None else set()
        left = tuple(name for name in several if name not in done)
        return jax.lax.psum(grad, left) if left else grad

    parts = jnp.arange(sharding.batch_devices(mesh))
    summed = jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(before, PartitionSpec(None, BATCH_AXES), PartitionSpec(), PartitionSpec(BATCH_AXES)),
        out_specs=(PartitionSpec(), after),
        axis_names=manual,
        check_vma=False,
    )
    return lambda params, batch, key: summed(params, batch, key, parts)


def _accumulated(
    loss_fn: Callable[..., Any], params: Any, batch: Any, key: jax.Array, *, each_anew: bool = False
) -> Any:
    """Sums over micro-batches; each_anew: what is made of the parameters is not kept from one to the next."""
    grad_fn = jax.value_and_grad(loss_fn, has_aux=True)
    accumulate = next(iter(batch.values())).shape[0]

    def sums(index: jax.Array | int, micro: Any) -> Any:
        own_params, micro = jax.lax.optimization_barrier((params, micro)) if each_anew else (params, micro)
        return grad_fn(own_params, micro, jax.random.fold_in(key, index))

    def accumulate_one(total: Any, item: tuple[jax.Array, Any]) -> tuple[Any, None]:
        return jax.tree.map(lambda a, b: a + b.astype(a.dtype), total, sums(*item)), None

    if accumulate == 1:
        return sums(0, jax.tree.map(lambda x: x[0], batch))
    # in float32: bfloat16 would lose the small terms of a long sum
    one = jax.eval_shape(sums, 0, jax.tree.map(lambda x: x[0], batch))
    start = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.promote_types(x.dtype, jnp.float32)), one)
    return jax.lax.scan(accumulate_one, start, (jnp.arange(accumulate), batch))[0]


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _gather(at: NamedSharding, dtype: jnp.dtype, x: jax.Array) -> jax.Array:
    """A parameter, whole over fsdp; its gradient is added up in float32."""
    return _gather_forward(at, dtype, x)[0]


def _gather_forward(at: NamedSharding, dtype: jnp.dtype, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    gather = partial(jax.lax.all_gather, axis_name="fsdp", axis=_axis_of("fsdp", at), tiled=True)
    return _within_tensor(gather, at)(x.astype(dtype)), jnp.empty(0, x.dtype)


def _gather_backward(at: NamedSharding, dtype: jnp.dtype, like: jax.Array, grad: jax.Array) -> tuple[jax.Array]:
    axis = _axis_of("fsdp", at)
    scatter = partial(jax.lax.psum_scatter, axis_name="fsdp", scatter_dimension=axis, tiled=True)
    return (_within_tensor(scatter, at)(grad.astype(jnp.float32)).astype(like.dtype),)


_gather.defvjp(_gather_forward, _gather_backward)


def _within_tensor(function: Callable[[jax.Array], jax.Array], at: NamedSharding) -> Callable[[jax.Array], jax.Array]:
    """A collective, on each part that `tensor` cuts: the compiler would put the parts together first."""
    if at.mesh.shape["tensor"] == 1:
        return function
    spec = _only({"tensor"}, at)
    return jax.shard_map(function, in_specs=spec, out_specs=spec, axis_names={"tensor"}, check_vma=False)


def _axis_of(name: str, at: NamedSharding) -> int | None:
    return next((i for i, entry in enumerate(at.spec) if name in sharding.axes_of(entry)), None)


def _only(names: set[str], at: NamedSharding) -> PartitionSpec:
    """The part of a spec that some mesh axes have in it."""
    kept = (tuple(name for name in sharding.axes_of(entry) if name in names) for entry in at.spec)
    return PartitionSpec(*(entry or None for entry in kept))
