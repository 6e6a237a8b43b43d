"""How far off preflight's estimates are on the two TPU runs of other ports whose speed is public.

    python -m tests.public_figures [single] [pod]

No chip is needed, and none is used: programs like theirs are compiled here, with what they chose where it costs time,
and their estimated MFU is compared with the one that was measured. Minutes each.

- single: 164 M parameters on one v6e at 48.3 % MFU (github.com/vorushin/tpuchat, pallas/CLAUDE.md): 8 layers of width
  1,024, 4 query heads of 256 channels on one of keys, SwiGLU, AdamW, all in bfloat16; 16 micro-batches of 4 rows.
- pod: depth 24 on v6e-8 at 23.7 % (github.com/tucan9389/nanochat-jax, dev/LEADERBOARD.md): 16 micro-batches of 2 rows,
  parameters replicated; gradients of value embeddings by float32 products with one-hot tokens, Muon in float32, blocks
  of 512.
"""

import sys
from dataclasses import replace
from functools import partial
from itertools import cycle
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import optax
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

from nanochat_jax import hlo, model, optim, preflight, sharding, splash, state, tpu
from nanochat_jax.config import ModelConfig, OptimConfig, from_depth, horizon
from train.pretrain import language_model_loss

LAYERS, T, D, N, H, F, V = 8, 2048, 1024, 4, 256, 3072, 32768
ROWS, MICRO_BATCHES = 4, 16


def single() -> float:
    """Estimated MFU of the 164 M-parameter model, by that port's count: all pairs of attention."""
    where = tpu.describe("v6e:1x1")
    mesh = sharding.make_mesh(devices=list(where.devices))
    cfg = ModelConfig(T, V, LAYERS, N, 1, N * H, "L")
    at = sharding.replicated(mesh)
    place = partial(jax.tree.map, lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at))
    tx = optax.adamw(1e-4, b2=0.95, weight_decay=0.1)
    params = place(jax.eval_shape(_parameters))
    tokens = jax.ShapeDtypeStruct((MICRO_BATCHES, ROWS, T + 1), jnp.int32, sharding=at)
    like = state.TrainState(
        jax.ShapeDtypeStruct((), jnp.int32, sharding=at), params, place(jax.eval_shape(tx.init, params))
    )

    def step(train_state: Any, tokens_ABT: jax.Array) -> Any:
        def add(total: Any, tokens_BT: jax.Array) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, total, jax.grad(_mean_nats)(train_state.params, tokens_BT)), None

        grads, _ = jax.lax.scan(add, jax.tree.map(jnp.zeros_like, train_state.params), tokens_ABT)
        grads = jax.tree.map(lambda g: g / MICRO_BATCHES, grads)
        updates, opt_state = tx.update(grads, train_state.opt_state, train_state.params)
        return state.TrainState(train_state.step + 1, optax.apply_updates(train_state.params, updates), opt_state)

    job = preflight.Job(cfg, where, mesh, ROWS, MICRO_BATCHES, language_model_loss, lambda _: tx, {})
    compiled, _ = preflight._compile(jax.jit(step).lower(like, tokens), job)
    numbers = preflight._numbers(hlo.read(compiled.as_text() or "", preflight._rates(job)))
    forward = LAYERS * (4 * D * N * H + 4 * D * H + 4 * N * T * H + 6 * D * F) + 2 * D * V
    return 3 * forward * job.tokens_per_step / where.chip.peak_flops / numbers["elapsed_seconds"]


def _parameters() -> Any:
    shapes = {
        "q": (D, N, H),
        "k": (D, 1, H),
        "v": (D, 1, H),
        "o": (N, H, D),
        "gate": (D, F),
        "up": (D, F),
        "down": (F, D),
    }
    blocks = [{name: jnp.zeros(shape, jnp.bfloat16) for name, shape in shapes.items()} for _ in range(LAYERS)]
    return {"wte": jnp.zeros((V, D), jnp.bfloat16), "head": jnp.zeros((D, V), jnp.bfloat16), "blocks": blocks}


def _norm(x: jax.Array) -> jax.Array:
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-6)


def _turned(x_BNTH: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    first, second = jnp.split(x_BNTH, 2, axis=-1)
    return jnp.concatenate([first * cos + second * sin, second * cos - first * sin], axis=-1)


def _mean_nats(params: Any, tokens_BT: jax.Array) -> jax.Array:
    angles = jnp.arange(T, dtype=jnp.float32)[:, None] * 1e4 ** (-jnp.arange(0, H, 2, dtype=jnp.float32) / H)[None]
    cos, sin = (f(angles)[None, None].astype(jnp.bfloat16) for f in (jnp.cos, jnp.sin))
    sizes = kernel.BlockSizes(
        block_q=1024, block_kv=1024, block_q_dkv=1024, block_kv_dkv=1024, block_q_dq=1024, block_kv_dq=1024
    )
    mask = masks.MultiHeadMask([masks.CausalMask((T, T))] * N)
    attention = jax.vmap(kernel.make_splash_mha(mask, block_sizes=sizes, head_shards=1, q_seq_shards=1))
    x_BTD = _norm(params["wte"][tokens_BT[:, :-1]])
    for block in params["blocks"]:
        h_BTD = _norm(x_BTD)
        q, k, v = (jnp.einsum("BTD,DNH->BNTH", h_BTD, block[name]) for name in "qkv")
        q, k = (_norm(_turned(x, cos, sin)) for x in (q, k))
        x_BTD += jnp.einsum("BNTH,NHD->BTD", attention(q, k, v), block["o"])
        h_BTD = _norm(x_BTD)
        x_BTD += (jax.nn.silu(h_BTD @ block["gate"]) * (h_BTD @ block["up"])) @ block["down"]
    logits_BTV = 15 * jnp.tanh((_norm(x_BTD) @ params["head"]) / 15)
    return optax.losses.softmax_cross_entropy_with_integer_labels(logits_BTV, tokens_BT[:, 1:]).mean()


def pod() -> float:
    """Estimated MFU of depth 24 on v6e-8, by nanochat's count, on the line through 4 and 8 layers."""
    where = tpu.describe("v6e:2x4")
    mesh = sharding.make_mesh(devices=list(where.devices))
    cfg = from_depth(24)
    length = horizon(cfg, batch_tokens=2**19)
    found = {}
    for layers in (4, 8):
        # Of a model's lookups, the first is of token embeddings, whose gradient is scattered there, too.
        lookups = cycle([model.layers.embed, *[_one_hot_embed] * (layers // 2)])
        job = preflight.Job(
            replace(cfg, n_layer=layers), where, mesh, 2, 16, language_model_loss,
            lambda cfg: optim.make_optimizer(cfg, length, OptimConfig(), "float32"), {},
        )  # fmt: skip
        with (
            mock.patch.object(splash, "LARGEST_BLOCK", 512),
            mock.patch.object(model.layers, "embed", lambda *operands, of=lookups: next(of)(*operands)),
        ):
            found[layers] = preflight.train_step(job)
    whole = preflight.Job(cfg, where, mesh, 2, 16, language_model_loss, job.make_optimizer, {})
    return preflight.estimate(whole, preflight.extrapolate(found, 24))["mfu"]["predicted"]


@jax.custom_vjp
def _one_hot_embed(table_VD: jax.Array, tokens_BT: jax.Array) -> jax.Array:
    return table_VD[tokens_BT]


def _one_hot_backward(residuals: tuple[Any, ...], grad_BTD: jax.Array) -> tuple[jax.Array, None]:
    tokens_BT, like_V0 = residuals
    one_hot_NV = jax.nn.one_hot(tokens_BT.reshape(-1), like_V0.shape[0], dtype=jnp.float32)
    grad_ND = grad_BTD.reshape(-1, grad_BTD.shape[-1]).astype(jnp.float32)
    return jnp.matmul(one_hot_NV.T, grad_ND, precision="highest").astype(like_V0.dtype), None


_one_hot_embed.defvjp(lambda table, tokens: (table[tokens], (tokens, table[:, :0])), _one_hot_backward)


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    for name in sys.argv[1:] or ("single", "pod"):
        print(f"{name}: estimated {globals()[name]():.1%}")
