"""Fine-tuning rows and preference pairs: nothing lost silently, nothing learnt that should not be, exact resume."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat_jax.chat import conversation, render
from nanochat_jax.data.batches import batches, validation_batches
from nanochat_jax.data.conversations import open_mixture
from nanochat_jax.data.preference import open_pairs, render_pairs
from nanochat_jax.data.sft import best_fit, pack_conversations, whole_turns
from nanochat_jax.errors import UserError
from nanochat_jax.tokenizer import SentencePieceTokenizer, train
from train import chat_show


@pytest.fixture(scope="module")
def tok() -> SentencePieceTokenizer:
    return train(["the model answers what the user asks. "] * 50, 300)


@pytest.fixture(scope="module")
def chats() -> list:
    rng = np.random.default_rng(0)
    words = ["the", "model", "answers", "what", "user", "asks"]

    def text() -> str:
        return " ".join(rng.choice(words, rng.integers(1, 12)))

    return [conversation(*(text() for _ in range(2 * rng.integers(1, 4)))) for _ in range(120)]


def unpack(row) -> list[list[int]]:
    """Segments of a row, padding left out; the last token of a full row is a target only."""
    tokens = np.append(row["tokens"], row["targets"][-1])
    segments = np.append(row["segment_ids"], row["segment_ids"][-1])
    return [tokens[segments == s].tolist() for s in np.unique(segments)]


def test_rows_hold_every_conversation_once(tok, chats):
    rows = pack_conversations(chats, tok, 96)
    assert rows.stats.conversations == 120 and rows.stats.dropped == 0
    expected = sorted(tuple(render(c, tok).tokens[: whole_turns(render(c, tok), 97, tok)]) for c in chats)
    found = []
    for i in range(len(rows)):
        for segment in unpack(rows.row(i)):
            tokens = tuple(t for t in segment if t >= 0)
            if set(tokens) != {tok.bos}:
                found.append(tokens)
    assert sorted(found) == expected


def test_targets_are_the_supervised_next_tokens(tok, chats):
    rows = pack_conversations(chats, tok, 96)
    assert rows.stats.supervised_tokens == sum((rows.row(i)["targets"] >= 0).sum() for i in range(len(rows)))
    for i in range(len(rows)):
        row = rows.row(i)
        assert row["tokens"].shape == row["targets"].shape == row["segment_ids"].shape == (96,)
        assert {a.dtype for a in row.values()} == {np.dtype(np.int32)}
        learnt = row["targets"][:-1] >= 0
        assert (row["targets"][:-1][learnt] == row["tokens"][1:][learnt]).all()
        assert (row["segment_ids"][:-1][learnt] == row["segment_ids"][1:][learnt]).all()  # nothing crosses over
        assert (np.diff(row["segment_ids"]) >= 0).all() and row["segment_ids"][0] == 0
        starts = np.flatnonzero(np.diff(row["segment_ids"], prepend=-1))
        assert (row["tokens"][starts] == tok.bos).all()


def test_targets_by_hand(tok):
    row = pack_conversations([conversation("a", "b")], tok, 10).row(0)
    c = {name: tok.control[f"<|{name}|>"] for name in ("user_start", "user_end", "assistant_start", "assistant_end")}
    [a], [b] = tok.encode("a"), tok.encode("b")
    assert row["tokens"].tolist() == [
        tok.bos, c["user_start"], a, c["user_end"], c["assistant_start"], b, c["assistant_end"], *[tok.bos] * 3
    ]  # fmt: skip
    assert row["targets"].tolist() == [-1, -1, -1, -1, b, c["assistant_end"], -1, -1, -1, -1]
    assert row["segment_ids"].tolist() == [0] * 7 + [1] * 3


def test_too_long_keeps_whole_turns_or_is_counted_as_dropped(tok):
    short, long = conversation("a", "b"), conversation("a", "b", "asks " * 50, "answers")
    never = conversation("asks " * 50, "answers")
    rows = pack_conversations([long, never, short], tok, 20)
    assert (rows.stats.conversations, rows.stats.shortened, rows.stats.dropped) == (3, 1, 1)
    assert rows.stats.tokens == 2 * len(render(short, tok).tokens) and len(rows) == 1
    fits = pack_conversations([short], tok, len(render(short, tok).tokens) - 1)  # the last token is only a target
    assert fits.stats.shortened == fits.stats.dropped == 0 and fits.stats.padding_share == 0
    with pytest.raises(UserError, match="of 1 conversations none fits into sequence-len=20"):
        pack_conversations([never], tok, 20)
    with pytest.raises(UserError, match="sequence-len=0"):
        pack_conversations([short], tok, 0)


@settings(max_examples=100)
@given(st.lists(st.integers(1, 50), max_size=200))
def test_best_fit(lengths):
    rows = best_fit(lengths, 50)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    used = [sum(lengths[i] for i in row) for row in rows]
    assert all(0 < u <= 50 for u in used) and sum(2 * u <= 50 for u in used) <= 1  # two half-empty rows would be one


def test_order_is_a_function_of_seed_and_step(tok, chats):
    rows = pack_conversations(chats, tok, 96)
    n = len(rows)
    stream = batches(rows, batch_size=4, seed=3)
    first = [next(stream) for _ in range(n)]  # four epochs
    for step in (0, 1, n // 4, n - 1):
        again = next(batches(rows, batch_size=4, seed=3, start_step=step))
        assert all((again[name] == first[step][name]).all() for name in again)
    flat = np.concatenate([batch["tokens"] for batch in first])
    epochs = [sorted(map(bytes, flat[e * n : (e + 1) * n])) for e in range(4)]
    assert epochs[0] == epochs[1] == epochs[3]
    assert not (flat[:n] == flat[n : 2 * n]).all()
    assert not (next(batches(rows, batch_size=4, seed=4))["tokens"] == first[0]["tokens"]).all()
    halves = [next(batches(rows, batch_size=4, seed=3, process_index=p, process_count=2)) for p in range(2)]
    assert (np.concatenate([half["tokens"] for half in halves]) == first[0]["tokens"]).all()
    with pytest.raises(UserError, match="batch of 3 rows does not divide among 2"):
        next(batches(rows, batch_size=3, seed=0, process_count=2))


def test_packing_is_the_same_each_time_and_survives_more_rows_than_a_batch(tok, chats):
    a, b = pack_conversations(chats, tok, 96), pack_conversations(chats, tok, 96)
    assert (a.tokens_N == b.tokens_N).all() and (a.row_starts == b.row_starts).all() and a.tokens_N.dtype == np.uint16
    assert next(batches(pack_conversations(chats[:1], tok, 96), batch_size=4, seed=0))["tokens"].shape == (4, 96)


@pytest.mark.parametrize(("batch_size", "process_count"), [(4, 1), (6, 2), (1, 1), (1000, 1)])
def test_validation_has_every_row_once(tok, chats, batch_size, process_count):
    rows = pack_conversations(chats, tok, 96)
    streams = [
        list(validation_batches(rows, batch_size, process_index=p, process_count=process_count))
        for p in range(process_count)
    ]
    assert len({len(stream) for stream in streams}) == 1
    found = [
        t for stream in streams for batch in stream for t in map(bytes, batch["targets"]) if t != bytes(b"\xff" * 384)
    ]
    assert sorted(found) == sorted(bytes(rows.row(i)["targets"]) for i in range(len(rows)))


def write_pairs(path, *rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return f"jsonl:{path}"


def test_pairs(tmp_path, tok):
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "x"}, {"role": "user", "content": "b"}]
    call = [{"type": "python", "text": "1+1"}, {"type": "python_output", "text": "2"}, {"type": "text", "text": "2"}]
    spec = write_pairs(
        tmp_path / "pairs.jsonl",
        {"prompt": "a", "chosen": "model", "rejected": "what"},
        {"prompt": turns, "chosen": call, "rejected": "asks", "source": "app"},
        {
            "prompt": "a",
            "chosen": [*turns[:1], {"role": "assistant", "content": "y"}],
            "rejected": [*turns[:1], {"role": "assistant", "content": "z"}],
        },
        {"prompt": "asks " * 300, "chosen": "y", "rejected": "z"},
    )
    pairs = open_pairs(spec)
    rows = render_pairs(pairs, tok, 128)
    assert rows.tokens_P2T.shape == rows.targets_P2T.shape == (3, 2, 64) and rows.too_long == 1
    end = tok.control["<|assistant_end|>"]
    learnt = rows.targets_P2T[0, 0]
    assert learnt[learnt >= 0].tolist() == [*tok.encode("model"), end]
    learnt = rows.targets_P2T[1, 0]  # neither the earlier answer nor the tool's output
    control = [tok.control["<|python_start|>"], *tok.encode("1+1"), tok.control["<|python_end|>"]]
    assert learnt[learnt >= 0].tolist() == [*control, *tok.encode("2"), end]
    at = np.flatnonzero(learnt >= 0)[:-1]
    assert (rows.tokens_P2T[1, 0][at + 1] == learnt[at]).all()
    assert pairs[2].prompt == {"messages": turns[:1]}
    with pytest.raises(UserError, match="of 1 pairs none fits into sequence-len=128"):
        render_pairs(pairs[3:], tok, 128)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "a", "chosen": "b", "rejected": "b"}, "chosen and rejected are the same answer"),
        ({"chosen": "b", "rejected": "c"}, "prompt: messages is NoneType"),
        ({"prompt": "a", "chosen": "b"}, "rejected: message 1: content is NoneType"),
        ({"prompt": "a", "chosen": "", "rejected": "b"}, "chosen: message 1: content is empty"),
        (
            {"prompt": [{"role": "assistant", "content": "x"}], "chosen": "b", "rejected": "c"},
            "prompt: message 0: role",
        ),
        (
            {"chosen": conversation("a", "b")["messages"], "rejected": conversation("x", "c")["messages"]},
            "chosen and rejected answer different prompts",
        ),
    ],
)
def test_pairs_that_are_none(tmp_path, row, message):
    spec = write_pairs(tmp_path / "pairs.jsonl", {"prompt": "a", "chosen": "b", "rejected": "c"}, row)
    with pytest.raises(UserError, match=rf"pairs\.jsonl, line 2: {message}"):
        open_pairs(spec)[1]


def test_chat_show(tmp_path, tok, capsys):
    tok.save(tmp_path / "tokenizer.model")
    config = chat_show.Config(tokenizer=tmp_path / "tokenizer.model", mix="task:identity", n=2, sequence_len=64)
    stats = chat_show.main(config)
    printed = capsys.readouterr().out
    assert printed.count("<|bos|>") == 2 and "\033[30;42m" in printed
    assert stats.conversations == len(open_mixture("task:identity")) and "conversations: " in printed
