"""What a model holds likely after each token of a text: the table that an interface shows."""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from nanochat_jax import model
from nanochat_jax.cache import KVCache, init_cache
from nanochat_jax.config import Architecture
from nanochat_jax.errors import UserError
from nanochat_jax.layers import Compute, default_compute

CHUNK = 64  # tokens fed at once, so that one program serves texts of any length


class NextTokens(NamedTuple):
    """For each position of a text of T tokens, what may follow it."""

    tokens_TK: np.ndarray  # int32, likeliest first
    probabilities_TK: np.ndarray  # float32
    actual_T: np.ndarray  # float32, probability of the token that does follow; NaN at the last position


@partial(jax.jit, static_argnames=("cfg", "compute", "k"), donate_argnums=1)
def _chunk(
    params: model.Params,
    cache: KVCache,
    tokens_1T: jax.Array,
    following_1T: jax.Array,
    counts_1: jax.Array,
    *,
    cfg: Architecture,
    compute: Compute,
    k: int,
) -> tuple[KVCache, tuple[jax.Array, jax.Array, jax.Array]]:
    x_1TD, new_cache = model.trunk(params, cfg, tokens_1T, cache=cache, counts_B=counts_1, compute=compute)
    assert new_cache is not None
    probabilities_1TV = jax.nn.softmax(model.unembed(params, cfg, x_1TD), axis=-1)
    likeliest_1TK, tokens_1TK = jax.lax.top_k(probabilities_1TV, k)
    actual_1T = jnp.take_along_axis(probabilities_1TV, following_1T[..., None], axis=-1)[..., 0]
    return new_cache, (tokens_1TK[0], likeliest_1TK[0], actual_1T[0])


def next_token_table(
    params: model.Params, cfg: Architecture, tokens: Sequence[int], k: int = 10, compute: Compute | None = None
) -> NextTokens:
    """The likeliest next tokens after each token of a text, under the model's own distribution.

    Args:
        params: the model's parameters.
        cfg: its architecture.
        tokens: at least one and at most sequence_len.
        k: how many to tell for each position.
        compute: dtype and attention backend; default: what suits the device.

    Raises:
        UserError: the text is empty or too long, or a token or k is out of range.
    """
    if not 0 < len(tokens) <= cfg.sequence_len:
        raise UserError(f"a text of {len(tokens)} tokens has no table: it must have 1 to {cfg.sequence_len}")
    if not 0 < k <= cfg.vocab_size:
        raise UserError(f"k={k} must be from 1 to the vocabulary's {cfg.vocab_size}")
    if alien := [token for token in tokens if not 0 <= token < cfg.vocab_size]:
        raise UserError(f"token {alien[0]} is not in the vocabulary of {cfg.vocab_size}")
    compute = compute or default_compute()
    cache, chunks = init_cache(cfg, 1, compute.dtype), []
    padded = np.zeros(-(-len(tokens) // CHUNK) * CHUNK + 1, np.int32)
    padded[: len(tokens)] = tokens
    for start in range(0, len(tokens), CHUNK):
        fed_1T, following_1T = (padded[None, first : first + CHUNK] for first in (start, start + 1))
        counts_1 = np.array([min(CHUNK, len(tokens) - start)], np.int32)
        cache, found = _chunk(params, cache, fed_1T, following_1T, counts_1, cfg=cfg, compute=compute, k=k)
        chunks.append(found)
    table = NextTokens(*(np.concatenate(parts)[: len(tokens)] for parts in zip(*jax.device_get(chunks), strict=True)))
    table.actual_T[-1] = np.nan
    return table
