"""Models found, loaded and let go; answers that keep to the policy."""

import asyncio
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
from test_cli_chat import BABBLE, write_run

from nanochat_jax.chat import conversation, render_prompt
from nanochat_jax.checkpoint import Checkpoints
from nanochat_jax.dialogue import Busy, NoRoom, Service
from nanochat_jax.errors import UserError
from nanochat_jax.load import load_model, open_model
from nanochat_jax.requests import Output, Request
from nanochat_jax.sampling import Sampling
from nanochat_jax.streaming import Delta, Event, Handle
from serve import models
from serve.backend import Backend, ChatEvent
from serve.models import BackendConfig
from serve.shown import Shown
from serve.talk import answer

POLICY = """
[[category]]
name = "weapons"
action = "refuse"
say = "No."
both = ["nuclear bomb"]

[[category]]
name = "names"
action = "mask"
say = "***"
assistant = ["jane doe"]

[[category]]
name = "medicine"
action = "warn"
say = "Ask a doctor."
user = ["headache"]
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    write_run(folder / "demo" / "base", BABBLE, "pretrain")
    write_run(folder / "other", BABBLE, "pretrain")
    (folder / "broken" / "checkpoints" / "5").mkdir(parents=True)
    (folder / "empty" / "checkpoints").mkdir(parents=True)
    return folder


@pytest.fixture(scope="module")
def backend(runs, tmp_path_factory):
    policy = tmp_path_factory.mktemp("policy") / "policy.toml"
    policy.write_text(POLICY)
    config = BackendConfig(runs=runs, slots=2, max_waiting=2, max_loaded=1, context_len=96, policy=policy)
    backend = Backend(config)
    yield backend
    backend.close()


@contextmanager
def held(service: Service) -> Iterator[None]:
    """Let no request get on meanwhile."""
    engine, go_on = service._engine, threading.Event()
    step = engine.step
    with patch.object(engine, "step", lambda: go_on.wait(300) and step()):
        try:
            yield
        finally:
            go_on.set()


def pending(service: Service) -> list[Handle]:
    return [*service._active.values(), *service._inbox]


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 100
    while not condition():
        assert time.monotonic() < deadline, "it never came true"
        time.sleep(0.01)


def ask(backend: Backend, text: str | dict, **options) -> list[ChatEvent]:
    async def read() -> list[ChatEvent]:
        chat = text if isinstance(text, dict) else conversation(text)
        return [event async for event in backend.chat(chat, **options)]

    return asyncio.run(read())


def said(events: list[ChatEvent]) -> str:
    return "".join(delta.text for event in events for delta in event.deltas if delta.type == "text")


def test_good_checkpoints_are_found_and_others_passed_over(backend, runs, caplog):
    with caplog.at_level(logging.WARNING):
        assert sorted(model.name for model in backend.models()) == ["demo/base", "other"]
    assert "broken" in caplog.text and "empty" not in caplog.text
    (model, *_) = [model for model in backend.models() if model.name == "demo/base"]
    assert (model.folder, model.stage, model.step, model.is_chat) == (runs / "demo/base", "pretrain", 1, False)
    with pytest.raises(UserError, match=r"unknown model 'demo/rl'; there are .*demo/base"):
        backend.service("demo/rl")
    with pytest.raises(UserError, match=r"bash train/demo\.sh"):
        Backend(BackendConfig(runs=runs / "empty")).models()
    assert Backend(BackendConfig(checkpoint=runs / "other")).find().name == f"{runs.name}/other"
    with pytest.raises(UserError, match="no good checkpoint"):
        Backend(BackendConfig(checkpoint=runs / "broken")).models()


def test_later_stages_come_first(runs, tmp_path):
    stored = open_model(runs / "other")
    stages = {"a/base": "pretrain", "b/dpo": "dpo", "c/sft": "sft", "d/rl": "rl", "e/rl": "rl", "converted": "convert"}
    for name, stage in stages.items():
        with Checkpoints(tmp_path / name / "checkpoints") as checkpoints:
            meta = stored.checkpoint.meta | {"stage": stage}
            checkpoints.save(1, {"params": {"x": np.zeros(2)}}, meta=meta, tokenizer=stored.tokenizer.to_bytes())
    os.utime(tmp_path / "d/rl/checkpoints/1", (0, 0))
    models = Backend(BackendConfig(runs=tmp_path)).models()
    assert [model.name for model in models] == ["e/rl", "d/rl", "b/dpo", "c/sft", "converted", "a/base"]
    assert [model.is_chat for model in models] == [True] * 5 + [False]


def test_the_model_used_longest_ago_goes_unless_it_is_busy(backend):
    first = backend.service("other")
    assert backend.service("other") is first and asyncio.run(backend.ready("other")).service is first
    with held(first):
        handle = first.submit(Request([1], 50))
        with pytest.raises(Busy, match="1 models are loaded and busy"):
            backend.service("demo/base")
    handle.cancel()
    assert list(handle)[-1].finish_reason == "cancelled"
    second = backend.service("demo/base")
    assert list(backend.stats()) == ["demo/base"]
    with pytest.raises(UserError, match="closed"):
        first.submit(Request([1], 5))
    assert second.stats()["running"] == 0


def test_a_service_that_had_to_go_just_now_is_loaded_again(backend, monkeypatch):
    gone, ready = asyncio.run(backend.ready("other")), Backend.ready
    backend.service("demo/base")
    answers = iter([gone])

    async def late(self, name=""):
        return next(answers, None) or await ready(self, name)

    monkeypatch.setattr(Backend, "ready", late)
    assert ask(backend, "hello", model="other", max_new_tokens=4)[-1].usage.completion_tokens > 0


def test_many_who_wait_for_a_model_delay_nobody_and_it_is_loaded_once(runs, monkeypatch):
    backend, begun, go_on = Backend(BackendConfig(runs=runs, slots=2)), list[Path](), threading.Event()
    backend.service("other")

    def load(folder: Path):
        begun.append(folder)
        go_on.wait(300)
        if len(begun) == 1:
            raise UserError("out of luck")
        return load_model(folder)

    async def first_event(model: str) -> ChatEvent:
        stream = backend.chat(conversation("hello"), model=model, max_new_tokens=1)
        try:
            return await anext(stream)
        finally:
            await stream.aclose()

    async def ask_all() -> list:
        waiting = [asyncio.create_task(first_event("demo/base")) for _ in range(60)]
        await asyncio.to_thread(until, lambda: begun)
        try:
            async with asyncio.timeout(100):
                await first_event("other")
        finally:
            waiting[0].cancel()
            await asyncio.wait(waiting[:1])
            go_on.set()
        return await asyncio.gather(*waiting[1:], return_exceptions=True)

    monkeypatch.setattr(models, "load_model", load)
    assert {str(found) for found in asyncio.run(ask_all())} == {"out of luck"}
    assert asyncio.run(ask_all()) == [ChatEvent()] * 59 and len(begun) == 2
    backend.close()


def test_the_event_loop_is_never_left_to_a_disk(runs, monkeypatch):
    backend, find = Backend(BackendConfig(runs=runs, slots=2)), Backend.find
    threads = list[threading.Thread]()

    def noted(self, name=""):
        threads.append(threading.current_thread())
        return find(self, name)

    async def read() -> None:
        async for _ in answer(backend, conversation("hello"), sampling=Sampling(), max_new_tokens=1):
            pass

    monkeypatch.setattr(Backend, "find", noted)
    asyncio.run(read())
    assert threads and threading.current_thread() not in threads
    backend.close()


def test_who_looks_first_at_the_same_time_sees_all_models(runs, monkeypatch):
    backend, opened, fail = Backend(BackendConfig(runs=runs)), list[Path](), [OSError("the disk is away")]

    def slow(folder: Path):
        opened.append(folder)
        time.sleep(0.1)
        if fail and folder.name == "other":
            raise fail.pop()
        return open_model(folder)

    monkeypatch.setattr(models, "open_model", slow)
    assert len(backend.models()) == 1  # and what could not be read just now is looked at again
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(lambda _: len(backend.models()), range(4)))
    assert found == [2] * 4 and len(opened) == 4  # of which one is broken and one was tried twice


def test_an_answer_is_the_services(backend):
    service, how = backend.service("other"), Sampling(seed=3)
    events = ask(backend, "who are you", model="other", sampling=how, max_new_tokens=20)
    prompt = render_prompt(conversation("who are you"), service.tokenizer)
    expected = list(service.submit(Request(prompt, 20, how, use_tools=True)))
    output = sum((event.output for event in events), Output(0))
    assert output.tokens == sum((event.output for event in expected), Output(0)).tokens
    assert said(events) == "".join(d.text for event in expected for d in event.deltas if d.type == "text")
    assert events[-1].finish_reason == expected[-1].finish_reason and events[0].deltas == ()
    assert events[-1].usage[:2] == expected[-1].usage[:2]
    again = ask(backend, "who are you", model="other", sampling=how, max_new_tokens=20)
    assert said(again) == said(events)


def test_the_oldest_turns_are_dropped_and_it_is_told(backend):
    turns = ["hello there"] * 21
    events = ask(backend, conversation(*turns), max_new_tokens=40)
    assert 0 < events[0].dropped <= 10 and events[-1].usage.prompt_tokens <= 96 - 40
    with pytest.raises(UserError, match="last message"):
        ask(backend, "hello " * 200)


def test_a_refused_question_reaches_no_engine(backend, caplog):
    finished = backend.service().stats()["finished"]
    (event,) = ask(backend, conversation("hi", "hello", "how to make a NUCLEAR   bomb?"))
    assert (event.finish_reason, event.refusal, event.usage.completion_tokens) == ("content_filter", "No.", 0)
    assert said([event]) == "No." and backend.service().stats()["finished"] == finished
    assert "nuclear" not in caplog.text.lower() and "weapons" in caplog.text
    assert (
        ask(backend, conversation("nuclear bomb", "No.", "hello"), max_new_tokens=4)[-1].finish_reason
        != "content_filter"
    )


def test_the_system_message_is_checked_too(backend):
    for system in ("how to make a nuclear bomb?", [{"type": "text", "text": "nuclear bomb"}]):
        messages = [{"role": "system", "content": system}, {"role": "user", "content": "answer"}]
        assert ask(backend, {"messages": messages})[-1].finish_reason == "content_filter"
    chat = conversation("bomb", system="nuclear")  # a phrase ends with its message
    assert ask(backend, chat, max_new_tokens=4)[-1].finish_reason != "content_filter"


def test_a_warning_follows_the_answer(backend):
    assert said(ask(backend, "I have a headache", max_new_tokens=8)).endswith("\n\nAsk a doctor.")


def events_of(pieces: list[str | Delta]) -> list[Event]:
    """One token for each piece."""
    deltas = [Delta(0, "text", piece) if isinstance(piece, str) else piece for piece in pieces]
    events = [Event((d,), Output(7, (i,), (True,), (0.0,))) for i, d in enumerate(deltas)]
    return [*events[:-1], replace(events[-1], finish_reason="stop")]


def shown(backend: Backend, pieces: list[str | Delta]) -> tuple[str, tuple[int, ...], str]:
    stream = Shown(backend.policy, None)
    taken = [stream.take(event) for event in events_of(pieces)]
    tokens = sum((output for _, output in taken), Output(7)).tokens
    return "".join(d.text if d.type == "text" else f"[{d.text}]" for ds, _ in taken for d in ds), tokens, stream.refusal


def test_tokens_are_told_no_sooner_than_their_text_and_never_of_what_is_hidden(backend):
    assert shown(backend, ["a nuclear", " power", " plant"]) == ("a nuclear power plant", (0, 1, 2), "")
    assert shown(backend, ["well ", "so ", "and ", "a nuc", "lear", " bomb", " it is"]) == (
        "well so and a \n\nNo.",
        (0, 1, 2),
        "No.",
    )
    text, tokens, refusal = shown(backend, ["I am ", "old ", "and ", "ja", "ne", " doe", ", yes"])
    assert (text, refusal) == ("I am old and ***, yes", "") and set(tokens) <= {0, 1, 2}
    stream = Shown(backend.policy, None)
    told, seen = 0, ""
    for event in events_of(["one ", "two ", "nuclear ", "nuclear ", "power"]):
        deltas, output = stream.take(event)
        told, seen = told + len(output.tokens), seen + "".join(d.text for d in deltas)
        assert len("".join(["one ", "two ", "nuclear ", "nuclear ", "power"][:told])) <= len(seen)
    assert told == 5


def test_tool_calls_keep_their_place(backend):
    call, result = Delta(1, "python", "2+2"), Delta(3, "python_output", "4")
    assert shown(backend, ["Let me see nuclear", call, result, Delta(4, "text", "It is 4.")]) == (
        "Let me see nuclear[2+2][4]It is 4.",
        (0, 1, 2, 3),
        "",
    )


def test_leaving_early_cancels(backend, monkeypatch):
    service, begun, left = backend.service(), threading.Event(), threading.Event()
    submit = service.submit

    def submit_late(*args, **options) -> Handle:
        begun.set()
        left.wait(300)
        return submit(*args, **options)

    async def leave() -> None:
        stream = backend.chat(conversation("hello"))
        assert (await anext(stream)).dropped == 0
        await stream.aclose()

    async def leave_before_the_first() -> None:
        task = asyncio.create_task(anext(backend.chat(conversation("hello"))))
        await asyncio.to_thread(begun.wait, 300)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    def cancelled() -> int:
        return service.stats()["finished"].get("cancelled", 0)

    before = cancelled()
    with held(service):
        asyncio.run(leave())
    until(lambda: cancelled() == before + 1)
    with held(service):
        monkeypatch.setattr(service, "submit", submit_late)
        asyncio.run(leave_before_the_first())
        left.set()
        until(lambda: cancelled() == before + 2 or [handle.cancelled for handle in pending(service)] == [True])
    until(lambda: cancelled() == before + 2)
    until(lambda: service.stats()["running"] == service.stats()["waiting"] == 0)


def test_more_than_the_queue_holds_is_busy(backend):
    async def ask_many() -> list:
        return await asyncio.gather(*(anext(stream) for stream in streams), return_exceptions=True)

    with held(backend.service()):
        streams = [backend.chat(conversation("hello")) for _ in range(7)]
        first = asyncio.run(ask_many())
    assert [type(one) for one in first].count(Busy) == 3
    until(lambda: not pending(backend.service()))


def test_texts_are_continued_where_there_is_room(backend):
    async def read(text: str, **options) -> list[ChatEvent]:
        return [event async for event in backend.complete(text, **options)]

    events = asyncio.run(read("the", sampling=Sampling(temperature=0), max_new_tokens=3))
    assert 0 < events[-1].usage.completion_tokens <= 3
    with pytest.raises(NoRoom, match=r"90 tokens .* context of 96 with a prompt of 23; ask for 1 to 73"):
        asyncio.run(read("the cat sat on the mat", max_new_tokens=90))
    with pytest.raises(UserError, match="prompt: 101 tokens fill a context of 96"):
        asyncio.run(read("x" * 100))
    assert asyncio.run(read("a nuclear bomb"))[-1].finish_reason == "content_filter"


def test_without_safety_everything_passes(runs):
    backend = Backend(BackendConfig(runs=runs, safety=False))
    assert shown(backend, ["a nuclear", " bomb"]) == ("a nuclear bomb", (0, 1), "")
    assert backend.policy.check("how do I build a bomb") is None


@pytest.mark.parametrize("field", ["slots", "max_loaded", "deadline_seconds"])
def test_bad_numbers_are_refused(field):
    with pytest.raises(UserError, match=field.replace("_", "-")):
        BackendConfig(**{field: 0})
