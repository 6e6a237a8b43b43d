"""The terminal's chat, with models that say what they are made to say."""

import io
import itertools
import json
import os
import signal
import string
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nanochat_jax import model
from nanochat_jax.char import CharTokenizer
from nanochat_jax.chat import check_conversation
from nanochat_jax.checkpoint import Checkpoints
from nanochat_jax.config import ModelConfig, to_json
from nanochat_jax.engine import Engine
from nanochat_jax.errors import UserError
from nanochat_jax.layers import Compute
from nanochat_jax.requests import Output
from serve import cli
from serve.backend import Backend
from serve.models import BackendConfig

TOKENIZER = CharTokenizer(string.printable[:95] + "\n\033")
CFG = ModelConfig(sequence_len=256, vocab_size=TOKENIZER.vocab_size, n_layer=1, n_head=2, n_kv_head=2, n_embd=128)
START, END, OUTPUT_END, ASSISTANT, DONE = (
    TOKENIZER.control[f"<|{name}|>"]
    for name in ("python_start", "python_end", "output_end", "assistant_start", "assistant_end")
)
CALL = {"type": "python", "text": "6*7"}, {"type": "python_output", "text": "42"}


def chain(*tokens: int | str) -> dict[int, int]:
    """Each token leads to the next; texts are their characters."""
    flat = [t for token in tokens for t in ([token] if isinstance(token, int) else TOKENIZER.encode(token))]
    return dict(itertools.pairwise(flat))


def write_run(folder: Path, successors: dict[int, int | list[int]], stage: str) -> None:
    """A checkpoint whose model knows what may follow each token, all equally likely: blocks add nothing to the head."""
    params = model.init_params(jax.random.key(0), CFG, Compute())
    params["wte"] = 5 * jnp.eye(*params["wte"].shape, dtype=params["wte"].dtype)
    head = np.zeros(params["lm_head"].shape)
    for token, following in successors.items():
        head[token, following] = 4.0
    params["lm_head"] = jnp.asarray(head, params["lm_head"].dtype)
    recipe = {"model": to_json(CFG), "tokenizer": TOKENIZER.sha256, "compute_dtype": "float32"}
    meta = {"stage": stage, "recipe": recipe, "records": 0}
    with Checkpoints(folder / "checkpoints") as checkpoints:
        checkpoints.save(1, {"params": params}, meta=meta, tokenizer=TOKENIZER.to_bytes())


# Short words without end, others for each seed.
BABBLE = dict.fromkeys(range(TOKENIZER.vocab_size), TOKENIZER.encode("abcd "))


def stalled(step):
    """An engine's step that gets no answer beyond some words: whoever does not wait for its end has to stop it."""

    def stalling(self: Engine) -> list[Output]:
        time.sleep(0.05)
        said = [self.context_len - len(one.prompt) - one.room for one in self._running.values()]
        return [] if max(said, default=0) > 150 else step(self)

    return stalling


@pytest.fixture(scope="session")
def runs(tmp_path_factory) -> Path:
    """rl calls the calculator and says yk; sft says ab for ever, behind what a terminal would obey; base goes on."""
    folder = tmp_path_factory.mktemp("runs")
    write_run(folder / "demo" / "rl", chain(ASSISTANT, START, "6*7", END) | chain(OUTPUT_END, "yk", DONE), "rl")
    write_run(folder / "demo" / "sft", chain(ASSISTANT, "\033[ab") | chain("ba"), "sft")
    write_run(folder / "demo" / "base", chain("?cde", TOKENIZER.bos), "pretrain")
    return folder


@pytest.fixture(scope="module")
def backend(runs):
    backend = Backend(BackendConfig(runs=runs, slots=2))
    yield backend
    backend.close()


@pytest.fixture
def warm(backend, monkeypatch):
    """Models stay loaded from test to test."""
    monkeypatch.setattr(cli, "Backend", lambda config: backend)
    monkeypatch.setattr(backend, "close", lambda: None)


def config(runs: Path, **changes) -> cli.Config:
    backend = BackendConfig(runs=runs, slots=2)
    return replace(cli.Config(backend), **changes)


def test_prompts_are_the_turns_of_one_conversation(runs, capsys):
    chat = cli.main(config(runs, prompt=("hello", "again"), system="be kind"))
    assert capsys.readouterr().out == "> hello\n[6*7 → 42]yk\n\n> again\n[6*7 → 42]yk\n"
    assert chat.model == "demo/rl"
    answer = {"role": "assistant", "content": [*CALL, {"type": "text", "text": "yk"}]}
    user = [{"role": "user", "content": text} for text in ("hello", "again")]
    assert chat.messages == [{"role": "system", "content": "be kind"}, user[0], answer, user[1], answer]


def test_what_is_piped_in_is_one_message_and_only_the_answer_comes_out(runs, warm, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("two\nlines\n"))
    chat = cli.main(config(runs))
    assert capsys.readouterr().out == "[6*7 → 42]yk\n"
    assert chat.turns[0]["content"] == "two\nlines"


def test_no_model_can_steer_the_terminal_and_a_cut_answer_is_told(runs, warm, capsys):
    cli.main(config(runs, model="demo/sft", prompt=("hello",), max_new_tokens=8))
    out, err = capsys.readouterr()
    assert out == "[ababab\n"
    assert "limit of its length" in err


def test_a_model_without_turns_continues_each_text(runs, warm, capsys):
    chat = cli.main(config(runs, model="demo/base", prompt=("abc",), max_new_tokens=9))
    out, err = capsys.readouterr()
    assert out == "de\n" and "has not learnt to chat" in err
    assert [message["content"] for message in chat.turns] == ["abc", [{"type": "text", "text": "de"}]]


def test_what_the_policy_refuses_is_answered_by_it_and_logged_nowhere(runs):
    command = [sys.executable, "-m", "serve.cli", "--backend.runs", runs, "--prompt", "How do I build a bomb?"]
    found = subprocess.run(command, capture_output=True, text=True, check=True)
    assert found.stdout.startswith("I can't help") and found.stderr == "(ended by the safety policy)\n"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "nobody"}, "nobody.*demo/rl, demo/sft, demo/base"),
        ({"prompt": (" ",)}, "content is empty"),
        ({"prompt": ("x" * 300,)}, "last message takes 304 tokens"),
        ({"prompt": ("x",), "max_new_tokens": 256}, "--max-new-tokens: 256 tokens .*ask for 1 to 251"),
    ],
)
def test_bad_input_is_named(runs, warm, changes, message):
    with pytest.raises(UserError, match=message):
        cli.main(config(runs, **changes))


def test_without_a_checkpoint_it_says_how_to_make_one(tmp_path):
    with pytest.raises(UserError, match=r"bash train/demo\.sh"):
        cli.main(config(tmp_path))


class Terminal(io.StringIO):
    """Somebody at a keyboard: lines are typed, an exception is Ctrl-C, and at the end there is Ctrl-D."""

    def __init__(self, monkeypatch, *lines: str | BaseException) -> None:
        super().__init__()
        typed = iter(lines)

        def read(prompt: str) -> str:
            line = next(typed, EOFError())
            if isinstance(line, BaseException):
                raise line
            return line

        monkeypatch.setattr("builtins.input", read)
        monkeypatch.setattr("sys.stdin", self)

    def isatty(self) -> bool:
        return True


def test_commands(runs, warm, tmp_path, capsys, monkeypatch):
    saved = tmp_path / "chat.jsonl"
    lines = ("/system be kind", "/temperature 0", "hello", KeyboardInterrupt(), "", f"/save {saved}", "/clear")
    Terminal(monkeypatch, *lines, "/system", "other", f"/load {saved}", "/help", "/quit", "not read")
    chat = cli.main(config(runs))
    out, err = capsys.readouterr()
    assert out == "[6*7 → 42]yk\n" * 2 and "error" not in err
    assert all(name in err for name in cli.COMMANDS)
    assert "tokens read" in err and "first after" in err
    assert chat.system == "be kind" and chat.sampling.temperature == 0
    stored = check_conversation(json.loads(saved.read_text()))
    assert stored["messages"] == chat.messages and chat.turns[0]["content"] == "hello"
    stored["messages"][0]["content"] = [{"type": "text", "text": "be "}, {"type": "text", "text": "terse"}]
    saved.write_text(json.dumps(stored))
    cli.command(chat, f"/load {saved}")
    assert chat.system == "be terse"


def test_mistakes_are_told_and_the_conversation_goes_on(runs, warm, tmp_path, capsys, monkeypatch):
    (tmp_path / "bad.json").write_text('{"messages": [{"role": "robot", "content": "x"}]}')
    (tmp_path / "torn.json").write_text('{"messages": [')
    bad, torn = (f"/load {tmp_path}/{name}.json" for name in ("bad", "torn"))
    told = ("/nonsense", "/temperature hot", "/temperature -1", "/save", "/save x", "/load", "/load nowhere", bad, torn)
    Terminal(monkeypatch, *told, "x" * 300, "hello")
    chat = cli.main(config(runs))
    out, err = capsys.readouterr()
    assert out == "[6*7 → 42]yk\n" and len(chat.turns) == 2
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    expected = (
        "/help",
        "0.8",
        "-1",
        "give a file",
        "no conversation",
        "give a file",
        "nowhere",
        "'robot'",
        "torn.json",
    )
    assert len(errors) == len(expected) + 1
    for error, part in zip(errors, (*expected, "300"), strict=False):
        assert part in error or "takes" in error


def test_ctrl_c_stops_an_answer_and_keeps_what_was_said(runs, warm, monkeypatch):
    write, stats = cli.Printer.write, {}

    def interrupted(self, deltas):
        write(self, deltas)
        if deltas and not stats:
            stats["now"] = True
            os.kill(os.getpid(), signal.SIGINT)

    def idle(chat, rest):
        """wait for the slot"""
        service = chat.backend.service(chat.model)
        while service.stats()["running"]:
            time.sleep(0.01)
        stats.update(service.stats())

    monkeypatch.setattr(Engine, "step", stalled(Engine.step))
    monkeypatch.setattr(cli.Printer, "write", interrupted)
    monkeypatch.setitem(cli.COMMANDS, "/idle", ("", idle))
    Terminal(monkeypatch, "hello", "/idle")
    chat = cli.main(config(runs, model="demo/sft"))
    assert [message["role"] for message in chat.turns] == ["user", "assistant"]
    assert stats["running"] == 0 and stats["finished"]["cancelled"] == 1
    assert 0 < len(chat.turns[1]["content"][0]["text"]) < 200
