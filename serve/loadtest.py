"""Many users at once against a running server: is every answer complete, how long do they wait, does memory grow?

    python -m serve.api --limits.requests-per-minute 0 --limits.concurrent 0 &
    python -m serve.loadtest --pid $! --users 64 --seconds 300
    python -m serve.loadtest --pid $! --users 1 16 --seconds 60

Each user asks, reads the whole stream, and asks again. Prints a table and, with --out, writes JSON; exits with status 1
on any error, or if memory has grown by more than it may.
"""

import asyncio
import json
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
    url: str = "http://127.0.0.1:8000/v1"
    """Where the server listens."""
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
    errors: list[str] = field(default_factory=list)


async def ask(client: httpx.AsyncClient, config: Config, model: str, rng: random.Random, tally: Tally) -> None:
    """Ask once, and read the stream to its end."""
    message = {"role": "user", "content": rng.choice(PROMPTS)}
    common = {"model": model, "max_tokens": config.max_tokens, "seed": rng.getrandbits(31), "stream": True}
    body = common | {"messages": [message], "temperature": 0.8, "stream_options": {"include_usage": True}}
    began, first, ended = time.monotonic(), None, False
    finish: str | None = None
    try:
        async with client.stream("POST", "/chat/completions", json=body) as response:
            if response.status_code != 200:
                tally.errors.append(f"status {response.status_code}: {(await response.aread()).decode()[:200]}")
                return
            async for line in response.aiter_lines():
                ended = ended or line == "data: [DONE]"
                if not line.startswith("data: {"):
                    continue
                chunk = json.loads(line.removeprefix("data: "))
                if "error" in chunk:
                    tally.errors.append(chunk["error"]["message"])
                    return
                for choice in chunk["choices"]:
                    if first is None and (choice["delta"].get("content") or choice["delta"].get("parts")):
                        first = time.monotonic() - began
                    finish = choice["finish_reason"] or finish
                tally.tokens += (chunk["usage"] or {}).get("completion_tokens", 0)
    except httpx.HTTPError as error:
        tally.errors.append(f"{type(error).__name__}: {error}")
        return
    if not ended or finish not in ("stop", "length", "content_filter"):
        tally.errors.append(f"a stream ended early: [DONE] {ended}, finish_reason {finish}")
        return
    tally.answers += 1
    if first is not None:
        tally.first_token_seconds.append(first)


async def run_users(config: Config, client: httpx.AsyncClient, model: str, users: int, seconds: float) -> Tally:
    """Have users ask for so long; answers that are under way then are read to their end."""
    tally, until = Tally(), time.monotonic() + seconds

    async def user(number: int) -> None:
        rng = random.Random(f"{config.seed}/{users}/{number}")
        while time.monotonic() < until:
            errors = len(tally.errors)
            await ask(client, config, model, rng, tally)
            if len(tally.errors) > errors:
                await asyncio.sleep(0.5)  # a server that refuses shall not be asked in a tight loop

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
    limits = httpx.Limits(max_connections=None)
    headers = {"Authorization": f"Bearer {config.api_key}"}
    async with httpx.AsyncClient(base_url=config.url, headers=headers, limits=limits, timeout=600) as client:
        try:
            models = (await client.get("/models")).raise_for_status().json()["data"]
        except httpx.HTTPError as error:
            raise UserError(f"{config.url} does not answer: {error}; start it with python -m serve.api") from error
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
                    "errors": tally.errors,
                }
            )
    after = resident_bytes(config.pid)
    return {"model": model, "rounds": rounds, "resident_bytes_before": before, "resident_bytes_after": after}


def main(config: Config) -> dict[str, Any]:
    """Measure, print and judge."""
    result = asyncio.run(measure(config))
    print(f"{'users':>6}{'seconds':>9}{'answers':>9}{'tokens/s':>10}{'first token p50':>17}{'p95':>9}{'errors':>8}")
    for one in result["rounds"]:
        p50, p95 = (one[f"first_token_seconds_p{p}"] for p in (50, 95))
        waits = f"{p50:15.3f} s{p95:7.3f} s" if p50 is not None else f"{'none':>17}{'none':>9}"
        figures = f"{one['users']:6}{one['seconds']:9.1f}{one['answers']:9,}{one['tokens_per_second']:10.1f}"
        print(f"{figures}{waits}{len(one['errors']):8}")
    failures = [error for one in result["rounds"] for error in one["errors"]]
    before, after = result["resident_bytes_before"], result["resident_bytes_after"]
    if before:
        growth = after / before - 1
        print(f"memory of the server: {before / 1e6:,.1f} MB, then {after / 1e6:,.1f} MB ({growth:+.1%})")
        if growth > config.max_growth:
            failures.append(f"memory grew by {growth:.1%}, more than {config.max_growth:.1%}")
    if not all(one["answers"] for one in result["rounds"]):
        failures.append("there was a number of users without any answer")
    if config.out:
        write_json(config.out, result)
    for error in dict.fromkeys(failures):
        print(f"error ({failures.count(error)} times): {error}", file=sys.stderr)
    if failures:
        sys.exit(1)
    return result


if __name__ == "__main__":
    cli.run(main, Config)
