"""Chat evaluation: choices that follow from the prompt alone, real answers judged, no more programs than needed."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_engine import CHAT_CFG, COMPUTE, TOKENIZER, ids, random_params, scripted_params

from nanochat_jax import model, sharding, tokenizer
from nanochat_jax.char import CharTokenizer
from nanochat_jax.chat import conversation, render, render_prompt
from nanochat_jax.config import ModelConfig
from nanochat_jax.errors import UserError
from nanochat_jax.eval.chat import CHATCORE, Evaluator, Sizes, chatcore, wilson
from nanochat_jax.tasks import Example, Task, open_task
from nanochat_jax.tasks.task import is_reference_letter

MESH_1, LETTERS = sharding.make_mesh(devices=jax.devices()[:1]), ("A", "B", "C", "D")
CATEGORICAL = Task("t", "categorical", lambda split: [], is_reference_letter, baseline=0.25)


@pytest.fixture(scope="module")
def subject(tiny_data):
    """A model with nothing left at zero, its trained tokenizer, and questions of all lengths, some of them too long."""
    tok = tokenizer.load(tiny_data / "tokenizer.model")
    cfg = ModelConfig(sequence_len=128, vocab_size=tok.vocab_size, n_layer=1, n_head=2, n_kv_head=1, n_embd=64)
    rng, examples = np.random.default_rng(0), []
    for n in rng.integers(0, 160, 40):
        letters = LETTERS[: rng.integers(2, 5)]
        question = "".join(rng.choice(list("abcdefghijklmnop "), n)) + "?" + "".join(letters)
        examples.append(Example(conversation(question, "A"), "A", letters))
    return random_params(cfg), cfg, tok, examples


@pytest.fixture(scope="module")
def evaluator(subject) -> Evaluator:
    params, cfg, tok, _ = subject
    return Evaluator(params, cfg, tok, COMPUTE, MESH_1, Sizes(slots=8, max_new_tokens=4))


def choices(evaluator: Evaluator, examples: list[Example]) -> list[tuple[Example, str]]:
    """What is chosen, by way of the judge, which sees each choice."""
    chosen: list[tuple[Example, str]] = []
    task = replace(CATEGORICAL, judge=lambda *choice: chosen.append(choice) or True)
    result = evaluator.evaluate(task, examples)
    assert (result.right, result.too_long) == (len(chosen), len(examples) - len(chosen))
    return chosen


def test_choices_are_those_of_one_whole_prompt_at_a_time(subject, evaluator):
    params, cfg, tok, examples = subject
    forward = jax.jit(lambda tokens_BT: model.forward(params, cfg, tokens_BT, compute=COMPUTE))
    expected = []
    for example in examples:
        prompt = render_prompt(example.prompt, tok)
        if len(prompt) < cfg.sequence_len:
            padded_BT = np.array([prompt + [tok.bos] * (cfg.sequence_len - len(prompt))], np.int32)
            logits_V = np.asarray(forward(padded_BT))[0, len(prompt) - 1]
            expected.append((example, max(example.letters, key=lambda letter: logits_V[tok.encode(letter)[0]])))
    assert choices(evaluator, examples) == expected
    assert 20 < len(expected) < 40 and len({letter for _, letter in expected}) > 1


def test_choices_depend_neither_on_batches_nor_on_order_nor_on_devices(subject, evaluator):
    params, cfg, tok, examples = subject
    expected = choices(evaluator, examples)
    assert choices(evaluator, examples[::-1]) == expected[::-1]
    assert choices(evaluator, examples[5:6]) == [pair for pair in expected if pair[0] is examples[5]]
    mesh = sharding.make_mesh()
    placed = jax.device_put(params, sharding.replicated(mesh))
    for other, rows in ((MESH_1, 3), (mesh, 1)):
        evaluator = Evaluator(placed if other is mesh else params, cfg, tok, COMPUTE, other, Sizes(rows=rows))
        assert choices(evaluator, examples) == expected


def test_more_examples_compile_nothing_more(subject, evaluator):
    _, cfg, tok, examples = subject
    tasks = CATEGORICAL, replace(CATEGORICAL, kind="generative")
    for task in tasks:
        evaluator.evaluate(task, examples[:20])
    compiled = evaluator.compilations
    assert compiled == {"categorical": 2, "engine": 5}  # chunks of 32, 64 and 128 tokens; to insert and to decode
    counted: list[int] = []
    for task in tasks:
        evaluator.evaluate(task, examples + examples[::-1], counted.append)
    assert evaluator.compilations == compiled
    too_long = sum(len(render_prompt(example.prompt, tok)) >= cfg.sequence_len for example in examples)
    assert sum(counted) == 80 + 80 - 2 * too_long  # nothing is sampled for those, so nothing ends


def test_a_model_that_always_says_b():
    params = scripted_params({TOKENIZER.control["<|assistant_start|>"]: ids("b")[0]})

    def example(right: str, letters: str = "abc", question: str = "which") -> Example:
        return Example(conversation(question, right), right, tuple(letters))

    examples = [example("b"), example("a"), example("b", "dcb"), example("c", "ac"), example("b", question="x" * 150)]
    result = Evaluator(params, CHAT_CFG, TOKENIZER, COMPUTE, MESH_1).evaluate(CATEGORICAL, examples)
    assert (result.examples, result.right, result.too_long, result.accuracy) == (5, 2, 1, 0.4)
    assert result.centred == pytest.approx(0.2) and result.interval == wilson(2, 5)
    right, wrong = result.samples
    assert (right.question, right.answer, right.is_right) == ("which", "b", True)
    assert (wrong.answer, wrong.is_right, wrong.is_too_long) == ("b", False, False)
    with pytest.raises(UserError, match=r"the letter 'bc' is 2 tokens"):
        Evaluator(params, CHAT_CFG, TOKENIZER, COMPUTE, MESH_1).evaluate(CATEGORICAL, [example("a", ("a", "bc"))])


def test_a_model_without_turns_is_refused():
    tok = CharTokenizer("ab")
    tok.control.pop("<|assistant_start|>")
    with pytest.raises(UserError, match="no tokens for the turns"):
        Evaluator({}, CHAT_CFG, tok, COMPUTE, MESH_1).evaluate(
            CATEGORICAL, [Example(conversation("a", "b"), "b", ("b",))]
        )


def test_a_model_that_has_learnt_one_answer():
    answer = [
        {"type": "python", "text": "6*7"},
        {"type": "python_output", "text": "42"},
        {"type": "text", "text": "the answer is 42"},
    ]
    learnt = conversation("what is 6*7", answer)
    cfg = replace(CHAT_CFG, n_layer=1)
    tokens, supervised = render(learnt, TOKENIZER)
    inputs_BT, targets_BT = (
        jnp.array([tokens[:-1]]),
        jnp.where(jnp.array([supervised[1:]]), jnp.array([tokens[1:]]), -1),
    )
    params = model.init_params(jax.random.key(0), cfg, COMPUTE)
    tx = optax.adam(0.01)

    @jax.jit
    def step(params, moments):
        loss, grads = jax.value_and_grad(
            lambda params: model.token_nats(params, cfg, inputs_BT, targets_BT, compute=COMPUTE).sum()
        )(params)
        updates, moments = tx.update(grads, moments)
        return optax.apply_updates(params, updates), moments, loss

    moments = tx.init(params)
    for _ in range(80):
        params, moments, loss = step(params, moments)
    assert loss < 0.1
    task = open_task("arithmetic")
    examples = [Example(learnt, "42"), Example(learnt, "43"), Example(conversation("6*7 " * 40, "42"), "42")]
    result = Evaluator(params, cfg, TOKENIZER, COMPUTE, MESH_1, Sizes(slots=2)).evaluate(task, examples)
    assert (result.kind, result.examples, result.right, result.too_long) == ("generative", 3, 1, 1)
    assert [sample.answer for sample in result.samples] == ["the answer is 42"] * 2
    assert result.samples[0].question == "what is 6*7"


@pytest.mark.parametrize(
    ("right", "examples", "interval"),
    [
        (0, 10, (0.0, 0.277533)),
        (8, 10, (0.490162, 0.943318)),
        (50, 50, (0.928651, 1.0)),
        (300, 1000, (0.272416, 0.329119)),
    ],
)
def test_intervals(right, examples, interval):
    assert wilson(right, examples) == pytest.approx(interval, abs=1e-5)
    assert np.roots(
        [  # its ends are the proportions p from which the measured one is as far as 95 % of samples are
            1 + 1.959964**2 / examples,
            -2 * right / examples - 1.959964**2 / examples,
            (right / examples) ** 2,
        ]
    ) == pytest.approx(wilson(right, examples)[::-1], abs=1e-6)


def test_chatcore_needs_all_its_tasks():
    results = {name: {"centred": number / 10} for number, name in enumerate(CHATCORE)} | {"spelling": {"centred": 1.0}}
    assert chatcore(results) == pytest.approx(0.2)
    for name in CHATCORE:
        assert chatcore({other: result for other, result in results.items() if other != name}) is None
