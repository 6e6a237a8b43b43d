"""nanoGPT's path through train.pretrain: GPT-2 presets, dropout, and fine-tuning from another run."""

from dataclasses import replace

import jax
import numpy as np
import pytest

from nanochat_jax import gpt2
from nanochat_jax.errors import UserError
from nanochat_jax.gpt2 import GPT2Config, Preset
from nanochat_jax.load import load_model, open_model
from nanochat_jax.metrics import read_metrics
from train import pretrain, sample
from train.stage import RunConfig

TINY = Preset(GPT2Config(n_layer=1, n_head=2, n_embd=32, dropout=0.1, bias=False), gpt2.PRESETS["char"].optim, 16, 12)


@pytest.fixture(autouse=True)
def tiny_preset(monkeypatch):
    monkeypatch.setitem(gpt2.PRESETS, "char", TINY)


def config(data, out, **changes) -> pretrain.Config:
    return pretrain.Config(data=data, run=RunConfig(out=out), **{"preset": "char", "prompts": ("ab",), **changes})


def losses(out) -> list[float]:
    return [record["loss"] for record in read_metrics(out) if "loss" in record]


@pytest.fixture(scope="module")
def base(tiny_data, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(gpt2.PRESETS, "char", TINY)
        out = tmp_path_factory.mktemp("gpt2")
        pretrain.main(config(tiny_data, out))
    return out


def test_a_preset_sets_architecture_batch_steps_and_rates(tiny_data, base):
    loaded = load_model(base)
    assert loaded.cfg == replace(TINY.model, sequence_len=32, vocab_size=loaded.tokenizer.vocab_size)
    assert loaded.step == TINY.steps and loaded.stored.recipe["rows"] == TINY.batch_size
    assert loaded.stored.recipe["optim"]["warmup_steps"] == 1  # at most a tenth of the steps
    assert losses(base)[-1] < losses(base)[0]


def test_with_dropout_the_same_seed_gives_the_same_run(tiny_data, base, tmp_path):
    pretrain.main(config(tiny_data, tmp_path))
    assert losses(tmp_path) == losses(base)


def test_dropout_differs_from_step_to_step_and_is_off_in_evaluation(tiny_data, base):
    loaded = load_model(base)
    loss = pretrain.language_model_loss(loaded.cfg, loaded.compute)
    batch = {"tokens": np.zeros((2, 32), np.int32), "targets": np.ones((2, 32), np.int32)}
    one, two, again = (float(loss(loaded.params, batch, jax.random.key(seed))[0]) for seed in (1, 2, 1))
    assert one != two and one == again


def test_fine_tuning_starts_where_the_other_run_ended(tiny_data, base, tmp_path):
    pretrain.main(config(tiny_data, tmp_path, init_from=base, steps=3, lr_scale=0.1))
    assert abs(losses(tmp_path)[0] - losses(base)[-1]) < 0.1 < losses(base)[0] - losses(base)[-1]
    assert open_model(tmp_path).recipe["init_from"] == open_model(base).fingerprint


def test_samples_come_out_of_it(base):
    [text] = sample.main(sample.Config(checkpoint=base, prompt=("ab",), max_new_tokens=4))
    assert text.startswith("ab")


def test_contradictory_flags_are_refused(tiny_data, base, tmp_path):
    with pytest.raises(UserError, match="say nothing to --preset char"):
        pretrain.main(config(tiny_data, tmp_path, model=pretrain.ModelArgs(depth=3)))
    with pytest.raises(UserError, match="GPT-2"):
        pretrain.main(config(tiny_data, tmp_path, preset="nanochat", init_from=base))
