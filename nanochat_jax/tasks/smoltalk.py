"""SmolTalk: general conversations, the bulk of nanochat's fine-tuning; to learn from, not to be judged by."""

from nanochat_jax.data.rows import Row, row_conversation
from nanochat_jax.tasks.task import SPLITS, Example, Task, from_rows

SOURCES = {split: f"hub:HuggingFaceTB/smol-smoltalk#data/{split}-*.parquet" for split in SPLITS}


def task(source: str) -> Task:
    """The task, from the hub or from rows with a field "messages"."""
    return Task("smoltalk", "generative", from_rows("smoltalk", source, SOURCES, example), judge)


def example(row: Row) -> Example:
    return Example(row_conversation(row), None)


def judge(example: Example, answer: str) -> bool:
    """No answer to an open conversation is right or wrong; an empty one is not even an answer."""
    return bool(answer.strip())
