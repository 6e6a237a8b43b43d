"""nanochat's model and optimizer in PyTorch, written from their description, to compare the speed of a step with.

Shares nothing with nanochat_jax and imports no JAX; tests/compare_torch.py runs it in a process of its own. Weights go
by upstream's names, matrices are (out, in). All of it is float32.

    python tests/torch_reference.py --layers 4 --width 256 --head-dim 64 --compile
"""

import argparse
import json
import math
import statistics
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F

Tensor = torch.Tensor
Weights = dict[str, Tensor]

POLAR_EXPRESS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)


@dataclass(frozen=True)
class Shape:
    sequence_len: int
    vocab_size: int
    n_layer: int
    n_head: int
    n_kv_head: int
    n_embd: int
    window_pattern: str = "SSSL"

    @property
    def head_dim(self) -> int:
        return self.n_embd // self.n_head

    @property
    def table_rows(self) -> int:
        return -(-self.vocab_size // 64) * 64

    def window(self, layer: int) -> int:
        short = math.ceil(self.sequence_len / 4 / 128) * 128
        kind = self.window_pattern[layer % len(self.window_pattern)]
        return self.sequence_len if kind == "L" or layer == self.n_layer - 1 else min(short, self.sequence_len)

    def has_value_embed(self, layer: int) -> bool:
        return layer % 2 == (self.n_layer - 1) % 2


def initial_weights(shape: Shape) -> Weights:
    """Random weights of upstream's distributions."""
    D, kv_dim, rows = shape.n_embd, shape.n_kv_head * shape.head_dim, shape.table_rows
    limit = math.sqrt(3 / D)

    def uniform(out: int, into: int, low: float, high: float) -> Tensor:
        return torch.empty(out, into).uniform_(low, high)

    weights = {
        "transformer.wte.weight": torch.randn(rows, D) * 0.8,
        "lm_head.weight": torch.randn(rows, D) * 0.001,
        "resid_lambdas": torch.linspace(1.15, 1.05, shape.n_layer),
        "x0_lambdas": torch.linspace(0.20, 0.05, shape.n_layer),
        "smear_gate.weight": uniform(1, 24, 0.0, 0.02),
        "smear_lambda": torch.zeros(1),
        "backout_lambda": torch.full((1,), 0.2),
    }
    for i in range(shape.n_layer):
        block = f"transformer.h.{i}"
        weights[f"{block}.attn.c_q.weight"] = uniform(D, D, -limit, limit)
        weights[f"{block}.attn.c_k.weight"] = uniform(kv_dim, D, -limit, limit)
        weights[f"{block}.attn.c_v.weight"] = uniform(kv_dim, D, -limit, limit)
        weights[f"{block}.attn.c_proj.weight"] = torch.zeros(D, D)
        weights[f"{block}.mlp.c_fc.weight"] = uniform(4 * D, D, -0.4 * limit, 0.4 * limit)
        weights[f"{block}.mlp.c_proj.weight"] = torch.zeros(D, 4 * D)
        if shape.has_value_embed(i):
            weights[f"value_embeds.{i}.weight"] = uniform(rows, kv_dim, -limit, limit)
            weights[f"{block}.attn.ve_gate.weight"] = uniform(shape.n_kv_head, 12, 0.0, 0.02)
    return weights


@dataclass(frozen=True)
class Tables:
    """What stays the same: RoPE's cosines and sines, (T, 1, H/2), and the short window's mask, (T, T)."""

    cos: Tensor
    sin: Tensor
    masks: dict[int, Tensor]

    @classmethod
    def of(cls, shape: Shape) -> "Tables":
        T, H = shape.sequence_len, shape.head_dim
        angles = torch.outer(torch.arange(T).float(), 100_000 ** (-torch.arange(0, H, 2).float() / H))[:, None]
        distance = torch.arange(T)[:, None] - torch.arange(T)[None, :]
        windows = {shape.window(i) for i in range(shape.n_layer)} - {T}
        return cls(angles.cos(), angles.sin(), {w: (distance >= 0) & (distance <= w) for w in windows})


def norm(x: Tensor) -> Tensor:
    return F.rms_norm(x, (x.shape[-1],), eps=1.1920929e-07)


def rotate(x_BTNH: Tensor, tables: Tables) -> Tensor:
    first, second = x_BTNH.chunk(2, dim=-1)
    cos, sin = tables.cos, tables.sin
    return torch.cat([first * cos + second * sin, second * cos - first * sin], dim=-1)


def attention(w: Weights, shape: Shape, tables: Tables, i: int, h_BTD: Tensor, tokens_BT: Tensor) -> Tensor:
    B, T, D = h_BTD.shape
    name = f"transformer.h.{i}.attn"
    q, k, v = (
        F.linear(h_BTD, w[f"{name}.c_{kind}.weight"]).view(B, T, heads, shape.head_dim)
        for kind, heads in (("q", shape.n_head), ("k", shape.n_kv_head), ("v", shape.n_kv_head))
    )
    if shape.has_value_embed(i):
        gate_BTK = 3 * torch.sigmoid(F.linear(h_BTD[..., :12], w[f"{name}.ve_gate.weight"]))
        v = v + gate_BTK[..., None] * F.embedding(tokens_BT, w[f"value_embeds.{i}.weight"]).view_as(v)
    q, k = (norm(rotate(x, tables)) * 1.2 for x in (q, k))
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    mask = tables.masks.get(shape.window(i))
    grouped = shape.n_kv_head != shape.n_head
    mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=grouped)
    return F.linear(mixed.transpose(1, 2).reshape(B, T, D), w[f"{name}.c_proj.weight"])


def logits(w: Weights, shape: Shape, tables: Tables, tokens_BT: Tensor) -> Tensor:
    """Soft-capped logits, (B, T, vocab_size)."""
    x = norm(F.embedding(tokens_BT, w["transformer.wte.weight"]))
    gate = w["smear_lambda"] * torch.sigmoid(F.linear(x[:, 1:, :24], w["smear_gate.weight"]))
    x = torch.cat([x[:, :1], x[:, 1:] + gate * x[:, :-1]], dim=1)
    x0 = middle = x
    for i in range(shape.n_layer):
        x = w["resid_lambdas"][i] * x + w["x0_lambdas"][i] * x0
        x = x + attention(w, shape, tables, i, norm(x), tokens_BT)
        hidden = F.relu(F.linear(norm(x), w[f"transformer.h.{i}.mlp.c_fc.weight"])).square()
        x = x + F.linear(hidden, w[f"transformer.h.{i}.mlp.c_proj.weight"])
        if i == shape.n_layer // 2:
            middle = x
    x = norm(x - w["backout_lambda"] * middle)
    raw = F.linear(x, w["lm_head.weight"])[..., : shape.vocab_size]
    return 15 * torch.tanh(raw / 15)


def mean_loss(w: Weights, shape: Shape, tables: Tables, tokens_BT: Tensor, targets_BT: Tensor) -> Tensor:
    capped = logits(w, shape, tables, tokens_BT)
    return F.cross_entropy(capped.flatten(0, 1), targets_BT.flatten(), ignore_index=-1)


def adam_(
    p: Tensor, g: Tensor, m: Tensor, v: Tensor, step: Tensor, lr: Tensor, b1: float, b2: float, wd: float
) -> None:
    """One AdamW step, in place; step and lr are 0-d tensors, so that compiling sees no new constants."""
    p.mul_(1 - lr * wd)
    m.lerp_(g, 1 - b1)
    v.lerp_(g.square(), 1 - b2)
    denominator = (v / (1 - b2**step)).sqrt() + 1e-10
    p.sub_(lr / (1 - b1**step) * m / denominator)


def muon_(p_SOI: Tensor, g_SOI: Tensor, m_SOI: Tensor, v: Tensor, lr: Tensor, mu: Tensor, wd: Tensor) -> None:
    """One Muon step of a stack of matrices, in place on p, m and v."""
    rows, cols = p_SOI.shape[-2:]
    m_SOI.lerp_(g_SOI, 1 - mu)
    x = torch.lerp(g_SOI, m_SOI, mu)
    row_norm = x.norm(dim=-1, keepdim=True)
    x = x * (x.norm(dim=(-2, -1), keepdim=True) / math.sqrt(rows) / row_norm.clamp_min(1e-6))
    x = x / (1.01 * x.norm(dim=(-2, -1), keepdim=True) + 1e-6)
    for a, b, c in POLAR_EXPRESS:
        gram = x @ x.mT if rows <= cols else x.mT @ x
        polynomial = b * gram + c * (gram @ gram)
        x = a * x + (polynomial @ x if rows <= cols else x @ polynomial)
    x = x * (math.sqrt(min(rows, cols)) / x.norm(dim=(-2, -1), keepdim=True).clamp_min(1e-6))
    mean_square = x.square().mean(dim=-1 if rows >= cols else -2, keepdim=True)
    v.lerp_(mean_square, 0.1)
    scaled = x * v.clamp_min(1e-10).rsqrt()
    x = scaled * (x.norm(dim=(-2, -1), keepdim=True) / scaled.norm(dim=(-2, -1), keepdim=True).clamp_min(1e-10))
    shape_lr = lr * math.sqrt(max(1.0, rows / cols))
    p_SOI.sub_(shape_lr * x + shape_lr * wd * p_SOI * (x * p_SOI >= 0))


@dataclass
class Optimizer:
    """MuonAdamW; `rates` are the base rates by their names upstream, `batch` is the factor of most of them."""

    weights: Weights
    rates: dict[str, float]
    batch: float
    weight_decay: float
    steps: int
    warmup: int = 40
    compiled: bool = False
    done: int = 0
    adam: list[tuple[str, float, float, float, float, Tensor, Tensor]] = field(default_factory=list)
    muon: list[tuple[list[str], Tensor, Tensor]] = field(default_factory=list)

    def __post_init__(self) -> None:
        width = (self.weights["lm_head.weight"].shape[1] / 768) ** -0.5
        r, s = self.rates, self.batch
        groups = (  # of names that contain: rate, betas, weight decay
            ("lm_head", r["unembedding_lr"] * s * width, 0.8, 0.96, 0.01),
            ("wte", r["embedding_lr"] * s * width, 0.8, 0.995, 0.001),
            ("value_embeds", 0.5 * r["embedding_lr"] * s * width, 0.8, 0.995, 0.01),
            ("resid_lambdas", 0.01 * r["scalar_lr"] * s, 0.8, 0.95, 0.05),
            ("x0_lambdas", r["scalar_lr"] * s, 0.96, 0.95, 0.0),
            ("smear", r.get("smear_lr", 0.2), 0.8, 0.95, 0.0),
            ("backout", r.get("smear_lr", 0.2), 0.8, 0.95, 0.0),
        )
        matrices: dict[torch.Size, list[str]] = defaultdict(list)
        for name, p in self.weights.items():
            group = next((group for group in groups if group[0] in name), None)
            if group is None:
                matrices[p.shape].append(name)
            else:
                self.adam.append((name, *group[1:], torch.zeros_like(p), torch.zeros_like(p)))
        for (rows, cols), names in matrices.items():
            tracked = (len(names), rows, 1) if rows >= cols else (len(names), 1, cols)
            self.muon.append((names, torch.zeros(len(names), rows, cols), torch.zeros(tracked)))
        wrap = torch.compile(dynamic=False, fullgraph=True) if self.compiled else lambda function: function
        self._adam, self._muon = wrap(adam_), wrap(muon_)

    def schedule(self) -> tuple[float, float, float]:
        """Rate multiplier, Muon's momentum and its weight decay of the step to come."""
        it, down = self.done, round(0.65 * self.steps)
        left = (self.steps - it) / down
        multiplier = (it + 1) / self.warmup if it < self.warmup else left + (1 - left) * 0.05 if left < 1 else 1.0
        progress = max(0.0, (it - (self.steps - down)) / down)
        momentum = 0.85 + it / 400 * 0.12 if it < 400 else 0.97 - 0.07 * progress
        return multiplier, momentum, self.weight_decay * 0.5 * (1 + math.cos(math.pi * it / self.steps))

    @torch.no_grad()
    def step(self) -> None:
        multiplier, momentum, decay = self.schedule()
        self.done += 1
        count = torch.tensor(float(self.done))
        for name, rate, b1, b2, wd, m, v in self.adam:
            p = self.weights[name]
            self._adam(p, p.grad, m, v, count, torch.tensor(rate * multiplier), b1, b2, wd)
        rate = torch.tensor(self.rates["matrix_lr"] * self.batch * multiplier)
        for names, m, v in self.muon:
            params = [self.weights[name] for name in names]
            stack = torch.stack(params)
            grads = torch.stack([p.grad for p in params])
            self._muon(stack, grads, m, v, rate, torch.tensor(momentum), torch.tensor(decay))
            torch._foreach_copy_(params, list(stack.unbind()))
        for p in self.weights.values():
            p.grad = None


RATES = {"unembedding_lr": 0.008, "embedding_lr": 0.3, "matrix_lr": 0.02, "scalar_lr": 0.5}


def training(shape: Shape, batch: int, compiled: bool) -> Iterator[float]:
    """Losses of whole steps on random tokens; a value comes when its step is done."""
    torch.manual_seed(0)
    weights = {name: p.requires_grad_() for name, p in initial_weights(shape).items()}
    optimizer = Optimizer(weights, RATES, 1.0, 0.1, 1000, compiled=compiled)
    tables, loss_of = Tables.of(shape), torch.compile(mean_loss, dynamic=False) if compiled else mean_loss
    rows = torch.randint(shape.vocab_size, (batch, shape.sequence_len + 1))
    while True:
        loss = loss_of(weights, shape, tables, rows[:, :-1].contiguous(), rows[:, 1:].contiguous())
        loss.backward()
        optimizer.step()
        yield loss.item()


def main() -> None:
    parser = argparse.ArgumentParser(description="Time whole training steps; prints JSON.")
    for name, default in (
        ("layers", 4), ("width", 256), ("head-dim", 64), ("sequence-len", 512), ("vocab-size", 4096), ("batch", 8),
        ("steps", 3), ("repeats", 5),
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--compile", action="store_true")
    args = parser.parse_args()
    heads = args.width // args.head_dim
    shape = Shape(args.sequence_len, args.vocab_size, args.layers, heads, heads, args.width)
    steps = training(shape, args.batch, args.compile)
    start = time.perf_counter()
    first = next(steps)
    next(steps)
    warmup_seconds, seconds = time.perf_counter() - start, []
    for _ in range(args.repeats):
        start = time.perf_counter()
        last = [next(steps) for _ in range(args.steps)][-1]
        seconds.append((time.perf_counter() - start) / args.steps)
    step = statistics.median(seconds)
    result: dict[str, Any] = {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "compiled": args.compile,
        "step_seconds": seconds,
        "tokens_per_second": args.batch * args.sequence_len / step,
        "warmup_seconds": warmup_seconds,
        "losses": [first, last],
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
