"""Many users at once against a running server: is every answer complete, how long do they wait, does memory grow?

    python -m serve.app --limits.requests-per-minute 0 --limits.concurrent 0 &
    python -m serve.loadtest --pid $! --users 64 --seconds 300
    python -m serve.loadtest --pid $! --users 64 --seconds 300 --page
    python -m serve.loadtest --users 1 16 --seconds 60 --least-speedup 6

Each user asks, reads the whole stream, and asks again: the API, or with --page as the app's page does. Tokens/s are
those of all complete answers of a round. Prints a table and, with --out, writes JSON; exits with status 1 on any error,
if memory has grown by more than it may, or if many users have not enough times the throughput of few.
"""

import asyncio
import random
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from nanochat_jax.config import write_json
from nanochat_jax.errors import UserError
from serve.users import ApiUser, Asked, Failed, PageUser
from train import cli

PROMPTS = (
    "Hello!",
    "Who are you?",
    "What is 23 * 17?",
    "How do you spell strawberry?",
    "How many r are in strawberry?",
    "Tell me about the sea.",
    "What do you like to read?",
    "Write a short story about a lighthouse keeper and the ships that pass by in the night.",
    "Please explain, as you would to a child, why leaves turn red in autumn and what becomes of them in winter.",
)


@dataclass(frozen=True)
class Config:
    url: str = "http://127.0.0.1:7860"
    """Where the server listens."""
    page: bool = False
    """Ask as the app's page does, not by the API."""
    model: str = ""
    """Name of the model; default: the server's first."""
    users: tuple[int, ...] = (64,)
    """Users at once; several numbers are tried one after another."""
    seconds: float = 300
    """For which each number of users goes on asking."""
    max_tokens: int = 64
    """Of an answer."""
    pid: int | None = None
    """Process of the server, to watch its memory."""
    max_growth: float = 0.05
    """By how much its memory may grow, from the end of the warm-up to the end, as a fraction."""
    least_speedup: float = 0
    """How many times the throughput of the first number of users the last must have."""
    warm_up_seconds: float = 10
    """Before anything is measured."""
    api_key: str = "any"
    seed: int = 0
    out: Path | None = None
    """File for the result as JSON."""


@dataclass
class Tally:
    """What the users saw."""

    answers: int = 0
    tokens: int = 0
    first_token_seconds: list[float] = field(default_factory=list)
    tokens_per_second: list[float] = field(default_factory=list)  # of each answer, from its first token on
    incomplete: int = 0  # errors behind the first word
    errors: list[str] = field(default_factory=list)


async def run_users(config: Config, client: httpx.AsyncClient, model: str, users: int, seconds: float) -> Tally:
    """Have users ask for so long; answers that are under way then are read to their end."""
    tally, until = Tally(), time.monotonic() + seconds

    async def user(number: int) -> None:
        rng = random.Random(f"{config.seed}/{users}/{number}")
        someone = (PageUser if config.page else ApiUser)(client, model, config.max_tokens)
        while time.monotonic() < until:
            asked = Asked(rng.choice(PROMPTS), rng.getrandbits(31))
            try:
                await someone.ask(asked)
            except (Failed, httpx.HTTPError) as error:
                tally.incomplete += asked.first is not None
                tally.errors.append(str(error) if isinstance(error, Failed) else f"{type(error).__name__}: {error}")
                await asyncio.sleep(0.5)  # a server that refuses shall not be asked in a tight loop
                continue
            tally.answers += 1
            tally.tokens += asked.tokens
            if asked.first is not None:
                tally.first_token_seconds.append(asked.first - asked.at)
                tally.tokens_per_second.append(asked.tokens / max(1e-3, time.monotonic() - asked.first))

    await asyncio.gather(*map(user, range(users)))
    return tally


def resident_bytes(pid: int | None) -> int | None:
    """Memory of a process."""
    if pid is None:
        return None
    kibibytes = subprocess.run(["ps", "-o", "rss=", "-p", str(pid)], capture_output=True, text=True).stdout.strip()
    if not kibibytes:
        raise UserError(f"--pid {pid}: there is no such process")
    return int(kibibytes) * 1024


def percentile(values: Sequence[float], percent: float) -> float | None:
    return float(np.percentile(values, percent)) if values else None


async def measure(config: Config) -> dict[str, Any]:
    """The numbers for each number of users, and the server's memory before and after."""
    # The page's server closes connections that were idle for 5 s: an error, if it does so just as a request leaves.
    limits = httpx.Limits(max_connections=None, keepalive_expiry=2)
    headers = {"Authorization": f"Bearer {config.api_key}"}
    async with httpx.AsyncClient(base_url=config.url, headers=headers, limits=limits, timeout=600) as client:
        try:
            models = (await client.get("/v1/models")).raise_for_status().json()["data"]
        except httpx.HTTPError as error:
            raise UserError(f"{config.url} does not answer: {error}; start it with python -m serve.app") from error
        model = config.model or models[0]["id"]
        await run_users(config, client, model, max(config.users), config.warm_up_seconds)
        before, rounds = resident_bytes(config.pid), []
        for users in config.users:
            began = time.monotonic()
            tally = await run_users(config, client, model, users, config.seconds)
            seconds = time.monotonic() - began
            rounds.append(
                {
                    "users": users,
                    "seconds": seconds,
                    "answers": tally.answers,
                    "tokens_per_second": tally.tokens / seconds,
                    "first_token_seconds_p50": percentile(tally.first_token_seconds, 50),
                    "first_token_seconds_p95": percentile(tally.first_token_seconds, 95),
                    "tokens_per_second_of_an_answer_p50": percentile(tally.tokens_per_second, 50),
                    "tokens_per_second_of_an_answer_p5": percentile(tally.tokens_per_second, 5),
                    "incomplete": tally.incomplete,
                    "errors": tally.errors,
                }
            )
    after = resident_bytes(config.pid)
    return {"model": model, "rounds": rounds, "resident_bytes_before": before, "resident_bytes_after": after}


COLUMNS = {  # heading, width and form of each figure
    "users": ("users", 5, "d"),
    "seconds": ("seconds", 8, ".1f"),
    "answers": ("answers", 8, ",d"),
    "tokens_per_second": ("tokens/s", 9, ",.1f"),
    "first_token_seconds_p50": ("first token p50 [s]", 20, ".3f"),
    "first_token_seconds_p95": ("p95", 7, ".3f"),
    "tokens_per_second_of_an_answer_p50": ("each answer p50 [tokens/s]", 27, ".1f"),
    "tokens_per_second_of_an_answer_p5": ("p5", 7, ".1f"),
    "incomplete": ("incomplete", 11, "d"),
    "errors": ("errors", 7, "d"),
}


def main(config: Config) -> dict[str, Any]:
    """Measure, print and judge."""
    result = asyncio.run(measure(config))
    rounds = result["rounds"]
    print("".join(f"{heading:>{width}}" for heading, width, _ in COLUMNS.values()))
    for one in rounds:
        shown = one | {"errors": len(one["errors"])}
        figures = ((shown[name], width, form) for name, (_, width, form) in COLUMNS.items())
        print("".join(f"{'–' if figure is None else format(figure, form):>{width}}" for figure, width, form in figures))
    failures = [error for one in rounds for error in one["errors"]]
    before, after = result["resident_bytes_before"], result["resident_bytes_after"]
    if before:
        growth = after / before - 1
        print(f"memory of the server: {before / 1e6:,.1f} MB, then {after / 1e6:,.1f} MB ({growth:+.1%})")
        if growth > config.max_growth:
            failures.append(f"memory grew by {growth:.1%}, more than {config.max_growth:.1%}")
    if not all(one["answers"] for one in rounds):
        failures.append("there was a number of users without any answer")
    elif len(rounds) > 1:
        speedup = rounds[-1]["tokens_per_second"] / rounds[0]["tokens_per_second"]
        print(f"{rounds[-1]['users']} users have {speedup:.2f} times the throughput of {rounds[0]['users']}")
        if speedup < config.least_speedup:
            failures.append(f"that is less than {config.least_speedup} times")
    if config.out:
        write_json(config.out, result)
    for error in dict.fromkeys(failures):
        print(f"error ({failures.count(error)} times): {error}", file=sys.stderr)
    if failures:
        sys.exit(1)
    return result


if __name__ == "__main__":
    cli.run(main, Config)
