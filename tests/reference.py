"""nanochat's forward pass once more, in float64 NumPy, one position and one head at a time.

Written from the description of the architecture and sharing nothing with nanochat_jax, so that a mistake in either
shows. Weights go by torch's names, matrices are (out, in).
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

Weights = Mapping[str, np.ndarray]


def norm(x: np.ndarray) -> np.ndarray:
    return x / math.sqrt(np.mean(x * x) + 1.1920929e-07)


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def rotate(head: np.ndarray, position: int) -> np.ndarray:
    half = len(head) // 2
    result = np.empty_like(head)
    for i in range(half):
        angle = position / 100_000 ** (2 * i / len(head))
        result[i] = head[i] * math.cos(angle) + head[i + half] * math.sin(angle)
        result[i + half] = -head[i] * math.sin(angle) + head[i + half] * math.cos(angle)
    return result


def windows(cfg: Any) -> list[int]:
    """Keys before its own that a query of each layer sees."""
    short = math.ceil(cfg.sequence_len / 4 / 128) * 128
    pattern = (cfg.window_pattern * cfg.n_layer)[: cfg.n_layer - 1] + "L"
    return [{"S": short, "L": cfg.sequence_len}[kind] for kind in pattern]


def attention(
    queries: np.ndarray, keys: np.ndarray, values: np.ndarray, window: int, segments: Sequence[int] | None = None
) -> np.ndarray:
    """Queries (T, heads, head_dim), keys and values (T, kv_heads, head_dim) → (T, heads, head_dim)."""
    length, heads, head_dim = queries.shape
    group = heads // keys.shape[1]
    mixed = np.zeros_like(queries)
    for t in range(length):
        seen = [s for s in range(max(0, t - window), t + 1) if segments is None or segments[s] == segments[t]]
        for h in range(heads):
            scores = keys[seen, h // group] @ queries[t, h] / math.sqrt(head_dim)
            weights = np.exp(scores - scores.max())
            mixed[t, h] = (weights / weights.sum()) @ values[seen, h // group]
    return mixed


def attention_layer(
    w: Weights, i: int, cfg: Any, x: list[np.ndarray], tokens: Sequence[int], window: int, segments: Any
) -> np.ndarray:
    """What layer i's attention adds to each position's residual stream."""
    name, head_dim, length = f"transformer.h.{i}.attn", cfg.n_embd // cfg.n_head, len(x)
    q = np.zeros((length, cfg.n_head, head_dim))
    k, v = np.zeros((2, length, cfg.n_kv_head, head_dim))
    for t in range(length):
        h = norm(x[t])
        q[t] = (w[f"{name}.c_q.weight"] @ h).reshape(cfg.n_head, head_dim)
        k[t] = (w[f"{name}.c_k.weight"] @ h).reshape(cfg.n_kv_head, head_dim)
        v[t] = (w[f"{name}.c_v.weight"] @ h).reshape(cfg.n_kv_head, head_dim)
        if i % 2 == (cfg.n_layer - 1) % 2:
            gate = 3 * sigmoid(w[f"{name}.ve_gate.weight"] @ h[:12])
            embed = w[f"value_embeds.{i}.weight"][tokens[t]].reshape(cfg.n_kv_head, head_dim)
            for head in range(cfg.n_kv_head):
                v[t, head] += gate[head] * embed[head]
        for head in range(cfg.n_head):
            q[t, head] = 1.2 * norm(rotate(q[t, head], t))
        for head in range(cfg.n_kv_head):
            k[t, head] = 1.2 * norm(rotate(k[t, head], t))
    mixed = attention(q, k, v, window, segments)
    return mixed.reshape(length, -1) @ w[f"{name}.c_proj.weight"].T


def mlp_layer(w: Weights, i: int, x: np.ndarray) -> np.ndarray:
    hidden = np.maximum(w[f"transformer.h.{i}.mlp.c_fc.weight"] @ norm(x), 0) ** 2
    return w[f"transformer.h.{i}.mlp.c_proj.weight"] @ hidden


def forward(weights: Weights, cfg: Any, tokens: Sequence[int], segments: Sequence[int] | None = None) -> np.ndarray:
    """Logits (T, vocab_size) of one sequence; attention and smear stay within a segment."""
    w = {name: np.asarray(array, np.float64) for name, array in weights.items()}
    embedded = [norm(w["transformer.wte.weight"][token]) for token in tokens]
    x = [embedded[0]]
    for t in range(1, len(tokens)):
        gate = w["smear_lambda"] * sigmoid(w["smear_gate.weight"] @ embedded[t][:24])
        same_segment = segments is None or segments[t] == segments[t - 1]
        x.append(embedded[t] + gate * embedded[t - 1] if same_segment else embedded[t])

    x0, middle = list(x), list(x)
    for i, window in enumerate(windows(cfg)):
        x = [w["resid_lambdas"][i] * a + w["x0_lambdas"][i] * b for a, b in zip(x, x0, strict=True)]
        added = attention_layer(w, i, cfg, x, tokens, window, segments)
        x = [a + b for a, b in zip(x, added, strict=True)]
        x = [a + mlp_layer(w, i, a) for a in x]
        if i == cfg.n_layer // 2:
            middle = list(x)
    x = [norm(a - w["backout_lambda"] * b) for a, b in zip(x, middle, strict=True)]
    logits = np.stack([w["lm_head.weight"] @ a for a in x])[:, : cfg.vocab_size]
    return 15 * np.tanh(logits / 15)
