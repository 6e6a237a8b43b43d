"""Conversations into tokens and back: the only place that knows where control tokens go and what is learnt.

A conversation is `{"messages": [{"role": "system" | "user" | "assistant", "content": text or parts}]}`; parts are
`{"type": "text" | "python" | "python_output", "text": …}`, of which only the assistant has other kinds than text. An
optional system message comes first, then user and assistant in turn. As tokens it is bos, then each message between
its start and end token; a python call and its output lie between tokens of their own.
"""

from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple, TypedDict, cast

from nanochat_jax.errors import UserError
from nanochat_jax.tokenizer import Tokenizer, check_encodable

ROLES = ("system", "user", "assistant")
PART_DELIMITERS = {
    "text": (),
    "python": ("<|python_start|>", "<|python_end|>"),
    "python_output": ("<|output_start|>", "<|output_end|>"),
}


class Part(TypedDict):
    """A stretch of a message: what is said, what the calculator is asked, or what it answered."""

    type: Literal["text", "python", "python_output"]
    text: str


class Message(TypedDict):
    """One turn."""

    role: Literal["system", "user", "assistant"]
    content: str | list[Part]


class Conversation(TypedDict):
    """What the whole program calls a conversation; see the module's docstring."""

    messages: list[Message]


class Rendered(NamedTuple):
    """A conversation as the model sees it."""

    tokens: list[int]
    supervised: list[bool]  # whether each token is one that the model should learn to write


def conversation(*turns: str | list[Part], system: str = "") -> Conversation:
    """The conversation of these turns, the user's first."""
    messages: list[Message] = [{"role": "system", "content": system}] if system else []
    for number, content in enumerate(turns):
        messages.append({"role": "assistant" if number % 2 else "user", "content": content})
    return {"messages": messages}


def check_conversation(
    value: Any, where: str = "conversation", *, last: Literal["user", "assistant"] = "assistant"
) -> Conversation:
    """Refuse what is no conversation.

    Args:
        value: anything, as JSON or a user may give it.
        where: file and line, or whatever else an error should begin with.
        last: role of the last message: the assistant's in an example to learn from, the user's in a prompt.

    Returns:
        The value itself.

    Raises:
        UserError: that names the message, counted from 0, and the field at fault.
    """
    _check_keys(value, {"messages": list}, where)
    messages = value["messages"]
    if not messages:
        raise UserError(f"{where}: messages is empty: it needs a user and an assistant message")
    has_system = isinstance(messages[0], dict) and messages[0].get("role") == "system"
    for number, message in enumerate(messages):
        _check_message(message, f"{where}: message {number}")
        turn = number - has_system
        expected = "system" if turn < 0 else ("user", "assistant")[turn % 2]
        if message["role"] != expected:
            raise UserError(
                f"{where}: message {number}: role is {message['role']!r} where {expected!r} is due; the order is an "
                "optional system message, then user and assistant in turn"
            )
    if messages[-1]["role"] != last:
        raise UserError(
            f"{where}: message {len(messages) - 1}: the last role is {messages[-1]['role']!r}: "
            f"the {last} message that should follow is missing"
        )
    return cast(Conversation, value)


def _check_keys(value: Any, fields: dict[str, Any], where: str) -> None:
    if not isinstance(value, dict):
        raise UserError(f"{where} is {type(value).__name__}, not an object with {' and '.join(fields)}")
    for name, kind in fields.items():
        if name not in value:
            raise UserError(f"{where}: field {name!r} is missing")
        if not isinstance(value[name], kind):
            expected = {str: "text", list: "a list"}.get(kind, "text or a list of parts")
            raise UserError(f"{where}: {name} is {type(value[name]).__name__}, not {expected}")
    if unknown := sorted(map(str, value.keys() - fields.keys())):
        raise UserError(f"{where}: unknown field {unknown[0]!r}; known are {', '.join(fields)}")


def _check_message(message: Any, where: str) -> None:
    _check_keys(message, {"role": str, "content": (str, list)}, where)
    role, content = message["role"], message["content"]
    if role not in ROLES:
        raise UserError(f"{where}: unknown role {role!r}; known are {', '.join(ROLES)}")
    if not content or (isinstance(content, str) and not content.strip()):
        raise UserError(f"{where}: content is empty")
    if isinstance(content, str):
        _check_text(content, f"{where}: content")
        return
    for number, part in enumerate(content):
        place = f"{where}: part {number}"
        _check_keys(part, {"type": str, "text": str}, place)
        if part["type"] not in PART_DELIMITERS:
            raise UserError(f"{place}: unknown type {part['type']!r}; known are {', '.join(PART_DELIMITERS)}")
        if part["type"] != "text" and role != "assistant":
            raise UserError(
                f"{place}: type {part['type']!r} may stand in an assistant message only, this is a {role}'s"
            )
        if not part["text"]:
            raise UserError(f"{place}: text is empty")
        _check_text(part["text"], f"{place}: text")


def _check_text(text: str, where: str) -> None:
    try:
        check_encodable(text)
    except UserError as error:
        raise UserError(f"{where}: {error}") from error


def content_parts(message: Message) -> list[Part]:
    """A message's content as parts."""
    content = message["content"]
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def render(conversation: Conversation, tokenizer: Tokenizer) -> Rendered:
    """A conversation to learn from: the assistant's text, its python calls and its end token are supervised.

    Text is encoded as text whatever it looks like, so no message can forge a turn. A tokenizer without system tokens,
    as models converted from nanochat have, gets the system message before the first user text, with an empty line
    between, as nanochat does it.

    Raises:
        UserError: if it is no valid conversation, or the tokenizer knows no turns.
    """
    return _render(check_conversation(conversation), tokenizer)


def render_prompt(conversation: Conversation, tokenizer: Tokenizer) -> list[int]:
    """Tokens for the assistant to go on from: a conversation that ends with the user, then assistant_start.

    Raises:
        UserError: if it is no valid conversation, or does not end with the user.
    """
    checked = check_conversation(conversation, last="user")
    return [*_render(checked, tokenizer).tokens, tokenizer.control["<|assistant_start|>"]]


def _render(conversation: Conversation, tokenizer: Tokenizer) -> Rendered:
    messages = conversation["messages"]
    if "<|assistant_start|>" not in tokenizer.control:
        raise UserError("the tokenizer has no tokens for the turns of a conversation: its model only continues text")
    if "<|system_start|>" not in tokenizer.control:
        messages = _merge_system(messages)
    rendered = Rendered([tokenizer.bos], [False])
    for message in messages:
        for ids, supervised in _spans(message, tokenizer):
            rendered.tokens.extend(ids)
            rendered.supervised.extend([supervised] * len(ids))
    return rendered


def _merge_system(messages: list[Message]) -> list[Message]:
    if messages[0]["role"] != "system" or len(messages) == 1:
        return messages
    system, user, *rest = messages
    text = "\n\n".join("".join(part["text"] for part in content_parts(message)) for message in (system, user))
    return [{"role": "user", "content": text}, *rest]


def _spans(message: Message, tokenizer: Tokenizer) -> Iterator[tuple[list[int], bool]]:
    role, control = message["role"], tokenizer.control
    yield [control[f"<|{role}_start|>"]], False
    for part in content_parts(message):
        yield render_part(part, tokenizer), role == "assistant" and part["type"] != "python_output"
    yield [control[f"<|{role}_end|>"]], role == "assistant"


def render_part(part: Part, tokenizer: Tokenizer) -> list[int]:
    """Tokens of one part with its delimiters: of a python_output, what is fed to the model after its call."""
    ids = tokenizer.encode(part["text"])
    if delimiters := PART_DELIMITERS[part["type"]]:
        start, end = delimiters
        return [tokenizer.control[start], *ids, tokenizer.control[end]]
    return ids


def parse(tokens: Sequence[int], tokenizer: Tokenizer) -> list[Part]:
    """What an assistant wrote, as parts; the inverse of rendering an assistant message.

    Args:
        tokens: generated after assistant_start. What follows assistant_end, or any other control token that does not
            belong inside an answer, is left out; a call or an output that was never closed counts as it is.
        tokenizer: of the model.
    """
    names = {token: name for name, token in tokenizer.control.items()}
    kinds = {ends[0]: kind for kind, ends in PART_DELIMITERS.items() if ends}
    ends = {ends[1] for ends in PART_DELIMITERS.values() if ends}
    parts: list[tuple[str, list[int]]] = [("text", [])]
    for token in tokens:
        name = names.get(token)
        if name is None:
            parts[-1][1].append(token)
        elif name in kinds:
            parts.append((kinds[name], []))
        elif name in ends:
            parts.append(("text", []))
        else:
            break
    return [cast(Part, {"type": kind, "text": tokenizer.decode(ids)}) for kind, ids in parts if ids]


def visible_text(parts: Sequence[Part]) -> str:
    """What the assistant said, without its calls and their outputs: what judges read."""
    return "".join(part["text"] for part in parts if part["type"] == "text")


_PLAIN, _SUPERVISED, _CONTROL, _FAINT, _RESET = "\033[37m", "\033[30;42m", "\033[1m", "\033[2m", "\033[0m"


def show(rendered: Rendered, tokenizer: Tokenizer) -> str:
    """Tokens for a terminal, divided by faint bars: supervised ones on green, control tokens bold.

    Bytes that are no whole character and characters that would steer the terminal are shown as escapes.
    """
    names = {token: name for name, token in tokenizer.control.items()}
    shown = []
    for token, supervised in zip(*rendered, strict=True):
        name = names.get(token)
        text = name or tokenizer.pieces[token].decode(errors="backslashreplace")
        text = "".join(c if c.isprintable() else "↵" if c == "\n" else repr(c)[1:-1] for c in text)
        style = (_SUPERVISED if supervised else _PLAIN) + (_CONTROL if name else "")
        line_end = "\n" if name and name.endswith("_end|>") and name[2:-6] in ROLES else ""
        shown.append(f"{style}{text}{_RESET}{line_end or f'{_FAINT}|{_RESET}'}")
    return "".join(shown)
