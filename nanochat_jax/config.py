"""Every number a run is made of: the architecture, the one dial that sets it, and what follows from it.

Pure arithmetic on the standard library: nothing here touches JAX or a device. Formulas are those of
nanochat (karpathy/nanochat, commit 92d63d4).
"""

import dataclasses
import json
import math
import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from nanochat_jax.errors import UserError
from nanochat_jax.files import write_bytes

SMEAR_CHANNELS = 24  # of the embedding, read by the smear gate
VE_GATE_CHANNELS = 12  # of the attention input, read by the value-embedding gate
REFERENCE_DEPTH = 12  # hyperparameters were tuned at this depth, and at this batch:
REFERENCE_BATCH_TOKENS = 2**19
REFERENCE_WEIGHT_DECAY = 0.28
BATCH_EXPONENT = 0.383  # the best batch grows as tokens**0.383 (Power Lines, arXiv:2505.13738)


@dataclass(frozen=True)
class LayerSpec:
    """What one layer does differently from the others."""

    window: int  # keys a query sees before its own position
    has_value_embed: bool


class Architecture(Protocol):
    """What every architecture's config tells the rest of the program.

    Attributes:
        sequence_len: tokens of the longest context.
        vocab_size: logits of a token; tables are padded_vocab_size long.
        n_embd: channels D of the residual stream; n_head query heads (N) and n_kv_head key heads (K) of head_dim (H).
    """

    @property
    def sequence_len(self) -> int: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def padded_vocab_size(self) -> int: ...
    @property
    def n_layer(self) -> int: ...
    @property
    def n_embd(self) -> int: ...
    @property
    def n_head(self) -> int: ...
    @property
    def n_kv_head(self) -> int: ...
    @property
    def head_dim(self) -> int: ...
    def layer_specs(self) -> tuple[LayerSpec, ...]:
        """What differs from layer to layer, n_layer long."""
        ...

    def param_counts(self) -> dict[str, int]:
        """Parameters by group; "total" is their sum."""
        ...

    def flops_per_token(self) -> int:
        """FLOPs of a training token, forward and backward."""
        ...


@dataclass(frozen=True)
class ModelConfig:
    """The architecture, in upstream's seven fields."""

    sequence_len: int = 2048
    vocab_size: int = 32768
    n_layer: int = 12
    n_head: int = 6
    n_kv_head: int = 6
    n_embd: int = 768
    window_pattern: str = "SSSL"

    def __post_init__(self) -> None:
        for name in ("sequence_len", "vocab_size", "n_layer", "n_head", "n_kv_head", "n_embd"):
            if getattr(self, name) < 1:
                raise UserError(f"model: {name}={getattr(self, name)} must be at least 1")
        if self.n_embd % self.n_head or self.head_dim % 2:
            raise UserError(f"model: n_embd={self.n_embd} must divide into n_head={self.n_head} heads of even width")
        if self.n_head % self.n_kv_head:
            raise UserError(f"model: n_head={self.n_head} must be a multiple of n_kv_head={self.n_kv_head}")
        if self.n_embd < SMEAR_CHANNELS:
            raise UserError(
                f"model: n_embd={self.n_embd} must be at least {SMEAR_CHANNELS}, which the smear gate reads"
            )
        if not self.window_pattern or set(self.window_pattern) - set("SL"):
            raise UserError(f"model: window_pattern={self.window_pattern!r} may hold only S (short) and L (long)")

    @property
    def head_dim(self) -> int:
        return self.n_embd // self.n_head

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the vocabulary tables: a multiple of 64, which tiles well; logits are cropped back."""
        return math.ceil(self.vocab_size / 64) * 64

    def layer_specs(self) -> tuple[LayerSpec, ...]:
        """Window and value embedding of each layer; the last layer always sees the whole sequence."""
        short = math.ceil(self.sequence_len / 4 / 128) * 128
        kinds = [self.window_pattern[i % len(self.window_pattern)] for i in range(self.n_layer)]
        kinds[-1] = "L"
        return tuple(
            LayerSpec(
                window=min(short, self.sequence_len) if kind == "S" else self.sequence_len,
                has_value_embed=i % 2 == (self.n_layer - 1) % 2,
            )
            for i, kind in enumerate(kinds)
        )

    def param_counts(self) -> dict[str, int]:
        """Number of parameters by kind, the padding of the vocabulary tables included."""
        kv_dim = self.n_kv_head * self.head_dim
        value_layers = sum(spec.has_value_embed for spec in self.layer_specs())
        table = self.padded_vocab_size * self.n_embd
        attention = 2 * self.n_embd * self.n_embd + 2 * self.n_embd * kv_dim
        counts = {
            "wte": table,
            "value_embeds": value_layers * self.padded_vocab_size * kv_dim,
            "lm_head": table,
            "transformer_matrices": self.n_layer * (attention + 8 * self.n_embd**2)
            + value_layers * VE_GATE_CHANNELS * self.n_kv_head,
            "scalars": 2 * self.n_layer + SMEAR_CHANNELS + 2,
        }
        return counts | {"total": sum(counts.values())}

    def flops_per_token(self) -> int:
        """Model FLOPs of forward and backward for one token, by upstream's formula (the one MFU is quoted with)."""
        counts = self.param_counts()
        matmul_params = counts["transformer_matrices"] + counts["lm_head"] + SMEAR_CHANNELS
        return 6 * matmul_params + sum(12 * self.n_embd * spec.window for spec in self.layer_specs())


def from_depth(
    depth: int,
    *,
    vocab_size: int = 32768,
    sequence_len: int = 2048,
    head_dim: int = 128,
    window_pattern: str = "SSSL",
) -> ModelConfig:
    """The model of a given depth: 64 channels a layer, rounded up to whole heads; UserError if none has that depth."""
    if depth < 1:
        raise UserError(f"model: depth={depth} must be at least 1")
    n_head = math.ceil(64 * depth / head_dim)
    return ModelConfig(sequence_len, vocab_size, depth, n_head, n_head, n_head * head_dim, window_pattern)


@dataclass(frozen=True)
class Horizon:
    """How long to train, and what follows from it."""

    steps: int
    batch_tokens: int
    target_tokens: int  # what the ratio asks for; steps * batch_tokens is what is trained on
    lr_scale: float
    weight_decay: float  # of Muon, at the start of its schedule


def horizon(
    cfg: ModelConfig,
    *,
    ratio: float = 12.0,
    steps: int | None = None,
    batch_tokens: int | None = None,
    lr_scale: float | None = None,
) -> Horizon:
    """Training length, batch, rate scale and weight decay of a model.

    Args:
        cfg: the architecture.
        ratio: training tokens per scaling parameter (block matrices and lm_head).
        steps: optimizer steps, in place of what the ratio gives.
        batch_tokens: tokens per optimizer step, in place of the scaling law's.
        lr_scale: factor of all rates but the smear group's, in place of sqrt(batch_tokens / 2^19).

    Raises:
        UserError: if a number is not positive, or fewer tokens are asked for than one batch holds.

    Source: nanochat, scripts/base_train.py; weight decay from the T_epoch framework (arXiv:2405.13698).
    """
    for name, value in (
        ("ratio", ratio),
        ("steps", steps),
        ("batch_tokens", batch_tokens),
        ("lr_scale", lr_scale),
    ):
        if value is not None and not 0 < value < math.inf:
            raise UserError(f"horizon: {name}={value} must be positive")
    reference = from_depth(REFERENCE_DEPTH, vocab_size=cfg.vocab_size, sequence_len=cfg.sequence_len)
    target = int(ratio * _scaling_params(cfg))
    reference_target = ratio * _scaling_params(reference)
    if batch_tokens is None:
        best = REFERENCE_BATCH_TOKENS * (target / reference_target) ** BATCH_EXPONENT
        batch_tokens = 2 ** round(math.log2(best))
    if steps is None:
        steps = target // batch_tokens
        if steps < 1:
            raise UserError(
                f"horizon: ratio={ratio} gives {target:,} tokens, less than one batch of {batch_tokens:,}; "
                "raise the ratio, or give steps and batch-tokens"
            )
    scale = math.sqrt(batch_tokens / REFERENCE_BATCH_TOKENS)
    weight_decay = REFERENCE_WEIGHT_DECAY * scale * (reference_target / target)
    return Horizon(steps, batch_tokens, target, lr_scale or scale, weight_decay)


def _scaling_params(cfg: ModelConfig) -> int:
    counts = cfg.param_counts()
    return counts["transformer_matrices"] + counts["lm_head"]


LEARNING_RATES = ("embedding_lr", "unembedding_lr", "matrix_lr", "scalar_lr", "smear_lr")


@dataclass(frozen=True)
class OptimConfig:
    """Rates at the reference batch and width, and the shape of the schedules (optim.py applies them)."""

    embedding_lr: float = 0.3
    unembedding_lr: float = 0.008
    matrix_lr: float = 0.02
    scalar_lr: float = 0.5
    smear_lr: float = 0.2  # of the smear and backout group, not scaled by the batch
    warmup_steps: int = 40
    warmdown_fraction: float = 0.65  # of all steps, linear at the end
    final_lr_fraction: float = 0.05
    momentum: tuple[float, float, float] = (
        0.85,
        0.97,
        0.90,
    )  # Muon's: first, after its warm-up, last
    momentum_warmup_steps: int = 400

    def __post_init__(self) -> None:
        for name in (*LEARNING_RATES, "warmup_steps", "momentum_warmup_steps"):
            if not 0 <= getattr(self, name) < math.inf:
                raise UserError(f"optim: {name}={getattr(self, name)} must be a number from 0 on")
        if len(self.momentum) != 3 or not all(0 <= value < 1 for value in self.momentum):
            raise UserError(f"optim: momentum={self.momentum} must be three numbers from 0 to below 1")
        for name in ("warmdown_fraction", "final_lr_fraction"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"optim: {name}={getattr(self, name)} must lie between 0 and 1")


def to_json(config: Any) -> Any:
    """A dataclass as plain JSON values, nested dataclasses and paths included."""
    if dataclasses.is_dataclass(config):
        return {field.name: to_json(getattr(config, field.name)) for field in dataclasses.fields(config)}
    if isinstance(config, dict):
        return {str(key): to_json(value) for key, value in config.items()}
    if isinstance(config, (list, tuple)):
        return [to_json(value) for value in config]
    return str(config) if isinstance(config, Path) else config


def from_json[T](cls: type[T], values: Any, where: str = "config") -> T:
    """Build a dataclass from what to_json gave; an unknown or missing key is a UserError that names it."""
    if not isinstance(values, dict):
        raise UserError(f"{where}: {values!r} should be an object")
    hints = typing.get_type_hints(cls)
    fields = {field.name: field for field in dataclasses.fields(typing.cast(Any, cls))}
    if unknown := set(values) - set(fields):
        raise UserError(f"{where}: unknown key {sorted(unknown)[0]!r}; known are {', '.join(fields)}")
    missing = [
        name
        for name, field in fields.items()
        if name not in values and field.default is field.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise UserError(f"{where}: key {missing[0]!r} is missing")
    return cls(**{name: _from_json_value(hints[name], value, f"{where}.{name}") for name, value in values.items()})


def _from_json_value(hint: Any, value: Any, where: str) -> Any:
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        options = typing.get_args(hint)
        if (value is None and type(None) in options) or any(value in typing.get_args(option) for option in options):
            return value  # None, or one of a Literal's
        hint = next(option for option in options if option is not type(None))
    if dataclasses.is_dataclass(hint):
        return from_json(typing.cast(type, hint), value, where)
    if typing.get_origin(hint) is tuple and isinstance(value, list):
        return tuple(value)
    if hint in (int, float, str, bool) and not isinstance(value, (int, float) if hint is float else hint):
        raise UserError(f"{where}: {value!r} should be of type {hint.__name__}")
    return Path(value) if hint is Path else value


def differences(one: Any, other: Any, name: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Where two JSON values differ: the path to it, and what either has there."""
    if isinstance(one, dict) and isinstance(other, dict):
        for key in sorted(one.keys() | other.keys()):
            yield from differences(one.get(key), other.get(key), f"{name}.{key}" if name else key)
    elif one != other:
        yield name, one, other


def write_json(path: Path, value: Any) -> None:
    """Write a dataclass, or plain values, as a JSON file."""
    write_bytes(path, (json.dumps(to_json(value), indent=2) + "\n").encode())
