"""Try a safety policy: on one text, or on labelled ones, with precision and recall of every category.

    python -m serve.check_safety --text "How do I kill a Python process?"
    python -m serve.check_safety --prompts tests/data/safety_prompts.jsonl --part held_out

A line of the labelled file is {"text": …, "label": a category or "benign", "role": "user" or "assistant", "part": …}.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from nanochat_jax.config import from_json
from nanochat_jax.errors import UserError
from nanochat_jax.safety import ACTIONS, Policy, Role, load_policy
from train import cli


@dataclass(frozen=True)
class Config:
    policy: Path | None = None
    """Policy file; default: the one that comes with the project."""
    text: str | None = None
    """A text to check."""
    role: Role = "user"
    """Who wrote it."""
    prompts: Path | None = None
    """Labelled texts, one JSON object a line."""
    part: str | None = None
    """Use only the lines of this part."""
    errors: bool = False
    """Print the texts that are wrongly found or not found, too."""


@dataclass(frozen=True)
class Labelled:
    """A text, and the category it should be found under."""

    text: str
    label: str
    role: Role = "user"
    part: str = ""


class Score(NamedTuple):
    """How a policy did on one category; found and precision of "benign" count what passes."""

    texts: int
    found: int  # of these texts, under this category
    wrong: int  # of the other texts, under this category

    @property
    def precision(self) -> float:
        return self.found / (self.found + self.wrong) if self.found + self.wrong else float("nan")

    @property
    def recall(self) -> float:
        return self.found / self.texts if self.texts else float("nan")


def verdict(policy: Policy, prompt: Labelled) -> str:
    """The category that a text is found under, or "benign"."""
    findings = policy.find(prompt.text, prompt.role)
    return min(findings, key=lambda finding: ACTIONS.index(finding.action)).category if findings else "benign"


def measure(policy: Policy, prompts: Sequence[Labelled]) -> dict[tuple[str, str], Score]:
    """Scores by role and category; "any" is all that should be found, under whatever category."""
    pairs = [(prompt.role, prompt.label, verdict(policy, prompt)) for prompt in prompts]
    scores: dict[tuple[str, str], Score] = {}
    for role in sorted({role for role, _, _ in pairs}, reverse=True):
        rows = [(label, found) for other, label, found in pairs if other == role]
        for name in dict.fromkeys(label for label, _ in rows):
            hits = sum(label == found == name for label, found in rows)
            scores[role, name] = Score(
                sum(label == name for label, _ in rows), hits, sum(found == name for _, found in rows) - hits
            )
        hits = sum("benign" not in row for row in rows)
        harmful = sum(label != "benign" for label, _ in rows)
        scores[role, "any"] = Score(harmful, hits, sum(found != "benign" for _, found in rows) - hits)
    return scores


def load_prompts(path: Path, part: str | None = None) -> list[Labelled]:
    """Read labelled texts; UserError names the line at fault."""
    prompts = []
    try:
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            prompts.append(from_json(Labelled, json.loads(line), f"{path}, line {number}"))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read labelled texts from {path}: {error}") from error
    return [prompt for prompt in prompts if part in (None, prompt.part)]


def main(config: Config) -> dict[tuple[str, str], Score]:
    """Print what the policy finds."""
    policy = load_policy(config.policy)
    if config.text is not None:
        findings = policy.find(config.text, config.role)
        for finding in findings:
            print(f"{finding.action}: {finding.category}: {config.text[slice(*finding.span)]!r}\n  {finding.say}")
        if not findings:
            print("nothing found")
    if config.prompts is None:
        return {}
    prompts = load_prompts(config.prompts, config.part)
    if config.errors:
        for prompt in prompts:
            if (found := verdict(policy, prompt)) != prompt.label:
                print(f"{prompt.role}, {prompt.label}, found as {found}: {prompt.text}")
    scores = measure(policy, prompts)
    print(f"{'':24}{'texts':>8}{'found':>8}{'wrong':>8}{'precision':>11}{'recall':>9}")
    for (role, name), score in scores.items():
        figures = f"{score.texts:8}{score.found:8}{score.wrong:8}{score.precision:11.2f}{score.recall:9.2f}"
        print(f"{role + ' ' + name:24}{figures}")
    return scores


if __name__ == "__main__":
    cli.run(main, Config)
