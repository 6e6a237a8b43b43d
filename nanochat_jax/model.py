"""nanochat's transformer in Flax Linen, behind plain functions: init_params, trunk, head, unembed, forward.

The same functions serve GPT-2 (gpt2.py): the type of the config decides. Parameters are a nested dict of arrays;
other files see no Module. Matrices are (in, out); torch's are (out, in).
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from nanochat_jax import attention, layers, row_kernels, sharding
from nanochat_jax.cache import KVCache
from nanochat_jax.config import SMEAR_CHANNELS, VE_GATE_CHANNELS, Architecture, LayerSpec, ModelConfig, from_json
from nanochat_jax.gpt2 import GPT2, GPT2Config
from nanochat_jax.layers import LOGIT_CAP, Compute, RowFunctions, linear, param, rms_norm
from nanochat_jax.losses import cross_entropy, softcap

QK_SCALE = 1.2  # of normed queries and keys: sharper attention than unit vectors allow

Params = dict[str, Any]
Rotation = tuple[jax.Array, jax.Array]  # cosines and sines
Mix = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]  # queries, keys, values → their attention


def _normal(std: float) -> nn.initializers.Initializer:
    return nn.initializers.normal(std)


def _uniform(limit: float) -> nn.initializers.Initializer:
    return lambda key, shape, dtype: jax.random.uniform(key, shape, dtype, -limit, limit)


def _positive(limit: float) -> nn.initializers.Initializer:
    return lambda key, shape, dtype: jax.random.uniform(key, shape, dtype, 0.0, limit)


def _linspace(start: float, stop: float) -> nn.initializers.Initializer:
    return lambda key, shape, dtype: jnp.linspace(start, stop, shape[0], dtype=dtype)


class Attention(nn.Module):
    """Queries, keys and values, mixed by `mix`, and the projection behind them: thrice (B, T, D) → (B, T, D)."""

    cfg: ModelConfig
    spec: LayerSpec
    compute: Compute
    rows: RowFunctions

    @nn.compact
    def __call__(
        self, for_q_BTD: jax.Array, for_k_BTD: jax.Array, for_v_BTD: jax.Array,
        tokens_BT: jax.Array, rotation: Rotation, mix: Mix,
    ) -> jax.Array:  # fmt: skip
        cfg, (B, T) = self.cfg, tokens_BT.shape
        q_dim, kv_dim = cfg.n_head * cfg.head_dim, cfg.n_kv_head * cfg.head_dim
        uniform = _uniform((3 / cfg.n_embd) ** 0.5)
        linear = partial(layers.linear, fp8=self.compute.fp8)
        q_BTNH = linear(for_q_BTD, param(self, "q", uniform, (cfg.n_embd, q_dim), ("embed", "heads")))
        k_BTKH = linear(for_k_BTD, param(self, "k", uniform, (cfg.n_embd, kv_dim), ("embed", "kv_heads")))
        v_BTKH = linear(for_v_BTD, param(self, "v", uniform, (cfg.n_embd, kv_dim), ("embed", "kv_heads")))
        q_BTNH = q_BTNH.reshape(B, T, cfg.n_head, cfg.head_dim)
        k_BTKH, v_BTKH = (x.reshape(B, T, cfg.n_kv_head, cfg.head_dim) for x in (k_BTKH, v_BTKH))
        if self.spec.has_value_embed:
            shape = (cfg.padded_vocab_size, kv_dim)
            table = param(self, "value_embed", uniform, shape, ("value_vocab", "kv_heads"), self.compute.dtype)
            gate = param(self, "ve_gate", _positive(0.02), (VE_GATE_CHANNELS, cfg.n_kv_head), (None, "kv_heads"))
            gate_BTK1 = 3 * jax.nn.sigmoid(layers.linear(for_v_BTD[..., :VE_GATE_CHANNELS], gate))[..., None]
            rows_BTKH = layers.embed(table, tokens_BT).astype(v_BTKH.dtype).reshape(v_BTKH.shape)
            v_BTKH += gate_BTK1 * layers.turn_rows(rows_BTKH)
        q_BTNH, k_BTKH = (self.rows.rotate_and_norm(x, *rotation, QK_SCALE) for x in (q_BTNH, k_BTKH))
        mixed_BTNH = mix(q_BTNH, k_BTKH, v_BTKH)
        proj = param(self, "proj", nn.initializers.zeros, (q_dim, cfg.n_embd), ("heads", "embed"))
        if self.compute.attention.startswith("splash"):  # a TPU would copy to bring the heads beside each other
            proj_NHD = proj.astype(mixed_BTNH.dtype).reshape(cfg.n_head, cfg.head_dim, cfg.n_embd)
            return jnp.einsum("BTNH,NHD->BTD", mixed_BTNH, proj_NHD)
        return linear(mixed_BTNH.reshape(B, T, q_dim), proj)


class MLP(nn.Module):
    """Two products around a squared ReLU: (B, T, D) → (B, T, D)."""

    cfg: ModelConfig
    compute: Compute

    @nn.compact
    def __call__(self, h_BTD: jax.Array) -> jax.Array:
        D = self.cfg.n_embd
        limit = 0.4 * (3 / D) ** 0.5
        linear = partial(layers.linear, fp8=self.compute.fp8)
        h_BTF = layers.relu2(linear(h_BTD, param(self, "fc", _uniform(limit), (D, 4 * D), ("embed", "mlp"))))
        return linear(h_BTF, param(self, "proj", nn.initializers.zeros, (4 * D, D), ("mlp", "embed")))


class Block(nn.Module):
    """A layer: attention and MLP, each added to what its norm has read."""

    cfg: ModelConfig
    spec: LayerSpec
    compute: Compute
    rows: RowFunctions

    @nn.compact
    def __call__(self, x_BTD: jax.Array, tokens_BT: jax.Array, rotation: Rotation, mix: Mix) -> jax.Array:
        attn = Attention(self.cfg, self.spec, self.compute, self.rows, name="attn")
        # Thrice the same: a kernel adds up the gradients of results that are told apart, and XLA those of one.
        x_BTD, for_q_BTD, for_k_BTD, for_v_BTD = self.rows.keep_and_norm(x_BTD, 3)
        x_BTD += attn(for_q_BTD, for_k_BTD, for_v_BTD, tokens_BT, rotation, mix)
        x_BTD, normed_BTD = self.rows.keep_and_norm(x_BTD, 1)
        return x_BTD + MLP(self.cfg, self.compute, name="mlp")(normed_BTD)


class Transformer(nn.Module):
    """Declares the parameters and runs the layers; outside of this file only as trunk and init_params."""

    cfg: ModelConfig
    compute: Compute

    @nn.compact
    def __call__(
        self,
        tokens_BT: jax.Array,
        segment_ids_BT: jax.Array | None,
        cache: KVCache | None,
        counts_B: jax.Array,
    ) -> tuple[jax.Array, KVCache | None]:
        cfg, dtype = self.cfg, jnp.dtype(self.compute.dtype)
        wte = param(self, "wte", _normal(0.8), (cfg.padded_vocab_size, cfg.n_embd), ("vocab", "embed"), dtype)
        resid_lambdas = param(self, "resid_lambdas", _linspace(1.15, 1.05), (cfg.n_layer,), (None,))
        x0_lambdas = param(self, "x0_lambdas", _linspace(0.20, 0.05), (cfg.n_layer,), (None,))
        smear_gate = param(self, "smear_gate", _positive(0.02), (SMEAR_CHANNELS, 1), (None, None))
        smear_lambda = param(self, "smear_lambda", nn.initializers.zeros, (1,), (None,))
        backout_lambda = param(self, "backout_lambda", nn.initializers.constant(0.2), (1,), (None,))

        x_BTD = rms_norm(layers.embed(wte, tokens_BT).astype(dtype))
        embed_BTD, first_BD = x_BTD, jnp.zeros_like(x_BTD[:, 0]) if cache is None else cache.last_embed_BD
        previous_BTD = jnp.concatenate([first_BD[:, None], x_BTD[:, :-1]], axis=1)
        if segment_ids_BT is not None:
            same_BT = segment_ids_BT == jnp.pad(segment_ids_BT, ((0, 0), (1, 0)), constant_values=-1)[:, :-1]
            previous_BTD *= same_BT[..., None].astype(dtype)
        x_BTD = layers.smear(x_BTD, previous_BTD, smear_gate, smear_lambda[0])

        positions_BT = jnp.arange(tokens_BT.shape[1], dtype=jnp.int32)[None, :]
        if cache is not None:
            positions_BT = positions_BT + cache.lengths_B[:, None]
        rotation = layers.rotary(positions_BT, cfg.head_dim, dtype)

        by_kernels = cache is None and self.compute.attention == "cudnn" and not sharding.auto_axes()
        rows = row_kernels.KERNELS if by_kernels and row_kernels.fits(x_BTD, cfg.head_dim) else layers.PLAIN
        x0_BTD, new_keys, new_values = x_BTD, [], []
        for i, spec in enumerate(cfg.layer_specs()):

            def mix(
                q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, i: int = i, spec: LayerSpec = spec
            ) -> jax.Array:
                if cache is None:
                    return attention.attend(
                        q_BTNH, k_BTKH, v_BTKH,
                        window=spec.window, segment_ids_BT=segment_ids_BT, backend=self.compute.attention,
                    )  # fmt: skip
                mixed, keys, values = attention.attend_cached(
                    q_BTNH, k_BTKH, v_BTKH, cache, i, counts_B,
                    window=spec.window, backend=self.compute.attention,
                )  # fmt: skip
                new_keys.append(keys)
                new_values.append(values)
                return mixed

            x_BTD = (resid_lambdas[i] * x_BTD + x0_lambdas[i] * x0_BTD).astype(dtype)
            x_BTD = Block(cfg, spec, self.compute, rows, name=f"block_{i}")(x_BTD, tokens_BT, rotation, mix)
            if i == cfg.n_layer // 2:
                midway_BTD = x_BTD
        # In one or two layers the midway point is the end: backout would scale x, which the norm undoes, and its
        # vanishing gradient would let the lambda drift past 1, where x changes sign.
        if cfg.n_layer > 2:
            x_BTD -= backout_lambda[0].astype(dtype) * midway_BTD
        x_BTD = rms_norm(x_BTD)
        # Not used here: declared beside the rest, applied by unembed, so that losses can fuse it.
        param(self, "lm_head", _normal(0.001), (cfg.n_embd, cfg.padded_vocab_size), ("embed", "vocab"))
        if cache is None:
            return x_BTD, None
        last_BD = jnp.take_along_axis(embed_BTD, jnp.maximum(counts_B - 1, 0)[:, None, None], axis=1)[:, 0]
        last_BD = jnp.where((counts_B > 0)[:, None], last_BD, cache.last_embed_BD)
        return x_BTD, KVCache(tuple(new_keys), tuple(new_values), cache.lengths_B + counts_B, last_BD)


def _module(cfg: Architecture, compute: Compute | None) -> nn.Module:
    compute = compute or layers.default_compute()
    if isinstance(cfg, GPT2Config):
        return GPT2(cfg, compute)
    assert isinstance(cfg, ModelConfig)
    return Transformer(cfg, compute)


def config_from_json(values: dict[str, Any]) -> Architecture:
    """The architecture that a stored config describes."""
    if "dropout" in values:
        return from_json(GPT2Config, values, "model")
    return from_json(ModelConfig, values, "model")


def _boxed_params(key: jax.Array, cfg: Architecture, compute: Compute | None) -> Params:
    return _module(cfg, compute).init(key, jnp.zeros((1, 1), jnp.int32), None, None, jnp.ones(1, jnp.int32))["params"]


def init_params(key: jax.Array, cfg: Architecture, compute: Compute | None = None) -> Params:
    """Fresh parameters: float32, but nanochat's token and value embeddings in the compute dtype."""
    return nn.unbox(jax.jit(_boxed_params, static_argnums=(1, 2))(key, cfg, compute))


def logical_axes(cfg: Architecture) -> Params:
    """The name of every axis of every parameter, in a tree like the parameters' (leaves are PartitionSpecs)."""
    boxed = jax.eval_shape(lambda: _boxed_params(jax.random.key(0), cfg, Compute()))
    return nn.get_partition_spec(boxed)


def trunk(
    params: Params,
    cfg: Architecture,
    tokens_BT: jax.Array,
    *,
    segment_ids_BT: jax.Array | None = None,
    cache: KVCache | None = None,
    counts_B: jax.Array | None = None,
    compute: Compute | None = None,
    dropout_key: jax.Array | None = None,
) -> tuple[jax.Array, KVCache | None]:
    """The transformer up to its last norm.

    Args:
        params: as init_params gives.
        cfg: the architecture.
        tokens_BT: int32 token ids.
        segment_ids_BT: int32; neither attention nor smear crosses from one segment to another (not with a cache).
        cache: what has been seen before these tokens.
        counts_B: with a cache, how many of the T tokens of each row are real; the rest is padding behind them.
        compute: dtype and attention backend; default: what suits the device.
        dropout_key: turns dropout on, in architectures that have it.

    Returns:
        x_BTD in the compute dtype, and the extended cache (None without one).
    """
    if cache is not None and segment_ids_BT is not None:
        raise ValueError("segments are for whole sequences: a cache holds one segment a row")
    if counts_B is None:
        counts_B = jnp.full(tokens_BT.shape[0], tokens_BT.shape[1], jnp.int32)
    rngs = None if dropout_key is None else {"dropout": dropout_key}
    variables = {"params": params}
    result: Any = _module(cfg, compute).apply(variables, tokens_BT, segment_ids_BT, cache, counts_B, rngs=rngs)
    return result


def head(params: Params, cfg: Architecture) -> tuple[jax.Array, float | None]:
    """The output kernel (D, padded vocabulary) and the soft cap of its logits, as the losses take them."""
    if isinstance(cfg, GPT2Config):
        return params["wte"].T, None
    return params["lm_head"], LOGIT_CAP


def unembed(params: Params, cfg: Architecture, x_BTD: jax.Array) -> jax.Array:
    """Float32 logits over the vocabulary (padding cropped), soft-capped where the architecture has a cap."""
    kernel_DV, cap = head(params, cfg)
    return softcap(linear(x_BTD, kernel_DV)[..., : cfg.vocab_size].astype(jnp.float32), cap)


def forward(params: Params, cfg: Architecture, tokens_BT: jax.Array, **options: Any) -> jax.Array:
    """Logits of every position, (B, T, vocab_size) float32: trunk, then unembed."""
    return unembed(params, cfg, trunk(params, cfg, tokens_BT, **options)[0])


def token_nats(
    params: Params, cfg: Architecture, tokens_BT: jax.Array, targets_BT: jax.Array, **options: Any
) -> jax.Array:
    """Cross-entropy of each target, (B, T) float32 nats, 0 where the target is −1; options are trunk's."""
    kernel_DV, cap = head(params, cfg)
    return cross_entropy(trunk(params, cfg, tokens_BT, **options)[0], kernel_DV, targets_BT, cfg.vocab_size, cap)
