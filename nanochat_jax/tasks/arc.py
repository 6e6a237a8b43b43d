"""ARC: science questions of primary school, in an easy and a hard set (Clark et al., arXiv:1803.05457)."""

from nanochat_jax.chat import conversation
from nanochat_jax.data.rows import Row
from nanochat_jax.errors import UserError
from nanochat_jax.tasks.task import SPLITS, Example, Task, from_rows, is_reference_letter, multiple_choice


def task(name: str, subset: str, source: str) -> Task:
    """The subset ARC-Easy or ARC-Challenge, from the hub or from rows with the same fields.

    The options keep the labels they have in the set, which are letters or, in some questions, digits.
    """
    defaults = {split: f"hub:allenai/ai2_arc#{subset}/{split}-*.parquet" for split in SPLITS}
    examples = from_rows(name, source, defaults, example)
    return Task(name, "categorical", examples, is_reference_letter, baseline=0.25)


def example(row: Row) -> Example:
    """Fields: question, choices (text, label: lists of the same length), answerKey."""
    choices = Row(f"{row.where}: choices", row.field("choices", dict))
    texts, letters = choices.field("text", list), choices.field("label", list)
    key = row.field("answerKey", str)
    if len(texts) != len(letters) or key not in letters:
        raise UserError(f"{row.where}: {len(texts)} choices, labels {letters}, answerKey {key!r}: they do not fit")
    question = multiple_choice(row.field("question", str), texts, letters)
    return Example(conversation(question, key), key, tuple(letters))
