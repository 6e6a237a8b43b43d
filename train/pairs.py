"""Pairs for preference optimisation, made of a model's own answers: a right one is preferred to a wrong one.

Questions of the tasks' train splits are asked several times; the tasks' judges say which answers are right.

    python -m train.pairs --checkpoint runs/my/sft --tasks spelling,counting --out runs/my/pairs.jsonl
"""

import json
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import compress
from pathlib import Path

import jax
from tqdm import tqdm

from nanochat_jax import hosts, sharding
from nanochat_jax.chat import Conversation, Part, check_conversation, content_parts, parse, render
from nanochat_jax.config import to_json, write_json
from nanochat_jax.data.rl import open_questions
from nanochat_jax.errors import UserError
from nanochat_jax.files import write_bytes
from nanochat_jax.load import load_model
from nanochat_jax.rollouts import Answer, Question, answer, make_engine
from nanochat_jax.sampling import Sampling
from nanochat_jax.tokenizer import Tokenizer
from train import cli
from train.stage import at_least


@dataclass(frozen=True)
class Config:
    checkpoint: Path
    """Folder of the run whose newest good checkpoint answers."""
    out: Path
    """File to write, one pair a line, as train.dpo reads it."""
    tasks: str = "spelling,counting,arithmetic,identity,refusals"
    """Tasks to ask, with commas between: NAME or NAME=SOURCE."""
    examples: int = 500
    """Questions of each task, the first of its train split; 0 for all."""
    samples: int = 4
    """Answers sampled of each question."""
    per_question: int = 1
    """Pairs made of each question at most."""
    gold: bool = True
    """Where no answer is right, let the task's own be chosen."""
    temperature: float = 1.0
    """Of sampling."""
    top_k: int = 50
    """Sample from the likeliest so many tokens; 0 for all."""
    max_new_tokens: int = 64
    """Of an answer, a tool's outputs included; longer ones are left out."""
    slots: int = 32
    """Answers that one device samples at a time."""
    seed: int = 0
    """Of sampling."""

    def __post_init__(self) -> None:
        for name in ("samples", "per_question", "max_new_tokens", "slots"):
            at_least(name.replace("_", "-"), getattr(self, name), 1)
        for name in ("examples", "seed"):
            at_least(name, getattr(self, name), 0)
        if self.temperature <= 0:
            raise UserError(f"--temperature {self.temperature} must be positive, for samples that differ")


# What is counted of each task: questions, those of them whose answers are all right, some right, and none right;
# answers that are cut off, empty, or call tools in a way that no conversation has; pairs.
COUNTED = ("questions", "right", "mixed", "wrong", "unusable", "pairs")


def main(config: Config) -> dict[str, Counter[str]]:
    """Make pairs, and say what became of each task's questions."""
    hosts.agree(config=config)
    loaded = load_model(config.checkpoint, mesh=sharding.make_mesh())
    tok, cfg = loaded.tokenizer, loaded.cfg
    questions = open_questions(config.tasks, "train", tok, cfg.sequence_len, limit=config.examples or None).all
    slots = config.slots * jax.device_count()
    with tqdm(total=len(questions) * config.samples, desc="answers", unit="answer", disable=None) as bar:
        answers = answer(
            make_engine(loaded.params, cfg, tok, loaded.compute, slots), tok, questions,
            samples=config.samples, max_new_tokens=config.max_new_tokens, progress=bar.update,
            sampling=Sampling(temperature=config.temperature, top_k=config.top_k, seed=config.seed),
        )  # fmt: skip
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    lines = []
    for question, given in zip(questions, answers, strict=True):
        for pair in pairs_of(question, given, tok, config, counts[question.task.name]):
            lines.append(json.dumps(pair, ensure_ascii=False) + "\n")
    print(f"{'':16}" + "".join(f"{name:>12}" for name in COUNTED))
    for task, count in counts.items():
        print(f"{task:16}" + "".join(f"{count[name]:12,}" for name in COUNTED))
    if not lines:
        raise UserError(f"no pairs came of {len(questions):,} questions: ask more, or with more samples")
    hosts.first(lambda: write_bytes(config.out, "".join(lines).encode()))
    hosts.first(lambda: write_json(config.out.with_suffix(".config.json"), to_json(config)))
    print(f"{len(lines):,} pairs in {config.out}")
    return counts


def pairs_of(
    question: Question, answers: Sequence[Answer], tokenizer: Tokenizer, config: Config, count: Counter[str]
) -> list[dict[str, object]]:
    """Pairs of one question's answers, each with another chosen or another rejected one, and counted."""
    said: dict[bool, list[list[Part]]] = {True: [], False: []}  # by whether it is right
    # The likeliest first: what was right by luck is seldom the model's first choice.
    for one in sorted(answers, key=lambda one: -sum(compress(one.output.logprobs, one.output.sampled))):
        parts = usable_parts(question, one, tokenizer)
        if parts is None:
            count["unusable"] += 1
        elif parts not in said[one.is_right]:
            said[one.is_right].append(parts)
    rights = sum(one.is_right for one in answers)
    count.update(["questions", "right" if rights == len(answers) else "mixed" if rights else "wrong"])
    if config.gold and not said[True]:
        said[True].append(content_parts(question.example.conversation["messages"][-1]))
    chosen, rejected = said[True], said[False]
    number = min(config.per_question, max(len(chosen), len(rejected))) if chosen and rejected else 0
    count["pairs"] += number
    return [
        {
            "prompt": question.example.prompt["messages"],
            "chosen": chosen[i % len(chosen)],
            "rejected": rejected[i % len(rejected)],
            "task": question.task.name,
        }
        for i in range(number)
    ]


def usable_parts(question: Question, given: Answer, tokenizer: Tokenizer) -> list[Part] | None:
    """An answer's parts, if a conversation of them has the same tool calls and the same end; otherwise None."""
    parts, output = parse(given.output.tokens, tokenizer), given.output
    whole: Conversation = {
        "messages": [*question.example.prompt["messages"], {"role": "assistant", "content": parts}],
    }
    try:
        rendered = render(check_conversation(whole), tokenizer)
    except UserError:
        return None
    control = set(tokenizer.control.values())
    learnt = list(zip(*rendered, strict=True))[len(given.prompt) :]
    written = zip(output.tokens, output.sampled, strict=True)
    same = [pair for pair in learnt if pair[0] in control] == [pair for pair in written if pair[0] in control]
    return parts if same else None


if __name__ == "__main__":
    cli.run(main, Config)
