"""Arithmetic with the calculator: made up without end, with pairs of operands kept apart for testing."""

import random
from functools import partial

from nanochat_jax.chat import Part, conversation
from nanochat_jax.data.rows import is_held_out
from nanochat_jax.tasks.task import Example, Task, all_numbers, check_no_argument, generated
from nanochat_jax.tools import calculate

LARGEST = {"+": 999, "-": 999, "*": 99, "/": 99}  # operands; of a division, the divisor and the quotient
WORDS = {"+": ("plus", "+"), "-": ("minus", "-"), "*": ("times", "*"), "/": ("divided by", "/")}
QUESTIONS = (
    "What is {}?",
    "How much is {}?",
    "Calculate {}.",
    "What is the result of {}?",
    "Can you work out {} for me?",
    "Please compute {}.",
)


def task(argument: str) -> Task:
    """Sums, differences, products and quotients of whole numbers; the answer calls the calculator."""
    check_no_argument("arithmetic", argument)
    return Task("arithmetic", "generative", generated("arithmetic", example), judge)


def mental_task(argument: str) -> Task:
    """The same questions, answered at once: as people write it down, and as a small model cannot do it.

    A model that has learnt both ways from examples is one for reinforcement learning: only one of them pays.
    """
    check_no_argument("mental-arithmetic", argument)
    return Task(
        "mental-arithmetic", "generative", generated("mental-arithmetic", partial(example, at_once=True)), judge
    )


def example(split: str, rng: random.Random, at_once: bool = False) -> Example:
    while True:
        operator = rng.choice("+-*/")
        low, high = (2, LARGEST[operator]) if operator in "*/" else (0, LARGEST[operator])
        a, b = rng.randint(low, high), rng.randint(low, high)
        # Of the unordered pair, so that neither 3 + 4 nor 4 + 3 tells what 3 - 4 or 12 / 4 is in the test.
        if is_held_out(f"{min(a, b)} {max(a, b)}") == (split == "test"):
            break
    if operator == "/":
        a *= b
    question = rng.choice(QUESTIONS).format(f"{a} {rng.choice(WORDS[operator])} {b}")
    expression = f"{a}{operator}{b}"
    result = calculate(expression) or ""
    call: list[Part] = [{"type": "python", "text": expression}, {"type": "python_output", "text": result}]
    said: list[Part] = [{"type": "text", "text": f"The answer is {result}."}]
    return Example(conversation(question, said if at_once else call + said), result)


def judge(example: Example, answer: str) -> bool:
    """The right number, and no other one."""
    return all_numbers(answer) == {example.reference}
