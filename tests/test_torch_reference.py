"""The PyTorch model that speed is compared with computes what nanochat does: against nanochat's own numbers.

Needs torch, and nothing of nanochat_jax: `python -m pytest --noconftest -m torch tests/test_torch_reference.py`.
"""

import json
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
from tests import torch_reference as reference  # noqa: E402

pytestmark = pytest.mark.torch
FIXTURES = Path(__file__).parent / "parity" / "fixtures"


def relative_error(found, wanted: np.ndarray) -> float:
    return float(np.linalg.norm(found.detach().numpy() - wanted) / np.linalg.norm(wanted))


@pytest.mark.parametrize("name", ["l4_sssl", "l5_gqa_sl"])
def test_logits_gradients_and_eight_steps(name):
    with np.load(FIXTURES / f"{name}.npz") as file:
        stored = dict(file)
    shape = reference.Shape(**json.loads(str(stored["config"])))
    rates = json.loads(str(stored["hparams"]))
    weights = {
        key.removeprefix("init/"): torch.from_numpy(array).requires_grad_()
        for key, array in stored.items()
        if key.startswith("init/")
    }
    tables = reference.Tables.of(shape)
    batches = [
        tuple(torch.from_numpy(stored[kind][i]).long() for kind in ("inputs", "targets"))
        for i in range(len(stored["inputs"]))
    ]
    logits = reference.logits(weights, shape, tables, batches[0][0])
    assert np.abs(logits.detach().numpy() - stored["logits"]).max() < 5e-6

    optimizer = reference.Optimizer(weights, rates, 1.0, rates["weight_decay"], steps=len(batches), warmup=2)
    losses = []
    for step, (tokens, targets) in enumerate(batches, 1):
        np.testing.assert_allclose(optimizer.schedule(), stored["schedule"][step - 1], rtol=1e-6)
        loss = reference.mean_loss(weights, shape, tables, tokens, targets)
        loss.backward()
        if step == 1:
            assert all(relative_error(w.grad, stored[f"grad/{key}"]) < 5e-5 for key, w in weights.items())
        optimizer.step()
        losses.append(loss.item())
        if (tolerance := {1: 5e-5, 8: 5e-4}.get(step)) is not None:
            assert all(relative_error(w, stored[f"step{step}/{key}"]) < tolerance for key, w in weights.items())
    np.testing.assert_allclose(losses, stored["losses"], rtol=0, atol=5e-6)
