"""The page, in a real browser, with models that say what they are made to say."""

import asyncio
import json
import os
import shutil
import socket
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import urlsplit

import gradio as gr
import httpx
import openai
import pytest
from playwright import sync_api
from test_backend import held, pending, until
from test_cli_chat import CALL, runs, stalled  # noqa: F401

from nanochat_jax.data.preference import open_pairs
from nanochat_jax.engine import Engine
from nanochat_jax.errors import UserError
from serve import app, loadtest, users, view
from serve.backend import Backend
from serve.feedback import Rating, Ratings, append_pairs, rate
from serve.handlers import Handlers, messages_of, new_chat
from serve.limits import Clients, Limits
from serve.models import BackendConfig

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
ON_LEAVING = ("AbortError", "Connection errored out")  # of requests that a reload cuts off
HOSTILE = '<img src="http://evil.invalid/a.png"> ![b](http://evil.invalid/b.png) <script>alert(1)</script> **c**'
USER, ANSWER = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


@contextmanager
def serving(folder: Path, **changes):
    """The app on a port of its own: its address, and its backend."""
    backend = BackendConfig(runs=folder, slots=2, max_loaded=3)
    config = app.Config(backend, port=free_port(), **{"limits": Limits(requests_per_minute=0, concurrent=0)} | changes)
    backend = Backend(config.backend)
    page = app.launch(config, backend)
    try:
        yield f"http://127.0.0.1:{config.port}", backend
    finally:
        page.close()
        backend.close()


@pytest.fixture(scope="module")
def feedback(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("feedback") / "new" / "pairs.jsonl"


@pytest.fixture(scope="module")
def server(runs, feedback):  # noqa: F811
    with serving(runs, feedback=feedback) as (address, backend):
        yield address, backend


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as p:
        path = next(filter(None, map(shutil.which, BROWSERS)), p.chromium.executable_path)
        if not Path(path).exists():
            message = "there is no Chromium; `bash tests/run.sh` says how to get one"
            pytest.fail(message) if os.environ.get("CI") else pytest.skip(message)
        browser = p.chromium.launch(executable_path=path, args=["--no-sandbox"], timeout=120_000)
        yield browser
        browser.close()


class Visitor:
    """Somebody who looks at the page, and what their browser asked for and complained of."""

    def __init__(self, browser, address: str, **options) -> None:
        self.context = browser.new_context(**{"viewport": {"width": 1000, "height": 800}} | options)
        self.page = self.context.new_page()
        self.hosts: set[str] = set()
        self.complaints: list[str] = []
        self.address = address
        self.watch(self.page)
        self.visit()

    def watch(self, page) -> None:
        page.set_default_timeout(180_000)
        page.on("request", lambda request: self.hosts.add(urlsplit(request.url).netloc))
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        page.on("console", lambda m: self.complaints.append(m.text) if m.type == "error" else None)

    def visit(self) -> None:
        self.page.goto(self.address)
        self.page.locator("#box textarea").wait_for()
        self.page.wait_for_function("document.querySelector('#model input')?.value")

    def send(self, text: str) -> None:
        self.page.locator("#box textarea").fill(text)
        self.page.keyboard.press("Enter")

    def wait(self, text: str, where: str = "#chat") -> None:
        self.page.locator(where).get_by_text(text).first.wait_for()

    def done(self) -> None:
        self.page.locator("#box textarea:enabled").wait_for()

    def said(self, role: str) -> list[str]:
        return [text.strip() for text in self.page.locator(f"#chat .{role}.message").all_inner_texts()]

    def press(self, title: str) -> None:
        """The last button of this name below a message."""
        self.page.locator(f'#chat button[title="{title}"]').last.click()

    def choose(self, model: str) -> None:
        self.page.locator("#model input").click()
        self.page.get_by_role("option", name=model).click()


@pytest.fixture
def visitor(browser, server):
    made = []

    def visit(**options) -> Visitor:
        made.append(Visitor(browser, server[0], **options))
        return made[-1]

    yield visit
    for one in made:
        one.context.close()
        assert one.hosts == {urlsplit(server[0]).netloc}
        assert not [text for text in one.complaints if not any(part in text for part in ON_LEAVING)]


@pytest.fixture
def slow(monkeypatch):
    """Answers take their time, and those of a model that would never end wait for somebody to stop them."""
    monkeypatch.setattr(Engine, "step", stalled(Engine.step))


def test_a_conversation_with_a_tool_is_shown_timed_and_kept_over_a_reload(visitor):
    one = visitor()
    one.send(HOSTILE)
    one.wait("yk")
    one.wait("tokens/s", "#stats")
    one.wait("first after", "#stats")
    one.wait("6*7 → 42")
    assert one.said("user") == [HOSTILE]
    one.done()
    one.page.wait_for_function("""() => Object.values(localStorage).some((chat) => chat.includes('"42"'))""")
    one.visit()
    one.wait("6*7 → 42")
    assert one.said("user") == [HOSTILE]
    assert one.page.locator("#stats").inner_text().strip() == ""


def test_when_the_browsers_storage_is_full_the_oldest_conversation_goes(visitor):
    one = visitor()
    one.page.evaluate("""() => {
      const chat = (saved) => JSON.stringify({ saved, messages: [{ role: "user", content: "x".repeat(1 << 20) }] });
      for (let saved = 1; ; saved++) try { localStorage.setItem("nanochat:" + saved, chat(saved)); } catch { break; }
      for (let size = 1 << 20; size; size >>= 1)
        try { for (let n = 0; ; n++) localStorage.setItem(`other${size}/${n}`, "x".repeat(size)); } catch {}
    }""")
    one.send("hello")
    one.wait("yk")
    one.done()
    one.visit()
    one.wait("yk")
    kept = one.page.evaluate("Object.keys(localStorage).filter(key => key.startsWith('nanochat:'))")
    assert "nanochat:1" not in kept and "nanochat:2" in kept


def test_hostile_text_is_shown_as_it_is_wherever_it_stands(visitor):
    one = visitor()
    stored = {"messages": [USER, {"role": "assistant", "content": [{"type": "text", "text": HOSTILE}]}], "saved": 1}
    called = [USER, {"role": "assistant", "content": [dict(part, text=HOSTILE) for part in CALL]}]
    broken = {"messages": [{"role": "robot", "content": HOSTILE}], "saved": 3}
    for name, chat in {"a": stored, "b": {"messages": called, "saved": 2}, "c": broken}.items():
        one.page.evaluate("([k, v]) => localStorage.setItem('nanochat:' + k, JSON.stringify(v))", [name, chat])
    one.page.evaluate("sessionStorage.setItem('nanochat', 'a')")
    one.visit()
    one.wait("alert(1)")
    assert one.said("bot") == [HOSTILE]
    for name in "bc":
        one.page.evaluate("name => sessionStorage.setItem('nanochat', name)", name)
        one.visit()
        one.page.get_by_text("unknown role" if name == "c" else "alert(1)").first.wait_for()
    assert not one.page.locator("img[src*=evil], script[src*=evil]").count()


def test_stop_keeps_what_was_said_and_frees_the_slot(visitor, server, slow):
    one = visitor()
    one.choose("demo/sft")
    one.send("hello")
    one.wait("ababab")
    one.page.keyboard.press("Tab")
    one.page.keyboard.press("Enter")  # on the stop button, beside the box
    one.done()
    until(lambda: server[1].service("demo/sft").stats()["running"] == 0)
    [partial] = one.said("bot")
    assert 4 < len(partial) < 200
    one.choose("demo/rl")
    one.send("and now")
    one.wait("yk")
    one.done()
    assert one.said("bot")[0] == partial and one.said("user") == ["hello", "and now"]


def test_a_reload_in_mid_answer_keeps_what_was_said_and_frees_the_slot(visitor, server, slow):
    one = visitor()
    one.choose("demo/sft")
    one.send("hello")
    one.wait("ababab")
    one.visit()
    one.wait("ababab")
    [partial] = one.said("bot")
    assert one.said("user") == ["hello"] and len(partial) < 200
    until(lambda: server[1].service("demo/sft").stats()["running"] == 0)
    one.visit()
    one.wait("ababab")
    assert one.said("bot") == [partial]
    one.choose("demo/rl")
    one.send("and now")
    one.wait("yk")
    one.done()
    assert one.said("bot")[0] == partial and one.said("user") == ["hello", "and now"]


def test_a_reload_before_the_first_word_keeps_the_message(visitor, server):
    one = visitor()
    with held(server[1].service("demo/rl")):
        one.send("hello")
        one.wait("hello")
        one.page.wait_for_function("Object.values(localStorage).some(kept => kept.includes('hello'))")
        one.visit()
        one.wait("hello")
    one.page.wait_for_function("document.querySelector('#box textarea').value == 'hello'")
    one.page.locator("#box textarea").press("Enter")
    one.wait("yk")
    one.done()
    assert one.said("user") == ["hello"]


def test_a_new_conversation_leaves_an_answer_behind(visitor, server, slow):
    one = visitor()
    one.choose("demo/sft")
    one.send("first")
    one.wait("abab")
    one.page.locator(".sidebar .toggle-button").click()
    one.page.get_by_role("button", name="New conversation").click()
    one.page.locator("#chat").get_by_text("abab").wait_for(state="detached")
    until(lambda: server[1].service("demo/sft").stats()["running"] == 0)
    one.choose("demo/rl")
    one.send("second")
    one.wait("yk")
    one.done()
    assert one.said("user") == ["second"]
    one.page.locator("#history").get_by_text("first").click()
    one.wait("abab")
    assert one.said("user") == ["first"]


def test_a_visitor_who_leaves_frees_the_slot(visitor, server, slow):
    one = visitor()
    one.choose("demo/sft")
    one.send("hello")
    one.wait("ababab")
    service = server[1].service("demo/sft")
    finished = service.stats()["finished"].get("cancelled", 0)
    one.page.close()
    until(lambda: service.stats()["running"] == 0)
    assert service.stats()["finished"]["cancelled"] == finished + 1


def test_who_leaves_before_the_first_word_gives_the_place_up(visitor, server):
    one = visitor()
    one.choose("demo/sft")
    service = server[1].service("demo/sft")
    with held(service):
        one.send("hello")
        one.wait("…", "#stats")
        until(lambda: pending(service))
        (handle,) = pending(service)
        one.page.close()
        until(lambda: handle.cancelled)


def test_retry_undo_edit_and_examples(visitor):
    one = visitor()
    one.page.get_by_text(app.EXAMPLES[0]).click()
    one.wait("yk")
    one.done()
    one.choose("demo/base")
    one.press("Retry")
    one.page.locator("#chat").get_by_text("yk").wait_for(state="detached")
    one.done()
    assert one.said("user") == [app.EXAMPLES[0]]
    one.choose("demo/rl")
    one.page.locator("#chat .user.message").hover()
    one.press("Edit")
    one.page.locator("#chat textarea").fill("changed")
    one.press("Submit")
    one.wait("yk")
    one.done()
    assert one.said("user") == ["changed"]
    one.press("Undo")
    one.page.wait_for_function("document.querySelector('#box textarea').value == 'changed'")
    assert one.said("user") == one.said("bot") == []


def test_what_is_refused_or_mistaken_is_told(visitor):
    one = visitor()
    one.send("How do I build a bomb?")
    one.wait("can't help")
    one.done()
    one.wait("ended by the safety policy", "#stats")
    one.send("x" * 300)
    one.page.get_by_text("takes 30").first.wait_for()
    one.done()
    assert one.page.locator("#box textarea").input_value() == "x" * 300
    assert one.said("user") == ["How do I build a bomb?"]


def test_two_windows_talk_at_once_and_keep_their_conversations(visitor, slow):
    one = visitor()
    two = Visitor.__new__(Visitor)
    two.__dict__.update(one.__dict__, page=one.context.new_page())
    two.watch(two.page)
    two.visit()
    one.choose("demo/sft")
    one.send("first")
    one.wait("abab")
    two.send("second")
    two.wait("yk")
    two.done()
    assert one.page.locator("#box textarea:enabled").count() == 0  # still at it
    one.page.locator("#box .stop-button").click()
    one.done()
    for window, other in ((one, "second"), (two, "first")):
        window.visit()
        window.page.locator(".sidebar .toggle-button").click()
        window.page.locator("#history").get_by_text(other).click()
        window.wait(other)
        assert window.said("user") == [other]
        window.page.get_by_role("button", name="New conversation").click()
        window.page.locator("#chat").get_by_text(other).wait_for(state="detached")


def test_opposite_ratings_of_one_message_become_a_pair(visitor, feedback):
    one = visitor()
    one.send("abc")
    one.wait("yk")
    one.done()
    one.press("Dislike")
    one.choose("demo/base")
    one.press("Retry")
    one.page.locator("#chat").get_by_text("yk").wait_for(state="detached")
    one.done()
    assert not feedback.exists()
    one.press("Like")
    until(feedback.exists)
    [pair] = list(open_pairs(f"jsonl:{feedback}"))
    assert pair.prompt["messages"] == [{"role": "user", "content": "abc"}]
    assert pair.rejected["messages"][-1]["content"][:2] == list(CALL)


def test_tokens_and_what_may_follow_them(visitor):
    one = visitor()
    one.page.get_by_role("tab", name="Tokens").click()
    one.page.locator("#text textarea").fill("hi")
    one.page.locator("#show").click()
    one.wait("<|user_start|>", "#tokens")
    one.wait("<|python_start|>", "#likeliest")  # is what this model begins an answer with
    one.page.locator("#tokens").get_by_text("<|assistant_start|>").wait_for()
    one.page.locator("#tokens").get_by_text("h", exact=True).click()
    one.page.wait_for_function("document.querySelector('#position input[type=number]').value == '3'")


@pytest.mark.parametrize("options", [{"color_scheme": "dark"}, {"viewport": {"width": 360, "height": 640}}])
def test_it_follows_the_dark_mode_and_fits_a_phone(visitor, options):
    one = visitor(**options)
    one.page.keyboard.type("hello")  # the box has the focus
    one.page.keyboard.press("Enter")
    one.wait("yk")
    red, *_ = one.page.evaluate("getComputedStyle(document.body).backgroundColor.match(/[0-9]+/g).map(Number)")
    assert red < 60 if "color_scheme" in options else red > 200
    wide = one.page.evaluate("document.documentElement.scrollWidth - innerWidth")
    assert wide <= 0
    box = one.page.locator("#box textarea").bounding_box()
    assert box["x"] >= 0 and box["x"] + box["width"] <= one.page.viewport_size["width"]
    one.page.wait_for_function("document.activeElement.closest('#box textarea:enabled')")


def test_without_a_checkpoint_the_page_says_how_to_make_one(browser, tmp_path):
    with serving(tmp_path) as (address, _):
        page = browser.new_page()
        page.goto(address)
        page.locator("#banner").get_by_text("bash train/demo.sh").wait_for(timeout=180_000)
        page.locator("#box textarea").fill("hello")
        page.keyboard.press("Enter")
        page.locator(".toast-wrap").get_by_text("bash train/demo.sh").wait_for(timeout=180_000)
        page.close()


def test_page_and_api_share_their_models_and_limits(server):
    address, backend = server
    with openai.OpenAI(base_url=f"{address}/v1", api_key="any", max_retries=0) as client:
        answer = client.chat.completions.create(model="demo/rl", messages=[USER])
    assert answer.choices[0].message.content == "yk"
    assert httpx.get(f"{address}/healthz").json()["loaded"] == sorted(backend.stats())
    assert 'nanochat_completion_tokens_total{model="demo/rl"}' in httpx.get(f"{address}/metrics").text
    too_large = httpx.post(f"{address}/gradio_api/queue/join", content=b"x" * 2_000_000)
    assert too_large.status_code == 413 and "larger than" in too_large.text
    assert httpx.post(f"{address}/gradio_api/upload", files={"files": b"any"}).status_code == 413


def test_many_visitors_are_answered_at_once(server):
    # More than the 40 that Gradio would let have anything going on.
    config = loadtest.Config(url=server[0], page=True, model="demo/rl", users=(50,), seconds=1, warm_up_seconds=0)
    with ThreadPoolExecutor() as threads:  # playwright has the event loop of this one
        [one] = threads.submit(loadtest.main, config).result()["rounds"]
    assert one["answers"] >= 50 and not one["errors"] and one["first_token_seconds_p95"] > 0
    assert one["tokens_per_second"] * one["seconds"] == pytest.approx(12 * one["answers"])  # what this model says


def test_a_visitor_who_asks_too_often_is_told(runs, browser):  # noqa: F811
    with serving(runs, limits=Limits(requests_per_minute=1)) as (address, _):
        one = Visitor(browser, address)
        one.send("hello")
        one.wait("yk")
        one.done()
        one.send("again")
        one.page.locator(".toast-wrap").get_by_text("more than 1 requests a minute").wait_for()
        one.page.wait_for_function("document.querySelector('#box textarea').value == 'again'")
        assert one.said("user") == ["hello"]
        refused = httpx.get(f"{address}/v1/models")
        assert refused.status_code == 429 and "more than 1 requests a minute" in refused.text
        one.context.close()


def test_no_client_can_say_of_itself_who_it_is(tmp_path, monkeypatch):
    monkeypatch.setenv("FORWARDED_ALLOW_IPS", app.PROXIES)

    def asked(number: int) -> int:
        forged = {"X-Forwarded-For": f"6.6.6.{number}, 203.0.113.{number // 5}, 10.0.0.7"}  # two proxies added to it
        return httpx.get(f"{address}/v1/models", headers=forged).status_code

    with serving(tmp_path, limits=Limits(requests_per_minute=2)) as (address, _):
        assert [asked(number) for number in range(8)] == [200, 200, 429, 429, 429, 200, 200, 429]


def test_the_tokens_of_a_text_count_as_a_message(runs):  # noqa: F811
    async def ask(address: str) -> list:
        async with httpx.AsyncClient(base_url=address, timeout=300) as client:
            some = [users.PageUser(client, "demo/rl", 8) for _ in range(6)]
            for one in some:
                await one._open()
            asked = (one._call("tokenise", ["hi", "demo/rl", True]) for one in some)
            return await asyncio.gather(*asked, return_exceptions=True)

    limits = Limits(requests_per_minute=3, concurrent=1)
    with (
        serving(runs, limits=limits) as (address, _),
        ThreadPoolExecutor() as threads,
    ):  # playwright has this one's loop
        found = threads.submit(asyncio.run, ask(address)).result()
    told = [str(one) for one in found if isinstance(one, users.Failed)]
    assert len(told) == 3 and all("more than 3 requests a minute" in one for one in told)


def test_nothing_is_shared_and_a_password_is_asked_for_where_there_is_one(tmp_path):
    config = app.Config()
    assert (config.share, config.host, config.feedback, config.frame_ancestors) == (False, "127.0.0.1", None, ())
    with serving(tmp_path, auth="ann:secret", frame_ancestors=("https://example.org", "*")) as (address, _):
        page = httpx.get(address)
        assert "auth_required" in page.text and "demo.sh" not in page.text
        assert httpx.get(f"{address}/config").status_code == httpx.get(f"{address}/v1/models").status_code == 401
        policy = page.headers["content-security-policy"]
        assert "default-src 'self'" in policy and policy.endswith("frame-ancestors 'self' https://example.org *")
        taken = app.Config(BackendConfig(runs=tmp_path), port=int(address.rsplit(":", 1)[1]))
        with pytest.raises(UserError, match="--port"):
            app.launch(taken, Backend(taken.backend))
    for site in ("example.org", "https://example.org; default-src *", "'none'", "https://a\n"):
        with pytest.raises(UserError, match="--frame-ancestors"):
            app.Config(frame_ancestors=(site,))
    for auth in ("ann", ":x", "ann:"):
        with pytest.raises(UserError, match="NAME:PASSWORD"):
            app.launch(app.Config(BackendConfig(runs=tmp_path), auth=auth), Backend(BackendConfig()))


@pytest.mark.parametrize(
    ("chat", "message"),
    [
        (None, "list"),
        ({"messages": 3}, "not a list"),
        ({"messages": [ANSWER]}, "'user' is due"),
        ({"messages": [USER, ANSWER, ANSWER]}, "'user' is due"),
        ({"messages": [{"role": "system", "content": "x"}, USER]}, "field of its own"),
        ({"messages": [USER | {"content": "x" * 100_001}]}, "100,000 characters"),
        ({"messages": [USER | {"content": [{"type": "python", "text": "1"}]}]}, "assistant message only"),
    ],
)
def test_what_a_browser_sends_is_checked(chat, message):
    with pytest.raises(UserError, match=message):
        messages_of(chat)


def test_errors_cannot_carry_markup(tmp_path):
    handlers = Handlers(Backend(BackendConfig(runs=tmp_path)), Clients(Limits()))
    with pytest.raises(gr.Error) as found:
        handlers.say("hi", {"id": "x", "messages": [{"role": "<b>", "content": "x"}]})
    assert "&lt;b&gt;" in found.value.message
    with pytest.raises(gr.Error, match="empty"):
        handlers.say(" \n", new_chat())


def test_a_page_begins_with_what_the_browser_kept_alone(tmp_path):
    """A conversation of the server's own would come as another event, before or after the one that was kept."""
    handlers = Handlers(Backend(BackendConfig(runs=tmp_path)), Clients(Limits()))
    at_start = [event for event in app.build(handlers).fns.values() if any(kind == "load" for _, kind in event.targets)]
    changing = [event for event in at_start if any(isinstance(out, gr.Chatbot) for out in event.outputs)]
    chats = [out for event in changing for out in event.outputs if isinstance(out, gr.JSON)]
    assert [event for event in at_start if set(chats) & set(event.outputs)] == changing and len(changing) == 1
    first, second = (handlers.say("hi", None)[0] for _ in range(2))
    assert first["messages"] == [{"role": "user", "content": "hi"}] and first["id"] != second["id"]


def test_ratings_pair_answers_to_the_same_prompt_alone(tmp_path):
    prompt, other = [USER], [USER, ANSWER, USER]
    seen, made = Ratings([], []), []
    for rating in (
        Rating(prompt, "bad", False),
        Rating(other, "elsewhere", True),
        Rating(prompt, "worse", False),
        Rating(prompt, "good", True),
        Rating(prompt, "good", True),
        Rating(prompt, "good", None),
        Rating(prompt, "good", False),
        Rating(prompt, "good", True),  # again: its pairs are there already
        Rating(prompt, "bad", True),
    ):
        before, seen = seen, rate(seen, rating)
        made.append(seen.pairs[len(before.pairs) :])
    both = [{"prompt": prompt, "chosen": "good", "rejected": bad} for bad in ("bad", "worse")]
    changed = {"prompt": prompt, "chosen": "bad", "rejected": "worse"}
    assert made == [[], [], [], both, [], [], [], [], [changed]]
    append_pairs(tmp_path / "new" / "pairs.jsonl", both)
    append_pairs(tmp_path / "new" / "pairs.jsonl", both)
    assert len(open_pairs(f"jsonl:{tmp_path}/new/pairs.jsonl")) == 4
    with pytest.raises(UserError, match="--feedback"):
        append_pairs(tmp_path, both)


def test_no_rating_can_spoil_the_file(tmp_path):
    handlers = Handlers(Backend(BackendConfig(runs=tmp_path)), Clients(Limits(requests_per_minute=5)), tmp_path / "f")
    visitor, ratings = SimpleNamespace(client=SimpleNamespace(host="a")), Ratings([], [])

    def like(messages: list, index: int, liked: bool) -> Ratings:
        event = gr.LikeData(None, {"index": index, "value": "", "liked": liked})
        with ThreadPoolExecutor() as threads:  # playwright has the event loop of this one
            return threads.submit(asyncio.run, handlers.like({"messages": messages}, ratings, event, visitor)).result()

    with pytest.raises(gr.Error, match="only answers"):
        like([USER, ANSWER, USER], 2, True)
    ratings = like([USER, ANSWER], 1, True)
    with pytest.raises(gr.Error, match="same answer"):
        like([USER, ANSWER | {"content": [{"type": "text", "text": c} for c in "ho"]}], 1, False)
    assert not (tmp_path / "f").exists()
    ratings = like([USER, ANSWER | {"content": "hu"}], 1, False)
    assert len(open_pairs(f"jsonl:{tmp_path}/f")) == len(ratings.pairs) == 1
    like([USER, ANSWER], 1, True)
    with pytest.raises(gr.Error, match="5 requests a minute"):
        like([USER, ANSWER], 1, True)


def test_the_length_of_an_answer_is_told_by_the_name_of_its_setting(runs, monkeypatch):  # noqa: F811
    told = list[str]()
    monkeypatch.setattr(gr, "Warning", told.append)
    backend = Backend(BackendConfig(runs=runs, slots=2))
    handlers, visitor = Handlers(backend, Clients(Limits())), SimpleNamespace(client=None)

    async def ask() -> None:
        async for _ in handlers.respond(
            new_chat() | {"messages": [USER]}, "demo/rl", "", 1, 0, 1, 0, 1, 256, 1, True, visitor
        ):
            pass

    with ThreadPoolExecutor() as threads:  # playwright has the event loop of this one
        threads.submit(asyncio.run, ask()).result()
    backend.close()
    assert len(told) == 1 and told[0].startswith("Longest answer: 256 tokens") and "ask for 1 to" in told[0]


def test_a_call_and_its_output_are_one_entry_of_their_message():
    answer = {"role": "assistant", "content": [*CALL, {"type": "text", "text": "yk"}, CALL[0]]}
    entries = view.numbered([{"role": "system", "content": "s"}, USER, answer])
    assert [number for number, _ in entries] == [1, 2, 2, 2]
    assert [entry.get("metadata", {}).get("title") for _, entry in entries] == [
        None,
        "Calculator: 6*7 → 42",
        None,
        "Calculator: 6*7",
    ]
    json.dumps(entries)
