"""Reinforcement learning: what is learnt from, by how much, that reward rises, and that a run goes on bitwise."""

import shutil
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nanochat_jax import model, tasks
from nanochat_jax.chat import conversation
from nanochat_jax.checkpoint import Checkpoints
from nanochat_jax.data.rl import SHORTEST, advantages, answer_rows, open_questions
from nanochat_jax.engine import Output
from nanochat_jax.errors import UserError
from nanochat_jax.layers import Compute
from nanochat_jax.load import load_model, open_model
from nanochat_jax.losses import policy_gradient_loss
from nanochat_jax.metrics import read_metrics
from nanochat_jax.rollouts import Answer, answer, make_engine
from nanochat_jax.sampling import Sampling
from nanochat_jax.sharding import MeshConfig
from nanochat_jax.tasks import Example, Task
from train import rl
from train.stage import RunConfig

STEPS = 6
COMPUTE = Compute("float32", "xla")


def toy(argument: str) -> Task:
    """Right is what has an "e" in it: often so by chance, and soon learnt."""
    examples = [Example(conversation(f"Say {n}.", "e"), None) for n in range(24)]
    return Task("toy", "generative", lambda split: examples, lambda example, text: "e" in text)


@pytest.fixture(scope="module", autouse=True)
def toy_task():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(tasks.TASKS, "toy", toy)
        yield


def config(base: Path, out: Path, **changes) -> rl.Config:
    run = {"out": out, "save_every": 3, "eval_every": 3, **changes.pop("run", {})}
    small = {"prompts_per_step": 4, "samples": 4, "steps": STEPS, "max_new_tokens": 4, "slots": 1}
    evaluation = {"eval_examples": 8, "eval_samples": 2, "pass_k": 2}
    return rl.Config(**{"checkpoint": base, "run": RunConfig(**run), "task": "toy", **small, **evaluation, **changes})


@pytest.fixture(scope="module")
def whole(tiny_base, tmp_path_factory) -> Path:
    """A run that nothing interrupted, with everything that there is to choose."""
    out = tmp_path_factory.mktemp("rl")
    rl.main(config(tiny_base, out, advantage="zscore", kl_weight=0.1, lr_fraction=0.5))
    return out


def logged(out: Path) -> list[dict[str, float]]:
    """Everything but how long it took."""
    return [{k: v for k, v in record.items() if "second" not in k} for record in read_metrics(out)]


def final_arrays(out: Path):
    checkpoint = Checkpoints(out / "checkpoints").peek(STEPS)
    assert checkpoint is not None
    return checkpoint.arrays


def test_advantages():
    rewards_QS = np.array([[1, 0, 0, 1], [1, 1, 1, 0], [1, 1, 1, 1], [0, 0, 0, 0]], np.float32)
    mean_QS = [[0.5, -0.5, -0.5, 0.5], [0.25, 0.25, 0.25, -0.75], [0, 0, 0, 0], [0, 0, 0, 0]]
    np.testing.assert_array_equal(advantages(rewards_QS, "mean"), mean_QS)
    deviations_Q1 = np.array([0.5, 3**0.5 / 4, 1, 1])[:, None]  # of the last two it does not matter: 0 stays 0
    np.testing.assert_allclose(advantages(rewards_QS, "zscore"), mean_QS / deviations_Q1, rtol=1e-5)


def test_the_loss_and_its_gradient_by_hand():
    nats_BT = jnp.array([[2.0, 1.0, 0.0], [0.5, 0.0, 0.0]])  # 0 where nothing was sampled
    advantages_B = jnp.array([0.5, -1.0])
    loss_BT, kl_BT = policy_gradient_loss(nats_BT, advantages_B)
    np.testing.assert_allclose(loss_BT, [[1.0, 0.5, 0.0], [-0.5, 0.0, 0.0]])
    assert not kl_BT.any()
    reference_BT = jnp.array([[2.0, 1.5, 0.0], [0.25, 0.0, 0.0]])
    loss_BT, kl_BT = policy_gradient_loss(nats_BT, advantages_B, reference_BT, 0.1)
    expected_BT = [[0, np.exp(-0.5) + 0.5 - 1, 0], [np.exp(0.25) - 0.25 - 1, 0, 0]]
    np.testing.assert_allclose(kl_BT, expected_BT, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(loss_BT - 0.1 * kl_BT, [[1.0, 0.5, 0.0], [-0.5, 0.0, 0.0]], rtol=1e-6)
    gradient_BT = jax.grad(lambda x: policy_gradient_loss(x, advantages_B, reference_BT, 0.1)[0].sum())(nats_BT)
    expected_BT = [[0.5, 0.5 + 0.1 * (np.exp(-0.5) - 1), 0.5], [-1 + 0.1 * (np.exp(0.25) - 1), -1, -1]]
    np.testing.assert_allclose(gradient_BT, expected_BT, rtol=1e-5)


def test_the_step_is_normalised_over_all_its_sampled_tokens(tiny_base):
    """An answer of one token and one of three: −Σ A log p / 4."""
    loaded = load_model(tiny_base)
    rows = answer_rows([an_answer([3, 4], [5]), an_answer([3], [6, 7, 8])], np.float32([0.5, -0.5]), 0, 128)
    loss_fn = jax.jit(rl.reinforcement_loss(loaded.cfg, COMPUTE, 0.0))
    batch = jax.tree.map(jnp.asarray, rows)
    loss, sums = loss_fn(loaded.params, batch, jax.random.key(0))
    forward = jax.jit(partial(model.forward, cfg=loaded.cfg, compute=COMPUTE))
    logprobs_BTV = jax.nn.log_softmax(forward(loaded.params, tokens_BT=batch["tokens"]))
    first, second = logprobs_BTV[0, 1, 5], sum(logprobs_BTV[1, i, token] for i, token in enumerate([6, 7, 8]))
    np.testing.assert_allclose(loss, -0.5 * first + 0.5 * second, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(sums["nats"], -first - second, rtol=1e-5)
    assert sums["count"] == 4


def an_answer(prompt: list[int], tokens: list[int], sampled: list[bool] | None = None) -> Answer:
    return Answer(prompt, Output(0, tuple(tokens), tuple(sampled or [True] * len(tokens))), "", False)


def test_rows_count_what_the_model_wrote_and_nothing_else():
    # A call (20 … 21), its output (22, 9, 23), and the end (2), which the model wrote too.
    with_tool = an_answer([1, 10, 11], [20, 5, 21, 22, 9, 23, 6, 2], [True] * 3 + [False] * 3 + [True] * 2)
    rows = answer_rows([with_tool, an_answer([1, 12], [7])], np.float32([1, -1]), 99, 512)
    assert rows["tokens"].shape == rows["targets"].shape == (2, SHORTEST)
    assert rows["tokens"][0, :12].tolist() == [1, 10, 11, 20, 5, 21, 22, 9, 23, 6, 99, 99]
    assert rows["targets"][0, :12].tolist() == [-1, -1, 20, 5, 21, -1, -1, -1, 6, 2, -1, -1]
    assert rows["tokens"][1, :4].tolist() == [1, 12, 99, 99]
    assert rows["targets"][1, :4].tolist() == [-1, 7, -1, -1]
    assert rows["advantages"].tolist() == [1, -1]


def test_rows_have_one_of_few_lengths():
    def length(tokens: int) -> int:
        return answer_rows([an_answer([1], [2] * tokens)], np.float32([1]), 0, 512)["tokens"].shape[1]

    assert [length(n) for n in (1, 64, 65, 128, 129, 256, 257, 511, 512)] == [64, 64, 128, 128, 256, 256, 512, 512, 512]


def test_the_loss_sees_the_distribution_that_was_sampled_from(tiny_base):
    """Every target is where the engine drew it: its log-probability is the engine's, tools' outputs left out."""
    loaded = load_model(tiny_base)
    questions = open_questions("toy,arithmetic", "train", loaded.tokenizer, loaded.cfg.sequence_len).all[20:28]
    engine = make_engine(loaded.params, loaded.cfg, loaded.tokenizer, COMPUTE, 8)
    answers = [one for (one,) in answer(engine, loaded.tokenizer, questions, sampling=Sampling(), max_new_tokens=24)]
    rows = answer_rows(answers, np.zeros(8, np.float32), loaded.tokenizer.bos, loaded.cfg.sequence_len)
    token_nats = jax.jit(partial(model.token_nats, cfg=loaded.cfg, compute=COMPUTE))
    nats_BT = token_nats(loaded.params, tokens_BT=rows["tokens"], targets_BT=rows["targets"])
    ours = np.asarray(nats_BT)[rows["targets"] >= 0]
    theirs = [
        logprob for one in answers for logprob, s in zip(one.output.logprobs, one.output.sampled, strict=True) if s
    ]
    np.testing.assert_allclose(-ours, theirs, rtol=1e-4, atol=1e-5)


def test_reward_rises(tiny_base, tmp_path):
    rl.main(
        config(
            tiny_base, tmp_path, prompts_per_step=8, samples=8, steps=16, lr_fraction=1.0, slots=8,
            run={"eval_every": 0}, eval_examples=0, eval_samples=4, pass_k=3,
        )
    )  # fmt: skip
    before, after = [record for record in read_metrics(tmp_path) if "val_pass_at_1" in record]
    assert (before["step"], after["step"]) == (0, 16)
    assert after["val_pass_at_1_low"] > before["val_pass_at_1_high"]
    assert before["val_pass_at_1"] < before["val_pass_at_3"]
    rewards = [record["reward"] for record in read_metrics(tmp_path) if "reward" in record]
    assert len(rewards) == 16 and np.mean(rewards[-4:]) > np.mean(rewards[:4]) + 0.2


def test_it_measures_before_during_and_after(whole):
    measured = [record["step"] for record in logged(whole) if "val_accuracy" in record]
    assert measured == [0, 3, 6]
    steps = [record for record in logged(whole) if "loss" in record]
    assert [record["step"] for record in steps] == list(range(1, STEPS + 1))
    assert steps[0]["kl"] == pytest.approx(0, abs=1e-6) and steps[-1]["kl"] > 1e-5
    assert all("mfu" not in record and 0 <= record["mixed"] <= 1 for record in steps)
    recipe = open_model(whole).recipe
    assert recipe["horizon"]["lr_scale"] == 0.5 and recipe["optim"]["matrix_lr"] == pytest.approx(0.01)
    assert recipe["optim"]["warmdown_fraction"] == 1 and recipe["optim"]["final_lr_fraction"] == 0


def test_the_same_command_gives_the_same_and_goes_on_bitwise(tiny_base, whole, tmp_path):
    shutil.copytree(whole, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / str(STEPS))
    rl.main(config(tiny_base, tmp_path / "run", advantage="zscore", kl_weight=0.1, lr_fraction=0.5))
    assert final_arrays(tmp_path / "run") == final_arrays(whole)
    assert logged(tmp_path / "run") == logged(whole)
    shutil.rmtree(tmp_path / "run" / "checkpoints")  # killed before anything was saved
    rl.main(config(tiny_base, tmp_path / "run", advantage="zscore", kl_weight=0.1, lr_fraction=0.5))
    assert final_arrays(tmp_path / "run") == final_arrays(whole)
    assert logged(tmp_path / "run") == logged(whole)


def test_the_mesh_changes_nothing_but_rounding(tiny_base, whole, tmp_path):
    mesh = {"mesh": MeshConfig(2, 2, 2)}
    rl.main(config(tiny_base, tmp_path, advantage="zscore", kl_weight=0.1, lr_fraction=0.5, run=mesh))
    for ours, theirs in zip(logged(tmp_path), logged(whole), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-5)


def test_pass_at_k():
    assert rl.pass_at_k(0, 8, 4) == 0 and rl.pass_at_k(8, 8, 1) == 1 and rl.pass_at_k(3, 8, 1) == pytest.approx(3 / 8)
    assert rl.pass_at_k(2, 4, 2) == pytest.approx(1 - 1 / 6)  # of the six pairs one has no right answer
    assert rl.pass_at_k(3, 4, 2) == 1


def test_prompts_that_fill_the_context_are_left_out_and_counted(tiny_base):
    tok = load_model(tiny_base).tokenizer
    lengths = [len(tok.encode(f"Say {n}.")) for n in range(24)]
    limit = max(lengths) + len(open_questions("toy", "test", tok, 128).row(0)) + 3  # bos, user's two, assistant_start
    some = open_questions("toy", "test", tok, limit)
    assert some.too_long == sum(n == max(lengths) for n in lengths) > 0 and len(some) + some.too_long == 24
    assert [question.number for question in some.all] == list(range(len(some)))
    assert len(open_questions("toy, toy", "test", tok, 128, limit=5)) == 10
    with pytest.raises(UserError, match="of 24 questions of toy none fits into a context of 4 tokens"):
        open_questions("toy", "test", tok, 4)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"samples": 1}, "--samples 1 must be at least 2"),
        ({"prompts_per_step": 0}, "--prompts-per-step 0"),
        ({"epochs": 0.0}, "--epochs 0"),
        ({"temperature": 0.0}, "--temperature 0"),
        ({"kl_weight": -1.0}, "--kl-weight -1"),
        ({"pass_k": 3}, "--pass-k 3 cannot be estimated from --eval-samples 2"),
        ({"top_k": -1}, "top_k=-1"),
        ({"lr_fraction": 0.0}, "--lr-fraction 0"),
        ({"task": "toys"}, "unknown task 'toys'"),
        ({"task": "humaneval"}, "humaneval has no examples in split 'train'"),
        ({"samples": 3, "prompts_per_step": 3}, "9 rows a step do not divide by 8"),
    ],
)
def test_bad_input_is_refused(tiny_base, tmp_path, changes, words):
    with pytest.raises(UserError, match=words):
        rl.main(config(tiny_base, tmp_path, **changes))
