"""MMLU: questions of 57 subjects with four options each (Hendrycks et al., arXiv:2009.03300)."""

from nanochat_jax.chat import conversation
from nanochat_jax.data.rows import Row
from nanochat_jax.errors import UserError
from nanochat_jax.tasks.task import Example, Task, from_rows, is_reference_letter, multiple_choice

LETTERS = ("A", "B", "C", "D")
SOURCES = {  # MMLU itself has no training split; auxiliary_train gathers questions of other sets
    "train": "hub:cais/mmlu#auxiliary_train/train-*.parquet",
    "test": "hub:cais/mmlu#all/test-*.parquet",
}


def task(source: str) -> Task:
    """The task, from the hub or from rows with the same fields."""
    return Task("mmlu", "categorical", from_rows("mmlu", source, SOURCES, example), is_reference_letter, baseline=0.25)


def example(row: Row) -> Example:
    """Fields: question, choices (four), answer (index); auxiliary_train wraps them in a field "train"."""
    if set(row.values) == {"train"}:
        row = Row(row.where, row.field("train", dict))
    choices, answer = row.field("choices", list), row.field("answer", int)
    if len(choices) != len(LETTERS) or not 0 <= answer < len(LETTERS):
        raise UserError(f"{row.where}: {len(choices)} choices and answer {answer}: four and 0 to 3 are expected")
    question = multiple_choice(row.field("question", str), choices, LETTERS)
    return Example(conversation(question, LETTERS[answer]), LETTERS[answer], LETTERS)
