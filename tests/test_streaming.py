"""Text as it comes: the same however it is cut into tokens, in whole characters, and without stop strings."""

import asyncio
import functools
import itertools
import operator
import threading
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanochat_jax.chat import PART_DELIMITERS, parse
from nanochat_jax.engine import Output, Request
from nanochat_jax.errors import UserError
from nanochat_jax.streaming import Event, Handle, TextStream, check_stops, closing_tokens, parts
from nanochat_jax.tokenizer import CONTROL_TOKENS, Tokenizer

CONTROL = {name: token for token, name in enumerate(CONTROL_TOKENS)}


class BytesTokenizer(Tokenizer):
    """Tokens of any given bytes, after the control tokens."""

    kind = "bytes"

    def __init__(self, pieces: list[bytes]) -> None:
        self.control = CONTROL
        self.pieces = (b"",) * len(CONTROL_TOKENS) + tuple(pieces)

    def encode(self, text: str) -> list[int]:
        raise NotImplementedError

    def to_bytes(self) -> bytes:
        raise NotImplementedError


def streamed(pieces: list[bytes], stops: tuple[str, ...] = ()) -> str:
    """What comes out for text in these pieces, checking on the way that nothing comes after the end."""
    tokenizer = BytesTokenizer(pieces)
    stream, said = TextStream(tokenizer, stops), ""
    for token in range(len(CONTROL), len(tokenizer.pieces)):
        ended = stream.ended
        new = stream.push(token)
        assert not (ended and new)
        said += "".join(delta.text for delta in new)
    return said + "".join(delta.text for delta in stream.finish())


def cut(data: bytes, borders: list[int]) -> list[bytes]:
    edges = sorted({0, len(data), *(border % (len(data) + 1) for border in borders)})
    return [data[first:last] for first, last in itertools.pairwise(edges)]


def until_stop(text: str, stops: tuple[str, ...]) -> str:
    """The definition, letter by letter: the text before the first stop string that is complete."""
    for end in range(1, len(text) + 1):
        if ending := [stop for stop in stops if text[:end].endswith(stop)]:
            return text[: end - max(map(len, ending))]
    return text


BORDERS = st.lists(st.integers(0, 200), max_size=30)
STOPS = st.lists(st.text("abé", min_size=1, max_size=4), max_size=4).map(tuple)


@given(st.text("abé😀", max_size=40), STOPS, BORDERS)
def test_text_ends_before_the_first_complete_stop_string_however_it_is_cut(text, stops, borders):
    assert streamed(cut(text.encode(), borders), stops) == until_stop(text, stops)


@given(st.binary(max_size=40), BORDERS)
def test_bytes_that_form_no_character_are_left_out_however_they_are_cut(data, borders):
    said = streamed(cut(data, borders))
    assert said == data.decode(errors="ignore")
    assert "\ufffd".encode() in data or "\ufffd" not in said


@given(st.lists(st.text(max_size=5).map(str.encode) | st.binary(max_size=3), max_size=20))
def test_what_has_come_out_is_always_the_beginning_of_what_will(pieces):
    stream, so_far, whole = TextStream(BytesTokenizer(pieces)), "", streamed(pieces)
    for number in range(len(pieces)):
        so_far += "".join(delta.text for delta in stream.push(len(CONTROL) + number))
        assert whole.startswith(so_far)


def test_a_replacement_character_that_was_written_comes_out():
    assert streamed(["a\ufffdb".encode()]) == "a\ufffdb"


def test_text_comes_as_soon_as_it_is_certain():
    tokenizer = BytesTokenizer([b"one ST", b"O", b"x", "é".encode()[:1], "é".encode()[1:], b"STOP, and more"])
    stream, first = TextStream(tokenizer, ("STOP",)), len(CONTROL)
    came = ["".join(delta.text for delta in stream.push(token)) for token in range(first, first + 6)]
    assert came == ["one ", "", "STOx", "", "é", ""]
    assert stream.ended and stream.finish() == [] and stream.push(first) == []


PIECE_TOKENS = st.lists(
    st.integers(len(CONTROL), len(CONTROL) + 3)
    | st.sampled_from([CONTROL[end] for ends in PART_DELIMITERS.values() for end in ends]),
    max_size=20,
)


@given(PIECE_TOKENS, st.sampled_from([[], [CONTROL["<|assistant_end|>"]], [CONTROL["<|user_start|>"]]]))
def test_parts_are_those_of_the_whole_answer(tokens, end):
    tokenizer = BytesTokenizer([b"a", b"bc", "é".encode(), b" "])
    stream = TextStream(tokenizer)
    tokens = tokens + end + [len(CONTROL)] * len(end)
    deltas = [delta for token in tokens for delta in stream.push(token)] + stream.finish()
    assert parts(deltas) == parse(tokens, tokenizer)
    assert stream.ended == bool(end)


def test_stop_strings_are_for_what_is_said():
    tokenizer = BytesTokenizer([b"7*", b"6", b"stop"])
    call = [CONTROL["<|python_start|>"], *(len(CONTROL) + i for i in (0, 2, 1)), CONTROL["<|python_end|>"]]
    stream = TextStream(tokenizer, ("stop", "7*6"))
    deltas = [delta for token in [*call, len(CONTROL) + 1, len(CONTROL) + 2] for delta in stream.push(token)]
    assert parts(deltas) == [{"type": "python", "text": "7*stop6"}, {"type": "text", "text": "6"}]
    assert stream.ended


def test_an_answer_is_closed_by_what_does_not_belong_inside():
    inside = {end for ends in PART_DELIMITERS.values() for end in ends}
    assert set(closing_tokens(BytesTokenizer([]))) == {CONTROL[name] for name in CONTROL_TOKENS if name not in inside}


@pytest.mark.parametrize(
    ("stops", "message"), [(["a"] * 17, "17"), ([""], "0 char"), (["b", "a" * 101], "string 1"), ("abc", "list")]
)
def test_impossible_stop_strings_are_refused(stops, message):
    with pytest.raises(UserError, match=message):
        check_stops(stops)


def a_handle(count: int = 3) -> tuple[Handle, list[Event]]:
    tokenizer = BytesTokenizer([b"a", b"b"])
    events = [Event((), Output(0, (i,))) for i in range(count)] + [Event((), Output(0), "length")]
    return Handle(Request([1], 5), (), tokenizer, 1.0), events


def test_events_reach_a_reader_in_another_thread_and_one_in_an_event_loop():
    for read in (list, lambda handle: asyncio.run(collect(handle))):
        handle, events = a_handle()
        handle.put(events[0])

        def write(handle=handle, events=events):
            for event in events[1:]:
                time.sleep(0.01)
                handle.put(event)

        writer = threading.Thread(target=write)
        writer.start()
        assert whole(read(handle)) == whole(events)
        writer.join()


def test_a_reader_that_is_behind_gets_several_events_as_one():
    handle, events = a_handle()
    for event in events:
        handle.put(event)
    assert asyncio.run(collect(handle)) == [whole(events)]


def whole(events: list[Event]) -> Event:
    return functools.reduce(operator.add, events)


async def collect(handle: Handle) -> list[Event]:
    return [event async for event in handle]


def test_many_readers_share_an_event_loop():
    handles = [a_handle() for _ in range(100)]

    def write():
        for number in range(4):
            for handle, events in handles:
                handle.put(events[number])

    async def read_all() -> list[list[Event]]:
        writer = threading.Thread(target=write)
        tasks = [asyncio.create_task(collect(handle)) for handle, _ in handles]
        await asyncio.sleep(0)
        writer.start()
        return await asyncio.gather(*tasks)

    assert [whole(events) for events in asyncio.run(read_all())] == [whole(events) for _, events in handles]


def test_a_reader_that_leaves_cancels():
    async def leave(handle: Handle) -> None:
        reading = asyncio.create_task(collect(handle))
        await asyncio.sleep(0.01)
        reading.cancel()
        await asyncio.gather(reading, return_exceptions=True)
        assert handle.cancelled

    handle, events = a_handle()
    handle.put(events[0])
    asyncio.run(leave(handle))
    handle.put(events[1])  # to a loop that is gone
    other, events = a_handle()
    other.put(events[0])
    reader = iter(other)
    assert next(reader) == events[0] and not other.cancelled
    reader.close()
    assert other.cancelled
