"""Chat in a terminal.

    python -m serve.cli
    python -m serve.cli --backend.checkpoint runs/demo/rl --prompt "Who are you?" "What is 12 times 7?"
    echo "Spell the word garden." | python -m serve.cli

Without --prompt, what is piped in is one message, and a terminal gets a conversation: Ctrl-C stops an answer, Ctrl-D
ends, /help lists commands. Answers go to stdout, everything else to stderr; nothing is kept unless /save asks for it.
"""

import asyncio
import json
import logging
import os
import signal
import sys
from collections.abc import Callable
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from pathlib import Path

from nanochat_jax.chat import Message, check_conversation
from nanochat_jax.dialogue import NoRoom
from nanochat_jax.errors import UserError
from nanochat_jax.files import read_json, write_bytes
from nanochat_jax.sampling import Sampling
from nanochat_jax.streaming import Delta, parts
from serve.backend import Backend, ChatEvent
from serve.models import BackendConfig
from serve.talk import answer, said, told
from train import cli


@dataclass(frozen=True)
class Config:
    backend: BackendConfig = field(default_factory=BackendConfig)
    model: str = ""
    """Name of the model, as in demo/rl; default: the newest of the last stage."""
    prompt: tuple[str, ...] = ()
    """Messages to send one after the other; then the conversation ends."""
    system: str = ""
    """How the model is to behave."""
    max_new_tokens: int | None = None
    """Tokens of an answer at most; default: as many as fit."""
    sampling: Sampling = field(default_factory=lambda: Sampling(temperature=0.8, top_k=50))


@dataclass
class Chat:
    """A conversation that goes on."""

    backend: Backend
    model: str
    system: str
    sampling: Sampling
    max_new_tokens: int | None
    turns: list[Message] = field(default_factory=list)  # without the system's

    @property
    def messages(self) -> list[Message]:
        system: list[Message] = [{"role": "system", "content": self.system}] if self.system else []
        return system + self.turns


def faint(text: str) -> str:
    """Text that is not the model's own, where the terminal can show the difference."""
    return f"\033[2m{text}\033[0m" if sys.stdout.isatty() and "NO_COLOR" not in os.environ else text


def note(text: str) -> None:
    print(faint(text), file=sys.stderr, flush=True)


class Printer:
    """Writes an answer as it comes; a tool call as [12*7 → 84]. No text can steer the terminal."""

    def __init__(self) -> None:
        self._type = "text"

    def write(self, deltas: tuple[Delta, ...]) -> None:
        for delta in deltas:
            self._turn(delta.type)
            text = "".join(c for c in delta.text if c.isprintable() or c in "\n\t")
            print(text if delta.type == "text" else faint(text), end="", flush=True)

    def close(self) -> None:
        self._turn("text")
        print(flush=True)

    def _turn(self, kind: str) -> None:
        marks = {("text", "python"): "[", ("python", "python_output"): " → ", ("python_output", "python"): "] ["}
        if kind != self._type:
            print(faint(marks.get((self._type, kind), "]")), end="", flush=True)
            self._type = kind


async def _stream(chat: Chat, events: list[ChatEvent]) -> None:
    printer = Printer()
    try:
        async with aclosing(
            answer(
                chat.backend,
                {"messages": chat.messages},
                model=chat.model,
                sampling=chat.sampling,
                max_new_tokens=chat.max_new_tokens,
            )
        ) as stream:
            async for event in stream:
                events.append(event)
                printer.write(event.deltas)
    finally:
        if events:
            printer.close()


def say(chat: Chat, text: str) -> ChatEvent:
    """Send a message, print the answer as it comes, and keep both; what there is of it if Ctrl-C stops it.

    Raises:
        UserError: there is no answer, and the message is not kept.
    """
    chat.turns.append({"role": "user", "content": text})
    events: list[ChatEvent] = []
    try:
        asyncio.run(_stream(chat, events))
    except NoRoom as error:
        raise UserError(f"--max-new-tokens: {error}") from error
    finally:
        if content := parts(delta for event in events for delta in event.deltas):
            chat.turns.append({"role": "assistant", "content": content})
        else:
            chat.turns.pop()
    if events[-1].error:
        raise UserError(f"the model failed: {events[-1].error}")
    return events[-1]


def _help(chat: Chat, rest: str) -> None:
    """what there is"""
    for name, (argument, command) in COMMANDS.items():
        note(f"  {name + ' ' + argument:18} {command.__doc__}")


def _clear(chat: Chat, rest: str) -> None:
    """begin a new conversation"""
    chat.turns.clear()


def _system(chat: Chat, rest: str) -> None:
    """tell the model how to behave; without a text, no more"""
    chat.system = rest


def _temperature(chat: Chat, rest: str) -> None:
    """how freely words are chosen; 0 takes the likeliest"""
    try:
        chat.sampling = replace(chat.sampling, temperature=float(rest))
    except ValueError as error:
        raise UserError(f"/temperature {rest}: give a number, such as 0.8") from error


def _save(chat: Chat, rest: str) -> None:
    """write the conversation to a file, as a line that train.sft reads"""
    if not rest or not chat.turns:
        raise UserError("/save: there is no conversation yet" if rest else "/save: give a file")
    write_bytes(Path(rest).expanduser(), (json.dumps({"messages": chat.messages}, ensure_ascii=False) + "\n").encode())
    note(f"saved to {rest}")


def _load(chat: Chat, rest: str) -> None:
    """go on with a conversation from a file"""
    if not rest:
        raise UserError("/load: give a file")
    messages = check_conversation(read_json(Path(rest).expanduser()), rest)["messages"]
    first = messages[0]
    chat.system = said(first) if first["role"] == "system" else ""
    chat.turns = messages[1:] if first["role"] == "system" else messages
    note(f"{len(chat.turns)} messages loaded from {rest}")


def _quit(chat: Chat, rest: str) -> None:
    """end"""
    raise EOFError


COMMANDS: dict[str, tuple[str, Callable[[Chat, str], None]]] = {
    "/help": ("", _help),
    "/clear": ("", _clear),
    "/system": ("TEXT", _system),
    "/temperature": ("NUMBER", _temperature),
    "/save": ("FILE", _save),
    "/load": ("FILE", _load),
    "/quit": ("", _quit),
}


def command(chat: Chat, line: str) -> None:
    """Run a line that begins with a slash; UserError if there is no such command."""
    name, _, rest = line.partition(" ")
    if name not in COMMANDS:
        raise UserError(f"{name} is no command; /help lists them")
    COMMANDS[name][1](chat, rest.strip())


def converse(chat: Chat) -> None:
    """Read lines from the terminal and answer them, until Ctrl-D or /quit."""
    import readline  # noqa: F401, lines can be edited and called back; they are not written to disk

    note(f"{chat.model}: Ctrl-C stops an answer, Ctrl-D ends, /help lists commands")
    while True:
        try:
            line = input("\n> ").strip()
            if line.startswith("/"):
                command(chat, line)
            elif line:
                last = say(chat, line)
                note(told(last.usage, last.finish_reason))
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
        except KeyboardInterrupt:
            note("")
        except EOFError:
            return


def main(config: Config) -> Chat:
    """Hold a conversation; it is returned."""
    backend = Backend(config.backend)
    try:
        info = backend.find(config.model)
        backend.service(info.name)
        chat = Chat(backend, info.name, config.system, config.sampling, config.max_new_tokens)
        if not info.is_chat:
            note(f"{info.name} has not learnt to chat: it continues each text on its own")
        if not config.prompt and sys.stdin.isatty():
            converse(chat)
        for number, prompt in enumerate(config.prompt or ([] if sys.stdin.isatty() else [sys.stdin.read()])):
            if len(config.prompt) > 1:
                print("\n" * (number > 0) + faint(f"> {prompt}"))
            last = say(chat, prompt.strip())
            if unusual := told(None, last.finish_reason):
                note(f"({unusual})")
        return chat
    finally:
        backend.close()


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # whoever reads may leave early, as head does
    logging.getLogger("nanochat_jax.safety").setLevel(logging.ERROR)  # what it finds is for a server's operator
    cli.run(main, Config)
