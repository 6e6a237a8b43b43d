"""GPT-2 for the nanoGPT path: the architecture behind the contract of model.py, its presets and its optimizer.

Sources: openai/gpt-2, transformers' GPT2LMHeadModel (numerics), karpathy/nanoGPT (initialisation, training recipe).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

from nanochat_jax import attention, layers
from nanochat_jax.cache import KVCache
from nanochat_jax.config import LayerSpec
from nanochat_jax.errors import UserError
from nanochat_jax.layers import Compute, param

LAYER_NORM_EPSILON = 1e-5
INIT_STD = 0.02


@dataclass(frozen=True)
class GPT2Config:
    """The architecture, in nanoGPT's terms."""

    sequence_len: int = 1024
    vocab_size: int = 50257
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0
    bias: bool = True  # in linear layers and layer norms; GPT-2 has them, nanoGPT trains without

    def __post_init__(self) -> None:
        for name in ("sequence_len", "vocab_size", "n_layer", "n_head", "n_embd"):
            if getattr(self, name) < 1:
                raise UserError(f"model: {name}={getattr(self, name)} must be at least 1")
        if self.n_embd % self.n_head:
            raise UserError(f"model: n_embd={self.n_embd} must divide into n_head={self.n_head} heads")
        if not 0 <= self.dropout < 1:
            raise UserError(f"model: dropout={self.dropout} must be at least 0 and less than 1")

    @property
    def n_kv_head(self) -> int:
        return self.n_head

    @property
    def head_dim(self) -> int:
        return self.n_embd // self.n_head

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the vocabulary table: a multiple of 64, which tiles well; logits are cropped back."""
        return math.ceil(self.vocab_size / 64) * 64

    def layer_specs(self) -> tuple[LayerSpec, ...]:
        """Every layer sees the whole sequence."""
        return (LayerSpec(window=self.sequence_len, has_value_embed=False),) * self.n_layer

    def param_counts(self) -> dict[str, int]:
        """Number of parameters by kind, the padding of the vocabulary table included; the head is wte itself."""
        D = self.n_embd
        counts = {
            "wte": self.padded_vocab_size * D,
            "wpe": self.sequence_len * D,
            "transformer_matrices": self.n_layer * 12 * D**2,
            "vectors": (2 * self.n_layer + 1) * D * (1 + self.bias) + self.n_layer * 9 * D * self.bias,
        }
        return counts | {"total": sum(counts.values())}

    def flops_per_token(self) -> int:
        """Model FLOPs of forward and backward for one token, as nanoGPT counts them: 6 N + 12 L D T, N without wpe."""
        counts = self.param_counts()
        return 6 * (counts["total"] - counts["wpe"]) + 12 * self.n_layer * self.n_embd * self.sequence_len


def _dense(
    name: str, features: int, axes: tuple[str, str], cfg: GPT2Config, dtype: str, std: float = INIT_STD
) -> nn.Dense:
    return nn.Dense(
        features,
        use_bias=cfg.bias,
        dtype=dtype,
        kernel_init=nn.with_logical_partitioning(nn.initializers.normal(std), axes),
        bias_init=nn.with_logical_partitioning(nn.initializers.zeros, axes[1:]),
        name=name,
    )


def _layer_norm(name: str, cfg: GPT2Config, dtype: str) -> nn.LayerNorm:
    return nn.LayerNorm(
        LAYER_NORM_EPSILON,
        use_bias=cfg.bias,
        dtype=dtype,
        use_fast_variance=False,  # E[x²] − E[x]² cancels
        scale_init=nn.with_logical_partitioning(nn.initializers.ones, (None,)),
        bias_init=nn.with_logical_partitioning(nn.initializers.zeros, (None,)),
        name=name,
    )


class Block(nn.Module):
    cfg: GPT2Config
    compute: Compute
    layer: int

    @nn.compact
    def __call__(
        self,
        x_BTD: jax.Array,
        segment_ids_BT: jax.Array | None,
        cache: KVCache | None,
        counts_B: jax.Array,
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        cfg, dtype, (B, T, D) = self.cfg, self.compute.dtype, x_BTD.shape
        residual_std = INIT_STD / math.sqrt(2 * cfg.n_layer)
        drop = nn.Dropout(cfg.dropout, deterministic=not self.has_rng("dropout"))

        h_BTD = _layer_norm("ln_1", cfg, dtype)(x_BTD)
        q_BTNH, k_BTNH, v_BTNH = (
            _dense(name, D, ("embed", "heads"), cfg, dtype)(h_BTD).reshape(B, T, cfg.n_head, cfg.head_dim)
            for name in "qkv"
        )
        keys, values = k_BTNH, v_BTNH
        if cache is not None:
            mixed, keys, values = attention.attend_cached(
                q_BTNH, k_BTNH, v_BTNH, cache, self.layer, counts_B,
                window=cfg.sequence_len, backend=self.compute.attention,
            )  # fmt: skip
        elif cfg.dropout and self.has_rng("dropout"):
            mixed = _attend_dropping(q_BTNH, k_BTNH, v_BTNH, segment_ids_BT, drop)
        else:
            mixed = attention.attend(
                q_BTNH, k_BTNH, v_BTNH,
                window=cfg.sequence_len, segment_ids_BT=segment_ids_BT, backend=self.compute.attention,
            )  # fmt: skip
        proj = _dense("proj", D, ("heads", "embed"), cfg, dtype, residual_std)
        x_BTD += drop(proj(mixed.reshape(B, T, D)))

        h_BTD = _layer_norm("ln_2", cfg, dtype)(x_BTD)
        h_BTF = nn.gelu(_dense("fc", 4 * D, ("embed", "mlp"), cfg, dtype)(h_BTD), approximate=True)
        x_BTD += drop(_dense("fc_proj", D, ("mlp", "embed"), cfg, dtype, residual_std)(h_BTF))
        return x_BTD, keys, values


def _attend_dropping(
    q_BTNH: jax.Array, k_BSNH: jax.Array, v_BSNH: jax.Array, segment_ids_BT: jax.Array | None, drop: nn.Dropout
) -> jax.Array:
    """Causal attention with dropout on its weights, which no fused backend has."""
    T, H = q_BTNH.shape[1], q_BTNH.shape[3]
    mask_BTS = jnp.tril(jnp.ones((T, T), bool))[None]
    if segment_ids_BT is not None:
        mask_BTS &= segment_ids_BT[:, :, None] == segment_ids_BT[:, None, :]
    scores_BNTS = jnp.einsum("BTNH,BSNH->BNTS", q_BTNH, k_BSNH, preferred_element_type=jnp.float32) * H**-0.5
    weights_BNTS = jax.nn.softmax(jnp.where(mask_BTS[:, None], scores_BNTS, -1e30))
    return jnp.einsum("BNTS,BSNH->BTNH", drop(weights_BNTS).astype(v_BSNH.dtype), v_BSNH)


class GPT2(nn.Module):
    """Called as model.Transformer is; with a "dropout" random stream it drops, without one it does not."""

    cfg: GPT2Config
    compute: Compute

    @nn.compact
    def __call__(
        self,
        tokens_BT: jax.Array,
        segment_ids_BT: jax.Array | None,
        cache: KVCache | None,
        counts_B: jax.Array,
    ) -> tuple[jax.Array, KVCache | None]:
        cfg, dtype = self.cfg, self.compute.dtype
        normal = nn.initializers.normal(INIT_STD)
        wte = param(self, "wte", normal, (cfg.padded_vocab_size, cfg.n_embd), ("vocab", "embed"))
        wpe = param(self, "wpe", normal, (cfg.sequence_len, cfg.n_embd), (None, "embed"))

        positions_BT = jnp.arange(tokens_BT.shape[1], dtype=jnp.int32)[None, :]
        if cache is not None:
            positions_BT = positions_BT + cache.lengths_B[:, None]
        # A cached chunk's padding may lie beyond the last position; its output means nothing.
        x_BTD = layers.embed(wte, tokens_BT) + jnp.take(wpe, positions_BT, axis=0, mode="clip")
        x_BTD = nn.Dropout(cfg.dropout, deterministic=not self.has_rng("dropout"))(x_BTD.astype(dtype))
        new_keys, new_values = [], []
        for i in range(cfg.n_layer):
            block = Block(cfg, self.compute, i, name=f"block_{i}")
            x_BTD, keys, values = block(x_BTD, segment_ids_BT, cache, counts_B)
            new_keys.append(keys)
            new_values.append(values)
        x_BTD = _layer_norm("ln_f", cfg, dtype)(x_BTD)
        if cache is None:
            return x_BTD, None
        lengths_B = cache.lengths_B + counts_B
        return x_BTD, KVCache(tuple(new_keys), tuple(new_values), lengths_B, cache.last_embed_BD)


@dataclass(frozen=True)
class GPT2OptimConfig:
    """nanoGPT's AdamW and its schedule: linear warm-up, then a cosine to a fraction of the peak."""

    learning_rate: float = 6e-4
    final_lr_fraction: float = 0.1
    warmup_steps: int = 2000
    beta1: float = 0.9
    beta2: float = 0.95
    weight_decay: float = 0.1  # of matrices and tables, not of biases and layer norms
    grad_clip: float = 1.0  # global norm

    def __post_init__(self) -> None:
        for name in ("learning_rate", "final_lr_fraction", "warmup_steps", "weight_decay"):
            if getattr(self, name) < 0:
                raise UserError(f"optim: {name}={getattr(self, name)} must not be negative")
        if self.grad_clip <= 0:
            raise UserError(f"optim: grad_clip={self.grad_clip} must be positive")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"optim: {name}={getattr(self, name)} must be at least 0 and less than 1")


def lr_multiplier(steps: int, cfg: GPT2OptimConfig) -> Callable[[jax.Array], jax.Array]:
    """A factor for the learning rate. Source: nanoGPT, train.py get_lr."""

    def multiplier(step: jax.Array) -> jax.Array:
        rising = (step + 1) / (cfg.warmup_steps + 1)
        progress = jnp.clip((step - cfg.warmup_steps) / max(steps - cfg.warmup_steps, 1), 0, 1)
        cosine = 0.5 * (1 + jnp.cos(jnp.pi * progress))
        falling = cfg.final_lr_fraction + (1 - cfg.final_lr_fraction) * cosine
        return jnp.where(step < cfg.warmup_steps, rising, falling)

    return multiplier


def make_gpt2_optimizer(cfg: GPT2OptimConfig, steps: int) -> optax.GradientTransformation:
    """nanoGPT's optimizer for a run of so many steps."""
    multiplier = lr_multiplier(steps, cfg)
    return optax.chain(
        optax.clip_by_global_norm(cfg.grad_clip),
        optax.adamw(
            lambda step: cfg.learning_rate * multiplier(step),
            cfg.beta1,
            cfg.beta2,
            weight_decay=cfg.weight_decay,
            mask=lambda params: jax.tree.map(lambda x: x.ndim >= 2, params),
        ),
    )


@dataclass(frozen=True)
class Preset:
    """A known run: what is trained, how, and for how long; the vocabulary is that of the tokenizer at hand."""

    model: GPT2Config
    optim: GPT2OptimConfig
    batch_size: int  # sequences a step
    steps: int


def _gpt2(n_layer: int, n_head: int, n_embd: int, learning_rate: float) -> Preset:
    model = GPT2Config(n_layer=n_layer, n_head=n_head, n_embd=n_embd, bias=False)
    return Preset(model, GPT2OptimConfig(learning_rate), batch_size=480, steps=600_000)


def _char(model: GPT2Config, batch_size: int, steps: int) -> Preset:
    return Preset(model, GPT2OptimConfig(1e-3, warmup_steps=100, beta2=0.99), batch_size, steps)


# nanoGPT: config/train_gpt2.py, config/train_shakespeare_char.py, README (char on a laptop's CPU).
# Peak rates of the larger sizes: GPT-3 (arXiv:2005.14165), table 2.1.
PRESETS = {
    "gpt2": _gpt2(12, 12, 768, 6e-4),
    "gpt2-medium": _gpt2(24, 16, 1024, 3e-4),
    "gpt2-large": _gpt2(36, 20, 1280, 2.5e-4),
    "gpt2-xl": _gpt2(48, 25, 1600, 2e-4),
    "char": _char(GPT2Config(256, 256, 6, 6, 384, dropout=0.2, bias=False), 64, 5000),
    "char-cpu": _char(GPT2Config(64, 256, 4, 4, 128, dropout=0.0, bias=False), 12, 2000),
}
