"""What fits into the context, and the thread that answers: the engine's answers, whatever else goes on."""

import asyncio
import dataclasses
import operator
import threading
import time
from functools import reduce

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_engine import (
    CHAT_CFG,
    COMPUTE,
    DONE,
    END,
    GREEDY,
    OUTPUT_END,
    START,
    TOKENIZER,
    chain,
    ids,
    random_params,
    scripted_params,
)

from nanochat_jax.chat import conversation, render_prompt
from nanochat_jax.dialogue import Busy, NoRoom, Service, fit
from nanochat_jax.engine import Engine, EngineConfig, Request
from nanochat_jax.errors import UserError
from nanochat_jax.sampling import Sampling
from nanochat_jax.streaming import Event, parts

TURNS = st.lists(st.text("abc", min_size=1, max_size=12), min_size=1, max_size=9).filter(lambda turns: len(turns) % 2)


@given(TURNS, st.sampled_from(["", "xyz", "x" * 20]), st.integers(2, 100), st.integers(1, 60))
def test_the_oldest_turns_are_dropped_and_no_more_than_needed(turns, system, context_len, reserve):
    chat = conversation(*turns, system=system)
    kept = [render_prompt(conversation(*turns[2 * n :], system=system), TOKENIZER) for n in range(len(turns) // 2 + 1)]
    fitting = [n for n, tokens in enumerate(kept) if len(tokens) + reserve <= context_len]
    if fitting and reserve < context_len:
        assert fit(chat, TOKENIZER, context_len, reserve) == (kept[fitting[0]], fitting[0])
    else:
        with pytest.raises(UserError, match=str(context_len)):
            fit(chat, TOKENIZER, context_len, reserve)


def test_how_long_an_answer_may_be_is_told():
    for reserve in (0, 128, 4096):
        with pytest.raises(NoRoom, match=rf"{reserve} tokens .* context of 128; ask for 1 to 123"):
            fit(conversation("aa", "b", "c"), TOKENIZER, 128, reserve)
    assert fit(conversation("aa", "b", "c"), TOKENIZER, 128, 123).dropped == 1
    with pytest.raises(UserError, match=r"takes 5 tokens.* room for 4: shorten it, or ask for at most 123$"):
        fit(conversation("c"), TOKENIZER, 128, 124)


def test_a_message_that_is_too_long_is_refused_with_its_length():
    with pytest.raises(
        UserError, match=r"last message takes 504 tokens.*context of 128 tokens, 28 .*room for 100: shorten it$"
    ):
        fit(conversation("a", "b", "c" * 500), TOKENIZER, 128, 28)
    with pytest.raises(UserError, match="assistant"):
        fit(conversation("a", "b"), TOKENIZER, 128, 28)


def make_engine(params, **options) -> Engine:
    config = EngineConfig(slots=8, prefill_chunk=64, steps_per_dispatch=4, reuse_tokens=64 * 8)
    return Engine(params, CHAT_CFG, config, tokenizer=TOKENIZER, compute=COMPUTE, **options)


@pytest.fixture(scope="module")
def params():
    return random_params(CHAT_CFG)


@pytest.fixture
def service(params):
    with Service(make_engine(params), TOKENIZER, max_waiting=40) as service:
        yield service


def whole(events) -> Event:
    return reduce(operator.add, events)


def text(event: Event) -> str:
    return "".join(part["text"] for part in parts(event.deltas))


def some_requests(count: int) -> list[Request]:
    return [Request([TOKENIZER.bos, *ids("abc" * (i % 4)), 12], 10 + i, Sampling(seed=i)) for i in range(count)]


def test_answers_are_the_engines_however_many_are_asked_at_once_and_read_how(service, params):
    requests = some_requests(40)
    closing = [token for name, token in TOKENIZER.control.items() if "python" not in name and "output" not in name]
    alone = make_engine(params).run([dataclasses.replace(request, stop_tokens=closing) for request in requests])
    handles = [service.submit(request) for request in requests[:20]]
    answers = [whole(handle) for handle in handles]

    async def ask_all() -> list[Event]:
        async def ask(request: Request) -> Event:
            return whole([event async for event in service.submit(request)])

        return await asyncio.gather(*map(ask, requests[20:]))

    answers += asyncio.run(ask_all())
    for answer, output, request in zip(answers, alone, requests, strict=True):
        assert (answer.output.tokens, answer.output.logprobs) == (output.tokens, output.logprobs)
        assert answer.finish_reason == output.finish_reason
        assert text(answer) == TOKENIZER.decode(output.tokens)
        assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(request.prompt), len(output.tokens))
        assert 0 < answer.usage.first_token_seconds <= answer.usage.seconds
    stats = service.stats()
    assert stats["completion_tokens"] == sum(len(output.tokens) for output in alone)
    assert sum(stats["finished"].values()) == 40 and stats["running"] == stats["waiting"] == 0
    assert stats["tokens_per_second"] > 0 < stats["first_token_seconds"]


def test_stop_strings_end_an_answer_before_them():
    letters = "abcdefghijklmnopqrstuvwxyz"
    recite = scripted_params(chain(TOKENIZER.bos, *ids(letters * 2)))
    with Service(make_engine(recite), TOKENIZER) as service:
        others = [service.submit(Request(ids(letter), 40, GREEDY)) for letter in "kxz"]
        handles = [service.submit(Request([TOKENIZER.bos], 60, GREEDY), stops=stops) for stops in (("nn", "ij"), ())]
        stopped, free = map(whole, handles)
        assert text(free) == (letters * 3)[:60] and free.finish_reason == "length"
        assert text(stopped) == "abcdefgh" and stopped.finish_reason == "stop"
        assert stopped.output.tokens == free.output.tokens[:10] and len(stopped.output.logprobs) == 10
        assert stopped.usage.completion_tokens == 10
        assert [text(whole(other))[:3] for other in others] == ["lmn", "yza", "abc"]


SCRIPT = chain(TOKENIZER.bos, START, *ids("6*7"), END) | chain(OUTPUT_END, *ids("yk"), DONE)
CALL = Request([TOKENIZER.bos], 60, GREEDY, use_tools=True)


def test_calls_and_their_outputs_are_parts_of_their_own():
    with Service(make_engine(scripted_params(SCRIPT), tools=lambda asked: "42"), TOKENIZER) as service:
        answer = whole(service.submit(CALL))
    assert parts(answer.deltas) == [
        {"type": "python", "text": "6*7"},
        {"type": "python_output", "text": "42"},
        {"type": "text", "text": "yk"},
    ]
    assert answer.finish_reason == "stop"


def test_an_exception_ends_what_runs_and_not_the_service():
    def tools(asked: str) -> str:
        raise ValueError("broken tool")

    with Service(make_engine(scripted_params(SCRIPT), tools=tools), TOKENIZER) as service:
        for _ in range(2):
            answer = whole(service.submit(CALL))
            assert (answer.finish_reason, answer.error) == ("error", "ValueError: broken tool")
        answer = whole(service.submit(Request([OUTPUT_END], 9, GREEDY)))
        assert (text(answer), answer.finish_reason, answer.error) == ("yk", "stop", "")
        assert service.stats()["finished"] == {"error": 2, "stop": 1}


def test_an_engine_beyond_repair_leaves_nobody_waiting(params, monkeypatch):
    engine = make_engine(params)

    def broken() -> None:
        raise RuntimeError("no memory left")

    monkeypatch.setattr(engine, "step", broken)
    monkeypatch.setattr(engine, "reset", broken)
    monkeypatch.setattr(threading, "excepthook", lambda args: None)
    service = Service(engine, TOKENIZER)
    assert whole(service.submit(Request([1], 5))).error == "RuntimeError: no memory left"
    service.close()
    with pytest.raises(UserError, match="closed"):
        service.submit(Request([1], 5))


LOOP = chain(TOKENIZER.bos, *ids("ab")) | chain(*ids("ba"))
ENDLESS = Request([TOKENIZER.bos], 120, GREEDY)


def stepping(engine: Engine) -> threading.Semaphore:
    """Whose permits the engine's steps take."""
    permits, step = threading.Semaphore(0), engine.step

    def permitted():
        permits.acquire(timeout=300)
        return step()

    engine.step = permitted
    return permits


def test_a_cancelled_request_says_so():
    engine = make_engine(scripted_params(LOOP))
    permits = stepping(engine)
    with Service(engine, TOKENIZER) as service:
        handle = service.submit(ENDLESS)
        events = iter(handle)
        permits.release()
        first = next(events)
        waiting = [service.submit(ENDLESS) for _ in range(20)]
        for one in (handle, *waiting):
            one.cancel()
        permits.release(1000)
        rest = whole([first, *events])
        assert rest.finish_reason == "cancelled" and 4 <= len(rest.output.tokens) <= 8
        assert {whole(handle).finish_reason for handle in waiting} == {"cancelled"}
        assert whole(service.submit(ENDLESS)).finish_reason == "length"


def test_a_request_beyond_its_deadline_ends(service):
    answer = whole(service.submit(Request([TOKENIZER.bos], 100), deadline_seconds=0))
    assert answer.finish_reason == "deadline"
    assert whole(service.submit(Request([TOKENIZER.bos], 3))).finish_reason in ("length", "stop")


def test_a_full_service_says_so_and_slow_readers_hold_nobody_up():
    engine = make_engine(scripted_params(LOOP))
    permits = stepping(engine)
    with Service(engine, TOKENIZER, max_waiting=4) as service:
        handles = [service.submit(ENDLESS) for _ in range(12)]
        with pytest.raises(Busy, match="12 requests"):
            service.submit(ENDLESS)
        assert service.stats()["rejected"] == 1
        permits.release(1000)
        assert whole(handles.pop()).finish_reason == "length"  # though the others are not read meanwhile
        assert {whole(handle).finish_reason for handle in handles} == {"length"}


def test_impossible_requests_are_refused_at_once(service):
    for request, stops, message in [
        (Request([], 5), (), "empty"),
        (Request([1] * 128, 5), (), "128"),
        (Request([1], 5), ("",), "stop"),
    ]:
        with pytest.raises(UserError, match=message):
            service.submit(request, stops=stops)


def test_closing_cancels_what_is_left():
    engine = make_engine(scripted_params(LOOP))
    permits = stepping(engine)
    service = Service(engine, TOKENIZER)
    handles = [service.submit(ENDLESS) for _ in range(20)]
    closing = threading.Thread(target=service.close)
    closing.start()
    while not service._closed:
        time.sleep(0.01)
    permits.release(1000)  # a step that was begun is ended, and no other begun
    closing.join()
    assert {whole(handle).finish_reason for handle in handles} == {"cancelled"}
    with pytest.raises(UserError, match="closed"):
        service.submit(ENDLESS)
