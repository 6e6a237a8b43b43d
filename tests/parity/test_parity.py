"""Against numbers that nanochat itself produced; README.md beside this file says how and with what tolerances."""

import dataclasses
import json
from functools import cache, cached_property, partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from nanochat_jax import losses, model, optim
from nanochat_jax.config import (
    SMEAR_CHANNELS,
    Horizon,
    ModelConfig,
    OptimConfig,
    from_depth,
    horizon,
)
from nanochat_jax.interop import params_from_upstream
from nanochat_jax.layers import Compute

FIXTURES = Path(__file__).parent / "fixtures"
LOGITS_ATOL = 5e-6
LOSS_ATOL = 5e-6
GRADIENT_RTOL = 5e-5
PARAMETER_RTOL = {1: 5e-5, 8: 5e-4}  # after so many steps
FLOAT32 = Compute("float32", "xla")


class Case:
    """One fixture, and what we compute from its inputs; each program is compiled once."""

    def __init__(self, name: str) -> None:
        with np.load(FIXTURES / f"{name}.npz") as stored:
            self.stored = dict(stored)
        self.cfg = ModelConfig(**json.loads(str(self.stored["config"])))
        self.steps = len(self.stored["inputs"])
        rates = json.loads(str(self.stored["hparams"]))
        self.weight_decay = rates.pop("weight_decay")
        self.optim = OptimConfig(**rates, warmup_steps=2)

    def tree(self, prefix: str) -> model.Params:
        arrays = {name.removeprefix(prefix): x for name, x in self.stored.items() if name.startswith(prefix)}
        return params_from_upstream(arrays, self.cfg)

    @cached_property
    def forward(self):
        """The function that others call, at the length that the greedy tokens need."""
        return jax.jit(partial(model.forward, cfg=self.cfg, compute=FLOAT32))

    def mean_loss(self, params, tokens_BT, targets_BT):
        x_BTD, _ = model.trunk(params, self.cfg, tokens_BT, compute=FLOAT32)
        kernel_DV, cap = model.head(params, self.cfg)
        nats_BT = losses.cross_entropy(x_BTD, kernel_DV, targets_BT, self.cfg.vocab_size, cap)
        return nats_BT.sum() / (targets_BT >= 0).sum(), (nats_BT, model.unembed(params, self.cfg, x_BTD))

    @cached_property
    def training(self) -> "Training":
        length = Horizon(self.steps, 512, 4096, lr_scale=1.0, weight_decay=self.weight_decay)
        tx = optim.make_optimizer(self.cfg, length, self.optim, "float32")

        @jax.jit
        def step(params, opt_state, tokens_BT, targets_BT):
            (loss, (nats_BT, logits_BTV)), grads = jax.value_and_grad(self.mean_loss, has_aux=True)(
                params, tokens_BT, targets_BT
            )
            updates, opt_state = tx.update(grads, opt_state, params)
            return optax.apply_updates(params, updates), opt_state, FirstBatch(loss, nats_BT, logits_BTV, grads)

        params = self.tree("init/")
        opt_state, results, after = tx.init(params), [], {}
        for i, batch in enumerate(zip(self.stored["inputs"], self.stored["targets"], strict=True), 1):
            params, opt_state, result = step(params, opt_state, *batch)
            results.append(result)
            if i in PARAMETER_RTOL:
                after[i] = params
        return Training(results[0], np.array([float(result.loss) for result in results]), after)


class FirstBatch(NamedTuple):
    """Results on the first batch, with the initial parameters."""

    loss: jax.Array
    nats_BT: jax.Array
    logits_BTV: jax.Array
    grads: model.Params


class Training(NamedTuple):
    first: FirstBatch
    losses: np.ndarray
    after: dict[int, model.Params]  # parameters by number of steps


case_of = cache(Case)


@pytest.fixture(params=["l4_sssl", "l5_gqa_sl"])
def case(request) -> Case:
    return case_of(request.param)


def largest_relative_error(ours, theirs) -> float:
    """max over tensors of ‖a − b‖ / ‖b‖."""

    def error(a, b):
        norm = np.linalg.norm(b)
        return float(np.linalg.norm(np.asarray(a) - b) / norm) if norm else float(np.linalg.norm(a))

    return max(jax.tree.leaves(jax.tree.map(error, ours, theirs)))


def report(record_property, name: str, value: float) -> float:
    """Keep a measured figure: `pytest tests/parity -s` prints what README.md quotes."""
    record_property(name, float(value))  # xdist carries plain numbers only
    print(f"{name}: {value:.1e}")
    return value


def test_logits(case, record_property):
    logits_BTV = case.training.first.logits_BTV
    assert logits_BTV.dtype == np.float32
    assert report(record_property, "logits", np.abs(logits_BTV - case.stored["logits"]).max()) <= LOGITS_ATOL


def test_forward(case):
    """A part of the first batch, of the greedy tokens' shape, which is compiled anyway."""
    length = len(case.stored["greedy_prompt"]) + len(case.stored["greedy_tokens"])
    logits_BTV = case.forward(case.tree("init/"), tokens_BT=case.stored["inputs"][0][:1, :length])
    np.testing.assert_allclose(logits_BTV, case.stored["logits"][:1, :length], rtol=0, atol=LOGITS_ATOL)


def test_loss(case, record_property):
    first = case.training.first
    assert report(record_property, "mean loss", abs(float(first.loss) - case.stored["loss"])) <= LOSS_ATOL
    assert report(record_property, "losses", np.abs(first.nats_BT - case.stored["loss_none"]).max()) <= LOSS_ATOL


def test_gradients(case, record_property):
    error = largest_relative_error(case.training.first.grads, case.tree("grad/"))
    assert report(record_property, "gradients", error) <= GRADIENT_RTOL


@pytest.mark.parametrize("steps", PARAMETER_RTOL)
def test_parameters_after_training(case, steps, record_property):
    error = largest_relative_error(case.training.after[steps], case.tree(f"step{steps}/"))
    assert report(record_property, f"parameters after step {steps}", error) <= PARAMETER_RTOL[steps]


def test_losses_of_training(case, record_property):
    error = np.abs(case.training.losses - case.stored["losses"]).max()
    assert report(record_property, "losses of training", error) <= LOSS_ATOL


def test_schedule(case):
    """Rate multiplier, Muon's momentum and Muon's weight decay of every step."""
    schedules = (
        optim.lr_multiplier(case.steps, case.optim),
        optim.muon_momentum(case.steps, case.optim),
        optim.muon_weight_decay(case.steps, case.weight_decay),
    )
    ours = [[float(schedule(step)) for schedule in schedules] for step in range(case.steps)]
    np.testing.assert_allclose(ours, case.stored["schedule"], rtol=1e-6)


def test_greedy_tokens(case):
    """Of the trained parameters; without a cache: the whole sequence anew for each token, at one padded length."""
    params, prompt, expected = case.tree("step8/"), case.stored["greedy_prompt"], case.stored["greedy_tokens"]
    tokens = np.zeros((1, len(prompt) + len(expected)), np.int32)
    tokens[0, : len(prompt)] = prompt
    for length in range(len(prompt), tokens.shape[1]):
        tokens[0, length] = jnp.argmax(case.forward(params, tokens_BT=tokens)[0, length - 1])
    np.testing.assert_array_equal(tokens[0, len(prompt) :], expected)


@pytest.mark.parametrize(
    "row", json.loads((FIXTURES / "scaling.json").read_text()), ids=lambda row: f"d{row['depth']}-{row['ratio']}"
)
def test_derived_hyperparameters(row):
    """Everything that follows from the depth, exactly."""
    cfg = from_depth(row["depth"])
    length, counts = horizon(cfg, ratio=row["ratio"]), cfg.param_counts()
    scaling_params = counts["transformer_matrices"] + counts["lm_head"]
    assert row == {
        "depth": cfg.n_layer,
        "ratio": row["ratio"],
        "n_embd": cfg.n_embd,
        "n_head": cfg.n_head,
        "window_sizes": [spec.window for spec in cfg.layer_specs()],
        "param_counts": counts,
        "scaling_params": scaling_params,
        "target_tokens": length.target_tokens,
        "total_batch_size": length.batch_tokens,
        "num_iterations": length.steps,
        "lr_scale": length.lr_scale,
        "weight_decay": length.weight_decay,
        "flops_per_token": cfg.flops_per_token(),
        "matmul_params": scaling_params + SMEAR_CHANNELS,
        "kv_bytes_per_token_bf16": cfg.n_layer * 2 * cfg.n_kv_head * cfg.head_dim * 2,
    }


def test_config_has_upstreams_fields():
    fields = [field.name for field in dataclasses.fields(ModelConfig)]
    assert fields == ["sequence_len", "vocab_size", "n_layer", "n_head", "n_kv_head", "n_embd", "window_pattern"]
