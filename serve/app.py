"""Chat in the browser, and OpenAI's API beside it, on the same models.

    python -m serve.app
    python -m serve.app --backend.checkpoint runs/demo/rl --port 8080

Everything that the page needs comes from this server, and conversations stay in the browser. With --feedback FILE,
likes and dislikes of answers to the same message become preference pairs for train.dpo. /v1/…, /healthz and /metrics
answer as those of serve.api do; with --auth, /v1/… needs an --api-key.
"""

import os
import re
import secrets
import signal
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # these are read on import
os.environ["GRADIO_ANALYTICS_CACHE_FREQUENCY"] = str(1 << 60)  # after so many events it sums all of them up
os.environ["GRADIO_ANALYTICS_MAX_EVENTS"] = "1"

import gradio as gr
from starlette.datastructures import MutableHeaders
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from nanochat_jax.errors import UserError
from serve import api, view
from serve.backend import Backend
from serve.feedback import Ratings
from serve.handlers import Handlers
from serve.limits import BodyLimit, Clients, Limits
from serve.models import BackendConfig
from train import cli

TITLE = "nanochat"
EXAMPLES = ("Who are you?", "Spell the word garden.", "What is 12 times 7?", "How many r are in strawberry?")
IN_SPACE = "SPACE_ID" in os.environ  # of Hugging Face, who show the page in a frame of theirs, by way of a proxy
# The browser fetches nothing from elsewhere, whatever a model writes; Gradio itself needs inline code.
CONTENT_POLICY = "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; frame-ancestors"
# From where a Space's proxy comes. What it says of a client is believed up to the last address that is none of these:
# "*" would believe all that a client says of itself.
PROXIES = "10.0.0.0/8,100.64.0.0/10,127.0.0.0/8,172.16.0.0/12,192.168.0.0/16,::1,fc00::/7"
API_PATHS = ("/v1/", "/healthz", "/metrics", "/openapi.json")
QUIET: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}  # of events
EVENTS_AT_ONCE = 256  # of all visitors; how many answers there are at once is up to the backend


@dataclass(frozen=True)
class Config:
    backend: BackendConfig = field(default_factory=BackendConfig)
    limits: Limits = field(default_factory=Limits)
    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 lets other machines in."""
    port: int = 7860
    auth: str = ""
    """NAME:PASSWORD that visitors must give; default: the environment variable NANOCHAT_AUTH, or none."""
    api_key: str = ""
    """Key that clients of the API must know; default: the environment variable NANOCHAT_API_KEY, or none."""
    share: bool = False
    """Have Gradio's servers make a public link."""
    frame_ancestors: tuple[str, ...] = ("https://huggingface.co",) if IN_SPACE else ()
    """Other sites that may show the page in a frame, as in https://example.org; * for all."""
    feedback: Path | None = None
    """File that preference pairs are appended to; default: nothing is kept."""

    def __post_init__(self) -> None:
        for site in self.frame_ancestors:
            if not re.fullmatch(r"\*|https?://[\w.*:\[\]-]+", site, re.ASCII):
                raise UserError(f"--frame-ancestors {site} must be * or a site, as in https://example.org")


class _BesideApi:
    """ASGI middleware that leaves the API's paths to it, and adds the content policy to the page's responses."""

    def __init__(self, page: ASGIApp, api: ASGIApp, frame_ancestors: Sequence[str]) -> None:
        self._page, self._api = page, api
        self._policy = " ".join((CONTENT_POLICY, "'self'", *frame_ancestors))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"].startswith(API_PATHS):
            return await self._api(scope, receive, send)

        async def with_policy(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["Content-Security-Policy"] = self._policy
            await send(message)

        await self._page(scope, receive, with_policy)


def build(handlers: Handlers) -> gr.Blocks:
    """The page."""
    with gr.Blocks(title=TITLE, analytics_enabled=False, fill_height=True) as page:
        with gr.Sidebar(open=False):
            new = gr.Button("New conversation", variant="primary")
            history = gr.Radio([], label="Conversations in this browser", elem_id="history")
            delete = gr.Button("Delete this conversation", size="sm")
        banner = gr.Markdown(visible=False, elem_id="banner")
        model = gr.Dropdown([], label="Model", elem_id="model")
        page.load(handlers.refresh, model, [model, banner], queue=False, **QUIET)
        with gr.Tab("Chat"):
            _chat(handlers, page, model, new, history, delete)
        with gr.Tab("Tokens"):
            _tokens(handlers, model)
    return page


def _chat(
    handlers: Handlers, page: gr.Blocks, model: gr.Dropdown, new: gr.Button, history: gr.Radio, delete: gr.Button
) -> None:
    """The conversation, its settings, and what happens to it."""
    chat, found, ratings = gr.JSON(visible=False), gr.JSON(visible=False), gr.State(Ratings([], []))
    typed = gr.Textbox(visible=False)  # Gradio keeps a copy of the box for each event that reads and then changes it
    chatbot = gr.Chatbot(
        elem_id="chat",
        show_label=False,
        buttons=[],
        editable="user",
        render_markdown=False,
        latex_delimiters=[],
        allow_tags=False,
        feedback_options=("Like", "Dislike") if handlers.feedback else None,
        placeholder=f"# {TITLE}\nA small language model. It can be wrong, and it forgets what does not fit.",
        examples=[{"text": text} for text in EXAMPLES],
    )
    box = gr.Textbox(
        label="Message",
        show_label=False,
        placeholder="Write a message",
        lines=1,
        max_lines=8,
        autofocus=True,
        interactive=True,  # though no event has it as an input
        submit_btn=True,
        elem_id="box",
        html_attributes=gr.InputHTMLAttributes(autocomplete="off"),
    )
    stats = gr.Markdown(elem_id="stats")
    settings = [model, *_settings()]

    asked, answered = [chat, chatbot, box], [chat, chatbot, stats, box]
    listing: dict[str, Any] = {"fn": handlers.listing, "inputs": [found], "outputs": history, "js": view.LIST}
    running = []
    for trigger, begin, inputs, js in (
        (box.submit, handlers.say, [typed, chat], view.TYPED),
        (chatbot.example_select, handlers.example, [chat], None),
        (chatbot.retry, handlers.retry, [chat], None),
        (chatbot.edit, handlers.edit, [chat], None),
    ):
        begun = trigger(begin, inputs, asked, js=js, **QUIET)
        running.append(begun.success(handlers.respond, [chat, *settings], answered, **QUIET))
        ended = running[-1].then(handlers.idle, None, box, queue=False, **QUIET)
        ended.then(None, js=view.FOCUS).then(**listing, queue=False, **QUIET)
    stopped = box.stop(handlers.idle, None, box, cancels=running, queue=False, **QUIET)
    stopped.then(None, js=view.FOCUS).then(**listing, queue=False, **QUIET)
    chatbot.undo(handlers.undo, chat, asked, **QUIET)
    chatbot.change(None, chat, js=view.SAVE)
    if handlers.feedback:
        chatbot.like(handlers.like, [chat, ratings], ratings, **QUIET)
    opened = [chat, chatbot, stats, box]
    gr.on([new.click, chatbot.clear], handlers.new, None, opened, js=view.LEAVE, cancels=running, queue=False, **QUIET)
    gone = delete.click(handlers.new, None, opened, js=view.FORGET, cancels=running, queue=False, **QUIET)
    gone.then(**listing, queue=False, **QUIET)
    for event in (page.load, history.input):
        event(handlers.open, [history, found], opened, js=view.OPEN, **QUIET)
    page.load(**listing, queue=False, **QUIET)


def _settings() -> list[gr.components.Component]:
    """What `Handlers.respond` takes besides the conversation and the model."""
    with gr.Accordion("Settings", open=False):
        system = gr.Textbox(label="System prompt", lines=2, info="How the model is to behave", elem_id="system")
        with gr.Row():
            temperature = gr.Slider(0, 2, 0.8, step=0.05, label="Temperature", info="0: always the likeliest")
            top_k = gr.Slider(0, 200, 50, step=1, label="Top k", info="0: all tokens")
            top_p = gr.Slider(0.05, 1, 1, step=0.05, label="Top p", info="1: all tokens")
        with gr.Row():
            min_p = gr.Slider(0, 1, 0, step=0.01, label="Min p", info="0: all tokens")
            penalty = gr.Slider(1, 2, 1, step=0.05, label="Repetition penalty", info="1: none")
        with gr.Row():
            limit = gr.Slider(0, 1024, 0, step=1, label="Longest answer", info="in tokens; 0: what fits")
            seed = gr.Number(-1, precision=0, label="Seed", info="-1: another one for each answer")
            tools = gr.Checkbox(True, label="Calculator", min_width=240)
    return [system, temperature, top_k, top_p, min_p, penalty, limit, seed, tools]


def _tokens(handlers: Handlers, model: gr.Dropdown) -> None:
    """How a model reads a text."""
    gr.Markdown("How a text is divided into tokens, how far the model expected each, and what it expects next.")
    text = gr.Textbox(label="Text", value="What is 12 times 7?", lines=2, elem_id="text")
    with gr.Row():
        as_chat = gr.Checkbox(True, label="As a message in a chat", info="where the model knows turns")
        show = gr.Button("Show the tokens", variant="primary", elem_id="show")
    rows = gr.State([])
    tokens = gr.HighlightedText(
        label="Tokens", color_map=view.COLOURS, show_legend=True, show_inline_category=False, elem_id="tokens"
    )
    position = gr.Slider(1, 2, 1, step=1, label="After token", elem_id="position", visible=False)
    likeliest = gr.Label(label="What may follow", num_top_classes=10, show_heading=False, elem_id="likeliest")
    gr.on(
        [show.click, text.submit],
        handlers.tokenise,
        [text, model, as_chat],
        [tokens, rows, position, likeliest],
        concurrency_limit=1,  # each is a pass through the model that no slot holds back
        api_visibility="private",
    )
    tokens.select(handlers.pick, None, position, queue=False, **QUIET)
    position.change(handlers.expected, [rows, position], likeliest, queue=False, **QUIET)


def launch(config: Config, backend: Backend) -> gr.Blocks:
    """Start the server in a thread of its own; UserError if it cannot listen."""
    auth = api.secret(config.auth, "NANOCHAT_AUTH")
    name, _, password = auth.partition(":")
    if auth and not (name and password):
        raise UserError("--auth must be NAME:PASSWORD")
    clients = Clients(config.limits)
    # Where visitors must give a password, nobody gets around it by way of the API.
    key = api.secret(config.api_key, "NANOCHAT_API_KEY") or (secrets.token_urlsafe() if auth else "")
    page = build(Handlers(backend, clients, config.feedback))
    page.queue(default_concurrency_limit=None)
    try:
        page.launch(
            share=config.share,
            server_name=config.host,
            server_port=config.port,
            auth=(name, password) if auth else None,
            max_threads=EVENTS_AT_ONCE,
            max_file_size=1,  # byte: there is nothing to upload
            theme=gr.themes.Base(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]),
            css=view.CSS,
            footer_links=[],
            run_history=False,
            ssr_mode=False,
            prevent_thread_lock=True,
            quiet=True,
            app_kwargs={
                "middleware": [
                    Middleware(
                        _BesideApi,
                        api=api.create_app(backend, clients, key),
                        frame_ancestors=config.frame_ancestors,
                    ),
                    Middleware(BodyLimit, limits=config.limits),
                ]
            },
        )
    except OSError as error:
        raise UserError(f"cannot listen on {config.host}:{config.port}: {error}; choose another --port") from error
    print(f"chat at {page.local_url}" + (f" and {page.share_url}" if page.share_url else "") + "; Ctrl-C ends")
    return page


def main(config: Config) -> None:
    """Serve until a signal comes."""
    if IN_SPACE:
        os.environ.setdefault("FORWARDED_ALLOW_IPS", PROXIES)  # uvicorn reads it
    backend, stop = Backend(config.backend), threading.Event()
    page = launch(config, backend)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    stop.wait()
    page.close(verbose=False)
    backend.close()


if __name__ == "__main__":
    cli.run(main, Config)
