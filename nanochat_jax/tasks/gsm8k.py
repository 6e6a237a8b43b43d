"""GSM8K: word problems of primary school, whose answers call the calculator (Cobbe et al., arXiv:2110.14168)."""

import re

from nanochat_jax.chat import Part, conversation
from nanochat_jax.data.rows import Row
from nanochat_jax.errors import UserError
from nanochat_jax.tasks.task import SPLITS, Example, Task, from_rows, marked_numbers
from nanochat_jax.tools import calculate

SOURCES = {split: f"hub:openai/gsm8k#main/{split}-*.parquet" for split in SPLITS}
_CALL = re.compile(r"<<([^<>=]*)=([^<>]*)>>")


def task(source: str) -> Task:
    """The task, from the hub or from rows with the same fields."""
    return Task("gsm8k", "generative", from_rows("gsm8k", source, SOURCES, example), judge)


def example(row: Row) -> Example:
    """Fields: question, answer (which ends with #### and the number, and writes calls as <<48/2=24>>)."""
    answer = row.field("answer", str)
    reference = marked_numbers(answer)
    if len(reference) != 1 or "" in reference:
        raise UserError(f"{row.where}: field 'answer' does not end with one number after ####")
    return Example(conversation(row.field("question", str), answer_parts(answer)), reference.pop())


def answer_parts(answer: str) -> list[Part]:
    """An answer with its calls as python parts.

    Their outputs are what our calculator says, because that is what the model will be shown; the set's own writing
    differs in trailing zeros (4.50) and stays where the calculator does not understand the call.
    """
    parts: list[Part] = []
    end = 0
    for call in _CALL.finditer(answer):
        expression, written = call.groups()
        parts += [
            {"type": "text", "text": answer[end : call.start()]},
            {"type": "python", "text": expression},
            {"type": "python_output", "text": calculate(expression) or written},
        ]
        end = call.end()
    parts.append({"type": "text", "text": answer[end:]})
    return [part for part in parts if part["text"]]


def judge(example: Example, answer: str) -> bool:
    """The number after #### is right; several that differ are wrong, so that listing many wins nothing."""
    return marked_numbers(answer) == {example.reference}
