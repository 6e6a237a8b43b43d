"""What the page shows of a conversation and of a model's tokens, and what runs in the browser.

The conversation itself, in the project's schema, is the only state; what is shown is computed from it. It is kept in
the browser alone: one entry of its storage a conversation, so that two windows never overwrite each other's.
"""

from collections.abc import Sequence
from typing import Any

from nanochat_jax.chat import Message, content_parts
from nanochat_jax.probabilities import NextTokens
from nanochat_jax.tokenizer import Tokenizer

TITLE_LENGTH = 40  # characters
LIKELY, PLAUSIBLE = 0.5, 0.05  # probabilities that divide the colours of tokens
COLOURS = {"expected": "#16a34a", "plausible": "#ca8a04", "surprising": "#dc2626", "given": "#64748b"}

CSS = """
footer { display: none !important; }
.gradio-container { width: 100% !important; max-width: 60rem !important; margin: 0 auto !important; }
.gradio-container main { width: 100%; }
#chat .placeholder { text-align: center; padding: 1rem; }
#stats { min-height: 1.5em; opacity: 0.75; font-variant-numeric: tabular-nums; }
#chat { height: clamp(18rem, 62dvh, 60rem) !important; }
#chat .md { white-space: pre-wrap; overflow-wrap: anywhere; }
#tokens span, #tokens .category-label { color: var(--body-text-color) !important; }
@media (max-width: 30rem) {
  .gradio-container { padding: 0.25rem !important; }
  #chat { height: 58dvh !important; }
}
"""

# Whatever is shown is kept at once, so that a reload loses nothing of it; a window remembers which conversation is its
# own. Of a full storage the oldest go.
SAVE = """(chat) => {
  const key = "nanochat:" + chat?.id;
  if (!chat?.messages?.length) return void localStorage.removeItem(key);
  sessionStorage.setItem("nanochat", chat.id);
  const saved = (key) => { try { return JSON.parse(localStorage.getItem(key)).saved; } catch { return 0; } };
  const entry = JSON.stringify({ saved: Date.now(), messages: chat.messages });
  for (let kept; ; localStorage.removeItem(kept.shift()))
    try { return void localStorage.setItem(key, entry); }
    catch (error) {
      kept ??= Object.keys(localStorage).filter((other) => other.startsWith("nanochat:") && other != key)
        .sort((a, b) => saved(a) - saved(b));
      if (!kept.length) throw error;
    }
}"""
FOCUS = '() => void document.querySelector("#box textarea")?.focus()'
LIST = """() => {
  const read = (key) => { try { return JSON.parse(localStorage.getItem(key)); } catch { return null; } };
  return [Object.keys(localStorage).filter((key) => key.startsWith("nanochat:"))
    .map((key) => [key.slice(9), read(key)]).filter(([, chat]) => Array.isArray(chat?.messages))
    .sort((a, b) => b[1].saved - a[1].saved)
    .map(([id, chat]) => [String(chat.messages.find((m) => m.role === "user")?.content ?? "").slice(0, 99), id])];
}"""
OPEN = """(id) => {
  id = id ?? sessionStorage.getItem("nanochat");
  const stored = id && localStorage.getItem("nanochat:" + id);
  if (!stored) return [null, null];
  sessionStorage.setItem("nanochat", id);
  try { return [null, { id, messages: JSON.parse(stored).messages }]; } catch { return [null, null]; }
}"""
TYPED = '(_, chat) => [document.querySelector("#box textarea").value, chat]'
LEAVE = '() => { sessionStorage.removeItem("nanochat"); return []; }'
FORGET = """(chat) => {
  localStorage.removeItem("nanochat:" + chat?.id);
  sessionStorage.removeItem("nanochat");
  return [chat];
}"""


def escaped(text: str) -> str:
    """Text for Gradio's Chatbot, which takes it for HTML even where it renders no Markdown."""
    return text.replace("&", "&amp;").replace("<", "&lt;")


def unescaped(text: str) -> str:
    """The text that was `escaped`."""
    return text.replace("&lt;", "<").replace("&amp;", "&")


def numbered(messages: Sequence[Message]) -> list[tuple[int, dict[str, Any]]]:
    """What Gradio's Chatbot shows, each with the number of the message that it belongs to.

    A call and its output are one entry with a title; the system's message is not shown.
    """
    entries: list[tuple[int, dict[str, Any]]] = []
    for number, message in enumerate(messages):
        if message["role"] == "system":
            continue
        for part in content_parts(message):
            text = escaped(part["text"])
            if part["type"] == "python_output" and entries and "metadata" in entries[-1][1]:
                entries[-1][1]["metadata"]["title"] += f" → {text}"
                entries[-1][1]["content"] += f"\nThe calculator answered: {text}"
            elif part["type"] == "text":
                entries.append((number, {"role": message["role"], "content": text}))
            else:
                call = {
                    "content": f"The model asked: {text}",
                    "metadata": {"title": f"Calculator: {text}", "status": "done"},
                }
                entries.append((number, {"role": message["role"], **call}))
    return entries


def shown(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """What Gradio's Chatbot shows."""
    return [entry for _, entry in numbered(messages)]


def title(text: str) -> str:
    """A conversation's name: its first words."""
    words = " ".join(text.split()) or "…"
    return words if len(words) <= TITLE_LENGTH else words[:TITLE_LENGTH] + "…"


def token_name(token: int, tokenizer: Tokenizer) -> str:
    """A token as text: its bytes, with what is no character escaped, or a control token's name."""
    names = {number: name for name, number in tokenizer.control.items()}
    return names.get(token) or tokenizer.pieces[token].decode(errors="backslashreplace")


def coloured(tokens: Sequence[int], table: NextTokens, tokenizer: Tokenizer) -> list[tuple[str, str]]:
    """Each token with how far the model expected it after those before it."""
    kinds = ["given"]
    for probability in table.actual_T[:-1]:
        kinds.append("expected" if probability >= LIKELY else "plausible" if probability >= PLAUSIBLE else "surprising")
    return [(token_name(token, tokenizer), kind) for token, kind in zip(tokens, kinds, strict=True)]


def likeliest(table: NextTokens, position: int, tokenizer: Tokenizer) -> dict[str, float]:
    """The likeliest tokens after a position, likeliest first, as Gradio's Label takes them."""
    row = zip(table.tokens_TK[position].tolist(), table.probabilities_TK[position].tolist(), strict=True)
    return {f"{token_name(token, tokenizer)!r} ({token})": probability for token, probability in row}
