"""What the page's events do: the conversation comes from the browser with each, and goes back to it."""

import asyncio
import html
import random
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import aclosing, contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

import gradio as gr

from nanochat_jax.chat import Message, check_conversation, conversation, render_prompt
from nanochat_jax.dialogue import NoRoom
from nanochat_jax.errors import UserError
from nanochat_jax.probabilities import NextTokens, next_token_table
from nanochat_jax.sampling import Sampling
from nanochat_jax.streaming import Delta, parts
from serve import view
from serve.backend import Backend, ChatEvent
from serve.feedback import Rating, Ratings, append_pairs, rate
from serve.limits import Clients
from serve.schemas import ApiError
from serve.talk import answer, said, told

MAX_CHARACTERS = 100_000  # of a conversation
LOOK_SECONDS = 1.0  # between two looks at whether a visitor is still there

type Chat = dict[str, Any]  # {"id": text, "messages": …}, the messages without the system's


def new_chat() -> Chat:
    return {"id": uuid4().hex, "messages": []}


def messages_of(chat: Any) -> list[Message]:
    """The messages of a conversation that came from a browser; UserError if it is none, or too long."""
    messages = chat.get("messages") if isinstance(chat, dict) else None
    if messages == []:
        return []
    last: Any = messages[-1].get("role") if isinstance(messages, list) and isinstance(messages[-1], dict) else None
    checked = check_conversation({"messages": messages}, last="user" if last == "user" else "assistant")["messages"]
    if checked[0]["role"] == "system":
        raise UserError("conversation: message 0: the system prompt has a field of its own")
    if sum(len(str(message["content"])) for message in checked) > MAX_CHARACTERS:
        raise UserError(f"the conversation has more than {MAX_CHARACTERS:,} characters; begin a new one")
    return list(checked)


@contextmanager
def telling() -> Iterator[None]:
    """Tell the visitor what can be mended, as text."""
    try:
        yield
    except (UserError, ApiError) as error:
        raise gr.Error(html.escape(str(error)), print_exception=False) from error


async def with_looks(events: AsyncGenerator[ChatEvent]) -> AsyncGenerator[ChatEvent | None]:
    """Events as they come, and None whenever there was none for a while; closing it closes them."""
    coming = asyncio.ensure_future(anext(events, None))
    try:
        while True:
            done, _ = await asyncio.wait([coming], timeout=LOOK_SECONDS)
            if not done:
                yield None
                continue
            if (event := coming.result()) is None:
                return
            yield event
            coming = asyncio.ensure_future(anext(events, None))
    finally:
        coming.cancel()
        await asyncio.gather(coming, return_exceptions=True)
        await events.aclose()


class Handlers:
    """One for a page, whoever looks at it: visitors have nothing in common but the models."""

    def __init__(self, backend: Backend, clients: Clients, feedback: Path | None = None) -> None:
        self.backend, self.clients, self.feedback = backend, clients, feedback

    def refresh(self, model: str | None) -> tuple[Any, Any]:
        """The models there are by now, or how to make one."""
        try:
            models = self.backend.models()
        except UserError as error:
            return gr.Dropdown(choices=[], value=None), gr.Markdown(f"**There is no model yet.** {error}", visible=True)
        names = [info.name for info in models]
        labels = [f"{info.name} · {info.stage} · step {info.step:,}" for info in models]
        value = model if model in names else names[0]
        return gr.Dropdown(choices=list(zip(labels, names, strict=True)), value=value), gr.Markdown(visible=False)

    def say(self, text: str | None, chat: Chat | None) -> tuple[Any, ...]:
        """A message is sent, perhaps the first of the page."""
        chat = chat or new_chat()
        with telling():
            if not text or not text.strip():
                raise UserError("the message is empty")
            messages = messages_of(chat)
            if messages and messages[-1]["role"] == "user":  # stopped before the first word
                messages.pop()
            return self._ask(chat, [*messages, {"role": "user", "content": text}])

    def example(self, chat: Chat | None, event: gr.SelectData) -> tuple[Any, ...]:
        return self.say(str(event.value["text"]), chat)

    def retry(self, chat: Chat) -> tuple[Any, ...]:
        with telling():
            return self._ask(chat, _without_answer(messages_of(chat)))

    def edit(self, chat: Chat, event: gr.EditData) -> tuple[Any, ...]:
        """A message was changed; what followed it is forgotten."""
        with telling():
            messages = messages_of(chat)
            before = messages[: _number(messages, event.index)]
            return self.say(view.unescaped(str(event.value)), {**chat, "messages": before})

    def undo(self, chat: Chat) -> tuple[Any, ...]:
        """The last message goes back into the box."""
        with telling():
            *messages, last = _without_answer(messages_of(chat)) or [{"role": "user", "content": ""}]
            return {**chat, "messages": messages}, view.shown(messages), said(last)

    def _ask(self, chat: Chat, messages: list[Message]) -> tuple[Any, ...]:
        chat = {"id": str(chat["id"]), "messages": messages_of({"messages": messages})}
        busy = gr.Textbox(value="", interactive=False, submit_btn=False, stop_btn=True)
        return chat, view.shown(messages), busy

    async def respond(
        self,
        chat: Chat,
        model: str | None,
        system: str | None,
        temperature: float,
        top_k: int,
        top_p: float,
        min_p: float,
        penalty: float,
        limit: int,
        seed: int | None,
        use_tools: bool,
        request: gr.Request,
    ) -> AsyncIterator[tuple[Any, ...]]:
        """The answer as it grows; if there is none, the message goes back into the box."""
        messages = messages_of(chat)
        yield chat, view.shown(messages), "…", gr.skip()
        deltas: list[Delta] = []
        dropped, failure = 0, ""
        first: list[Message] = [{"role": "system", "content": system}] if system and system.strip() else []
        try:
            seed = random.getrandbits(32) if seed is None or seed < 0 else seed
            events = answer(
                self.backend,
                {"messages": first + messages},
                model=model or "",
                sampling=Sampling(temperature, int(top_k), top_p, min_p, seed, penalty),
                max_new_tokens=int(limit) or None,
                use_tools=use_tools,
            )
            with self.clients.admitted(_address(request)):
                async with aclosing(with_looks(events)) as looked:
                    async for event in looked:
                        if event is None:  # only after something does Gradio see that nobody is there any more
                            yield (gr.skip(),) * 4
                            continue
                        deltas += event.deltas
                        dropped, failure = dropped + event.dropped, event.error
                        if not (event.deltas or event.dropped or event.finish_reason):
                            continue
                        said_now: list[Message] = [{"role": "assistant", "content": parts(deltas)}] if deltas else []
                        grown = messages + said_now
                        notes = told(event.usage, event.finish_reason, dropped) or "…" * (not event.finish_reason)
                        yield {**chat, "messages": grown}, view.shown(grown), notes, gr.skip()
            if failure:
                raise UserError(f"the model failed: {failure}")
        except (UserError, ApiError) as error:
            about = "Longest answer: " if isinstance(error, NoRoom) else ""
            gr.Warning(html.escape(f"{about}{error}"))
            rest = messages[:-1]
            yield {**chat, "messages": rest}, view.shown(rest), "", said(messages[-1])

    def idle(self) -> Any:
        """The box, when nothing is being answered."""
        return gr.Textbox(interactive=True, submit_btn=True, stop_btn=False)

    def new(self, *_: Any) -> tuple[Any, ...]:
        return new_chat(), [], "", self.idle()

    def open(self, _: Any, chat: Chat | None) -> tuple[Any, ...]:
        """A conversation that the browser kept; a message that got no word of an answer can be sent again."""
        with telling():
            if chat is None:
                return (gr.skip(),) * 4
            messages = messages_of(chat)
            unanswered = bool(messages) and messages[-1]["role"] == "user"
            return chat, view.shown(messages), "", said(messages[-1]) if unanswered else gr.skip()

    def listing(self, found: list[tuple[str, str]] | None) -> Any:
        """The conversations that the browser keeps, by their first words."""
        return gr.Radio(choices=[(view.title(text), name) for text, name in found or []], value=None)

    async def like(self, chat: Chat, ratings: Ratings, event: gr.LikeData, request: gr.Request) -> Ratings:
        """Remember a rating for as long as the page is open; with an opposite one of the same message, keep a pair."""
        assert self.feedback
        with telling(), self.clients.admitted(_address(request)):
            messages = messages_of(chat)
            number = _number(messages, event.index)
            if messages[number]["role"] != "assistant":
                raise UserError("only answers can be rated")
            liked = event.liked if isinstance(event.liked, bool) else None
            rated = rate(ratings, Rating(messages[:number], messages[number]["content"], liked))
            if new := rated.pairs[len(ratings.pairs) :]:
                await asyncio.to_thread(append_pairs, self.feedback, new)
            return rated

    async def tokenise(
        self, text: str | None, model: str | None, as_chat: bool, request: gr.Request
    ) -> tuple[Any, ...]:
        """A text's tokens, and for each the likeliest that follow."""
        with telling(), self.clients.admitted(_address(request)):
            info, loaded, _ = await self.backend.ready(model or "")
            tokenizer = loaded.tokenizer

            def read() -> tuple[list[int], NextTokens]:
                if as_chat and info.is_chat:
                    tokens = render_prompt(conversation(text or ""), tokenizer)
                else:
                    tokens = [tokenizer.bos, *tokenizer.encode(text or "")]
                return tokens, next_token_table(loaded.params, loaded.cfg, tokens, compute=loaded.compute)

            tokens, table = await asyncio.to_thread(read)
        rows = [view.likeliest(table, position, tokenizer) for position in range(len(tokens))]
        slider = gr.Slider(1, max(2, len(tokens)), len(tokens), visible=len(tokens) > 1)
        return view.coloured(tokens, table, tokenizer), rows, slider, rows[-1]

    def pick(self, event: gr.SelectData) -> int:
        return int(event.index) + 1

    def expected(self, rows: list[dict[str, float]], position: int) -> Any:
        return rows[int(position) - 1] if 0 < position <= len(rows) else gr.skip()


def _address(request: gr.Request) -> str:
    return request.client.host if request.client else ""


def _without_answer(messages: list[Message]) -> list[Message]:
    return messages[:-1] if messages and messages[-1]["role"] == "assistant" else messages


def _number(messages: list[Message], index: Any) -> int:
    """The number of the message to which an entry of the chatbot belongs."""
    entries, at = view.numbered(messages), index[0] if isinstance(index, list) else index
    if not isinstance(at, int) or not 0 <= at < len(entries):
        raise UserError("that message is no longer there")
    return entries[at][0]
