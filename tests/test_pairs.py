"""Pairs of a model's own answers: right over wrong, nothing but what a conversation can hold, the same each time."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from nanochat_jax.chat import conversation, render_part, render_prompt
from nanochat_jax.data.preference import open_pairs
from nanochat_jax.engine import Output
from nanochat_jax.errors import UserError
from nanochat_jax.load import open_model
from nanochat_jax.rollouts import Answer, Question
from nanochat_jax.tasks import open_task
from nanochat_jax.tokenizer import Tokenizer
from train import pairs, sft
from train.stage import RunConfig

CALL = {"type": "python", "text": "2+3"}
RESULT = {"type": "python_output", "text": "5"}


@pytest.fixture(scope="module")
def tok(tiny_base) -> Tokenizer:
    return open_model(tiny_base).tokenizer


@pytest.fixture(scope="module")
def question() -> Question:
    task = open_task("arithmetic")
    return Question(task, replace(task.examples("train")[0], conversation=conversation("2 + 3?", "It is 5.")), 0)


def given(
    tok: Tokenizer, question: Question, *parts: str | dict, end: bool = True, is_right: bool = False, logp: float = -1
) -> Answer:
    """An answer of these parts, text and calls sampled, outputs forced."""
    tokens, sampled = [], []
    for part in parts:
        part = {"type": "text", "text": part} if isinstance(part, str) else part
        ids = render_part(part, tok)
        tokens += ids
        sampled += [part["type"] != "python_output"] * len(ids)
    if end:
        tokens, sampled = [*tokens, tok.control["<|assistant_end|>"]], [*sampled, True]
    output = Output(0, tuple(tokens), tuple(sampled), (logp,) * len(tokens), "stop" if end else "length")
    return Answer(render_prompt(question.example.prompt, tok), output, "", is_right)


def test_only_what_a_conversation_can_hold_is_used(tok, question):
    def usable(*parts: str | dict, **options) -> list | None:
        return pairs.usable_parts(question, given(tok, question, *parts, **options), tok)

    assert usable("It is 6.") == [{"type": "text", "text": "It is 6."}]
    assert usable(CALL, RESULT, "5") == [CALL, RESULT, {"type": "text", "text": "5"}]
    assert usable() is None  # empty
    assert usable("It is", end=False) is None  # cut off
    assert usable("  ") is not None
    whole = given(tok, question, CALL, "5")
    start, closing = tok.control["<|python_start|>"], tok.control["<|python_end|>"]
    without_end = tuple(token for token in whole.output.tokens if token != closing)
    assert start in without_end
    unclosed = replace(whole.output, tokens=without_end, sampled=(True,) * len(without_end))
    assert pairs.usable_parts(question, replace(whole, output=unclosed), tok) is None
    invented = given(tok, question, CALL, RESULT, "5")
    claimed = replace(invented.output, sampled=(True,) * len(invented.output.tokens))
    assert pairs.usable_parts(question, replace(invented, output=claimed), tok) is None  # it wrote the output itself


def made(tok: Tokenizer, question: Question, *answers: Answer, **changes) -> tuple[list, Counter]:
    config = replace(pairs.Config(checkpoint=Path(), out=Path()), **changes)
    count: Counter[str] = Counter()
    found = pairs.pairs_of(question, answers, tok, config, count)
    return [(pair["chosen"][0]["text"], pair["rejected"][0]["text"]) for pair in found], count


def test_right_is_chosen_and_wrong_rejected(tok, question):
    right, wrong = (
        [given(tok, question, f"{text} {n}", is_right=text == "right") for n in range(3)] for text in ("right", "wrong")
    )
    cut = given(tok, question, "wrong", end=False)
    found, count = made(tok, question, wrong[0], cut, right[0])
    assert found == [("right 0", "wrong 0")]
    assert count == {"questions": 1, "mixed": 1, "unusable": 1, "pairs": 1}
    assert made(tok, question, *right) == ([], {"questions": 1, "right": 1, "pairs": 0})
    found, count = made(tok, question, wrong[0], wrong[0], wrong[1], per_question=5)
    assert found == [("It is 5.", "wrong 0"), ("It is 5.", "wrong 1")]  # the task's own answer; each wrong one once
    assert count["wrong"] == 1
    assert made(tok, question, *wrong, gold=False)[0] == []
    found, _ = made(tok, question, *right, *wrong[:2], per_question=2)
    assert found == [("right 0", "wrong 0"), ("right 1", "wrong 1")]
    likely = given(tok, question, "right 9", is_right=True, logp=-0.5)
    assert made(tok, question, *right, likely, *wrong)[0] == [("right 9", "wrong 0")]
    found, _ = made(tok, question, *right[:1], *wrong, per_question=2)
    assert found == [("right 0", "wrong 0"), ("right 0", "wrong 1")]


@pytest.fixture(scope="module")
def unsure(tiny_base, tmp_path_factory) -> Path:
    """A model that has learnt a right answer and a wrong one to each question."""
    folder = tmp_path_factory.mktemp("unsure")
    questions = [example.prompt["messages"][0]["content"] for example in open_task("identity").examples("train")[:60]]
    chats = [conversation(asked, f"I am {name}.") for asked in questions for name in ("nanochat", "Siri")]
    (folder / "chats.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    run, mix = RunConfig(out=folder / "sft", save_every=0, eval_every=0), f"jsonl:{folder}/chats.jsonl"
    sft.main(sft.Config(checkpoint=tiny_base, run=run, mix=mix, steps=60, prompts=(), eval_rows=8))
    return folder / "sft"


def test_a_model_that_is_unsure_gives_pairs_the_same_each_time(unsure, tmp_path, capsys):
    config = pairs.Config(
        unsure, tmp_path / "pairs.jsonl", tasks="identity", examples=40, max_new_tokens=24, slots=1, gold=False
    )
    count = pairs.main(config)["identity"]
    assert count["questions"] == 40 and count["right"] + count["mixed"] + count["wrong"] == 40
    assert count["mixed"] >= count["pairs"] >= 10
    made = list(open_pairs(f"jsonl:{config.out}"))
    assert len(made) == count["pairs"]
    judge, examples = open_task("identity").judge, open_task("identity").examples("train")
    by_prompt = {example.prompt["messages"][0]["content"]: example for example in examples}
    for pair in made:
        example = by_prompt[pair.prompt["messages"][0]["content"]]
        said = [
            "".join(part["text"] for part in side["messages"][-1]["content"]) for side in (pair.chosen, pair.rejected)
        ]
        assert [judge(example, text) for text in said] == [True, False]
    printed = capsys.readouterr().out
    assert f"{count['pairs']} pairs in {config.out}" in printed and "unusable" in printed
    first = config.out.read_bytes()
    pairs.main(config)
    assert config.out.read_bytes() == first
    pairs.main(replace(config, seed=1))
    assert config.out.read_bytes() != first
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["pairs.config.json", "pairs.jsonl"]


def test_bad_input_is_named(tiny_base, tmp_path):
    config = pairs.Config(tiny_base, tmp_path / "pairs.jsonl", tasks="arithmetic", examples=2, max_new_tokens=2)
    with pytest.raises(UserError, match="no pairs came of 2 questions"):
        pairs.main(config)  # all answers are cut off
    assert not config.out.exists()
    with pytest.raises(UserError, match="unknown task 'nonsense'"):
        pairs.main(replace(config, tasks="nonsense"))
    with pytest.raises(UserError, match="--temperature 0"):
        replace(config, temperature=0.0)
    with pytest.raises(UserError, match="--samples 0"):
        replace(config, samples=0)
