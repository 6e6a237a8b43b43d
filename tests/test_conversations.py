"""Sources of conversations: every one valid or named, held-out ones apart, and mixtures in one fixed order."""

import json
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nanochat_jax.chat import check_conversation, conversation
from nanochat_jax.data.conversations import join_turns, open_conversations, open_mixture
from nanochat_jax.data.rows import Lazy, Row, _plain, concatenate, is_held_out, open_rows
from nanochat_jax.errors import UserError


def write_chats(path: Path, count: int) -> None:
    path.write_text("".join(json.dumps(conversation(f"question {i}", f"answer {i}")) + "\n" for i in range(count)))


def texts(conversations) -> list[str]:
    return [json.dumps(c) for c in conversations]


@pytest.mark.parametrize(("name", "count"), [("chitchat", 3972), ("chatterbot", 2208)])
def test_embedded_sources(name, count):
    train, val = open_conversations(name), open_conversations(name, "val")
    assert len(train) + len(val) == count and 0.02 < len(val) / count < 0.09
    for one in [*train, *val]:
        check_conversation(one, name)
    first = [{c["messages"][0]["content"] for c in part} for part in (train, val)]
    assert not first[0] & first[1]


def test_chatterbot_reads_odd_dialogues():
    everything = [*open_conversations("chatterbot"), *open_conversations("chatterbot", "val")]
    turns = [[message["content"] for message in c["messages"]] for c in everything]
    assert any(question.endswith('"two little ducks"?') and answer == "22" for question, answer, *_ in turns)
    arrogant = [t for t in turns if t[0] == "You are arrogant"]
    assert len(arrogant) == 4 and all(len(t) == 2 for t in arrogant)  # alternatives, not turns


def test_chitchat_keeps_who_says_what():
    long = max(open_conversations("chitchat"), key=lambda c: len(c["messages"]))
    assert [m["role"] for m in long["messages"][:2]] == ["user", "assistant"] and len(long["messages"]) % 2 == 0


def test_jsonl_names_file_line_and_field(tmp_path):
    write_chats(tmp_path / "a.jsonl", 40)
    spec = f"jsonl:{tmp_path}/*.jsonl"
    everything = [*open_conversations(spec), *open_conversations(spec, "val")]
    assert sorted(texts(everything)) == sorted(texts(conversation(f"question {i}", f"answer {i}") for i in range(40)))
    bad = {
        "not json": "line 2: not JSON",
        "[1]": "line 2: an object was expected, not list",
        '{"chat": []}': "line 2: field 'messages' is missing",
        '{"messages": [], "tools": 1}': "line 2: unknown field 'tools'",
        '{"messages": [{"role": "user", "content": "a"}]}': "line 2: message 0: the last role is 'user'",
        '{"messages": [{"role": "user", "content": 1}]}': "line 2: message 0: content is int",
        '{"messages": [{"role": "user", "content": "\\ud800"}, {"role": "assistant", "content": "b"}]}': "surrogate",
    }
    for line, message in bad.items():
        (tmp_path / "a.jsonl").write_text("\n" + line + "\n")
        with pytest.raises(UserError, match=rf"a\.jsonl, .*{message}"):
            [*open_conversations(spec), *open_conversations(spec, "val")]
    (tmp_path / "a.jsonl").write_bytes(b'{"messages": "\xff"}\n')
    with pytest.raises(UserError, match="line 1: not JSON in UTF-8"):
        [*open_conversations(spec), *open_conversations(spec, "val")]


def test_parquet_rows_may_have_other_columns(tmp_path):
    rows = [
        {"messages": conversation(f"q{i}", "a", system="s" * (i % 2))["messages"], "source": "x"} for i in range(30)
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet", row_group_size=7)
    spec = f"parquet:{tmp_path}/a.parquet"
    assert len([*open_conversations(spec), *open_conversations(spec, "val")]) == 30
    (tmp_path / "a.parquet").write_bytes((tmp_path / "a.parquet").read_bytes()[:-20])
    with pytest.raises(UserError, match=r"a\.parquet: not a readable Parquet"):
        open_conversations(spec)


def test_tfds_values_become_plain():
    import numpy as np
    import tensorflow_datasets as tfds

    label = tfds.features.ClassLabel(names=["A", "B"])
    features = tfds.features.FeaturesDict(
        {
            "question": tfds.features.Text(),
            "n": tfds.features.Scalar(np.int64),
            "choices": tfds.features.Sequence({"text": tfds.features.Text(), "label": label}),
        }
    )
    value = {
        "question": "é".encode(),
        "n": np.int64(3),
        "choices": {"text": np.array([b"x", b"y"], object), "label": np.array([0, 1])},
    }
    assert _plain(value, features) == {"question": "é", "n": 3, "choices": {"text": ["x", "y"], "label": ["A", "B"]}}


def test_mixture_counts_weights_and_order(tmp_path):
    write_chats(tmp_path / "a.jsonl", 200)
    a = len(open_conversations(f"jsonl:{tmp_path}/a.jsonl"))
    mix = f"jsonl:{tmp_path}/*.jsonl*2, task:arithmetic#50, task:spelling#10*1.5"
    mixture = open_mixture(mix, seed=1)
    assert len(mixture) == 2 * a + 50 + 15
    assert texts(mixture) == texts(open_mixture(mix, seed=1)) != texts(open_mixture(mix, seed=2))
    counts = Counter(texts(mixture))
    assert {counts[text] for text in texts(open_conversations(f"jsonl:{tmp_path}/a.jsonl"))} == {2}
    assert {counts[text] for text in texts(open_conversations("task:arithmetic")[:50])} == {1}
    assert {counts[text] for text in texts(open_conversations("task:spelling")[:10])} == {1, 2}


def test_mixture_of_held_out_shares_nothing_with_training():
    mix = "task:identity,task:arithmetic#300,chatterbot"
    assert not set(texts(open_mixture(mix, "val"))) & set(texts(open_mixture(mix)))


@pytest.mark.parametrize(
    ("mix", "message"),
    [
        ("books", "unknown source of conversations 'books'; kinds are task, chitchat"),
        ("task:chess", "unknown task 'chess'"),
        ("", "'' in a mixture is not"),
        ("chatterbot,,chitchat", "'' in a mixture is not"),
        ("task:spelling*0", "has no conversations for train"),
        ("task:humaneval", "humaneval has no examples in split 'train'"),
        ("chatterbot:english", "without 'english'"),
        ("chitchat:x", "without 'x'"),
        ("jsonl:{tmp}/nothing.jsonl", "no file matches"),
        ("hub:no-glob", "must say where the text lies"),
        ("tfds:{tmp}/none#train", "neither a prepared folder"),
    ],
)
def test_mixtures_that_name_nothing(tmp_path, mix, message):
    with pytest.raises(UserError, match=message):
        open_mixture(mix.format(tmp=tmp_path))
    with pytest.raises(UserError, match="unknown split 'test'"):
        open_conversations("chitchat", "test")


def test_lazy_sequences():
    squares = Lazy(10, lambda i: i * i)
    assert squares[3] == squares[-7] == 9 and list(squares[2:8:3]) == [4, 25] and list(squares[::-1][:2]) == [81, 64]
    joined = concatenate([[0], [], squares[:2], [7]])
    assert list(joined) == [0, 0, 1, 7] and joined[-1] == 7
    with pytest.raises(IndexError):
        squares[10]


def test_rows_name_missing_fields():
    row = Row("file, line 1", {"a": 1, "b": True})
    assert row.field("a", int) == 1
    for name, message in (("c", "field 'c' is missing; found a, b"), ("b", "field 'b' is bool, not int")):
        with pytest.raises(UserError, match=f"file, line 1: {message}"):
            row.field(name, int)
    with pytest.raises(UserError, match="unknown rows 'csv:x'"):
        open_rows("csv:x")


@pytest.mark.parametrize("suffix", ["gz", "xz", "zst"])
def test_rows_that_cannot_be_decompressed(tmp_path, suffix):
    (tmp_path / f"a.jsonl.{suffix}").write_bytes(b"not compressed")
    with pytest.raises(UserError, match=rf"cannot read .*a\.jsonl\.{suffix}"):
        open_rows(f"jsonl:{tmp_path}/a.jsonl.{suffix}")


def test_held_out_share():
    assert 850 < sum(is_held_out(str(i), 0.1) for i in range(10_000)) < 1150


def test_questions_of_one_turn_are_joined_and_nothing_is_lost():
    single = [conversation(f"question {n}", f"answer {n}") for n in range(200)]
    long, system = conversation("a", "b", "c", "d"), conversation("a", "b", system="be kind")
    mixed = [*single[:100], long, *single[100:], system]
    joined = list(join_turns(mixed, 3, seed=0))
    assert long in joined and system in joined
    turns = [len(chat["messages"]) // 2 for chat in joined if chat not in (long, system)]
    assert set(turns) == {1, 2, 3} and sum(turns) == 200
    asked = [m["content"] for chat in joined if chat not in (long, system) for m in chat["messages"][::2]]
    assert asked == [f"question {n}" for n in range(200)]
    assert joined == list(join_turns(mixed, 3, seed=0)) != list(join_turns(mixed, 3, seed=1))
    assert list(join_turns(single, 1, seed=0)) == single
    for chat in joined:
        check_conversation(chat)
