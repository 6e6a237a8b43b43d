"""Answers to tasks: what the judge reads, whose randomness depends on what, and that nothing is left behind."""

from dataclasses import replace

import jax
import pytest
from test_engine import CHAT_CFG, COMPUTE, DONE, END, OUTPUT_END, START, TOKENIZER, chain, ids, random_params
from test_engine import scripted_params as scripted

from nanochat_jax import model, sharding
from nanochat_jax.chat import conversation
from nanochat_jax.rollouts import Question, answer, make_engine
from nanochat_jax.sampling import Sampling
from nanochat_jax.tasks import Example, Task

TASK = Task("say", "generative", lambda split: [], lambda example, answer: answer == example.reference)
ASSISTANT = TOKENIZER.control["<|assistant_start|>"]


def questions(*texts: str, right: str = "yk", task: Task = TASK) -> list[Question]:
    return [Question(task, Example(conversation(text, right), right), number) for number, text in enumerate(texts)]


@pytest.fixture(scope="module")
def engine():
    return make_engine(random_params(CHAT_CFG), CHAT_CFG, TOKENIZER, COMPUTE, slots=8)


def test_the_judge_reads_what_was_said_and_not_what_was_calculated():
    script = chain(ASSISTANT, START, *ids("6*7"), END, DONE) | chain(OUTPUT_END, *ids("yk"), DONE)
    engine = make_engine(scripted(script), CHAT_CFG, TOKENIZER, COMPUTE, slots=2)
    [[right]], [[wrong]] = (answer(engine, TOKENIZER, questions("x", right=text)) for text in ("yk", "6*742yk"))
    assert (right.text, right.is_right, wrong.is_right) == ("yk", True, False)
    assert TOKENIZER.decode(list(right.output.tokens)) == "6*742yk" and right.output.finish_reason == "stop"
    assert right.prompt[-1] == ASSISTANT
    [[cut]] = answer(engine, TOKENIZER, questions("x"), max_new_tokens=3)
    assert len(cut.output.tokens) == 3 and not cut.is_right


def test_samples_depend_on_their_question_their_number_and_the_seed_alone(engine):
    asked = questions("one", "two", "three", "one")
    how = {"samples": 3, "sampling": Sampling(seed=5), "max_new_tokens": 12}
    together = answer(engine, TOKENIZER, asked, **how)
    assert [len(samples) for samples in together] == [3] * 4
    alone = [answer(engine, TOKENIZER, [question], **how)[0] for question in asked[::-1]][::-1]
    tokens = [[sample.output.tokens for sample in samples] for samples in together]
    assert tokens == [[sample.output.tokens for sample in samples] for samples in alone]
    assert len({sample for samples in tokens for sample in samples}) == 12  # the same question twice, too
    [other, *_] = answer(engine, TOKENIZER, asked, **how | {"sampling": Sampling(seed=6)})
    assert [sample.output.tokens for sample in other] != tokens[0]


def test_prompts_that_fill_the_context_are_wrong_whatever_the_judge_says(engine):
    generous = replace(TASK, judge=lambda example, answer: True)
    counted: list[int] = []
    asked = questions("x" * 200, "y", "z" * 200, task=generous)
    answers = answer(engine, TOKENIZER, asked, samples=2, max_new_tokens=5, progress=counted.append)
    assert [[sample.is_right for sample in samples] for samples in answers] == [[False] * 2, [True] * 2, [False] * 2]
    assert answers[0][0].output.tokens == () and len(answers[0][0].prompt) > CHAT_CFG.sequence_len
    assert sum(counted) == 2


def test_an_interruption_leaves_the_engine_idle(engine):
    def interrupt(_: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        answer(engine, TOKENIZER, questions(*"abcdefghijkl"), progress=interrupt)
    assert engine.step() == []
    assert answer(engine, TOKENIZER, []) == []


def test_slots_are_rounded_up_to_what_the_devices_can_hold():
    params = model.init_params(jax.random.key(0), CHAT_CFG, COMPUTE)
    placed = jax.device_put(params, sharding.replicated(sharding.make_mesh()))
    for tree, slots in ((params, {5: 5, 8: 8, 12: 16}), (placed, {5: 8, 64: 64, 65: 128})):
        made = {n: make_engine(tree, CHAT_CFG, TOKENIZER, COMPUTE, slots=n).config.slots for n in slots}
        assert made == slots
