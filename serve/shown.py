"""What may be shown of an answer while it comes."""

from collections import deque

from nanochat_jax.requests import Output
from nanochat_jax.safety import Finding, Policy, StreamFilter
from nanochat_jax.streaming import Delta, Event


class Shown:
    """Takes out of an answer's events what the policy hides, and tokens whose text is not shown.

    Each stretch of text between tool calls is filtered for itself.

    Args:
        policy: for what the assistant says.
        asked: what was found in the question, whose warning follows the answer.
    """

    def __init__(self, policy: Policy, asked: Finding | None) -> None:
        self._policy, self._stream, self._number = policy, StreamFilter(policy), 0
        self._note = f"\n\n{asked.say}" if asked and asked.action == "warn" else ""
        self._read = self._released = 0  # characters
        self._waiting: deque[tuple[int, Output]] = deque()  # with the characters read by then
        self._hidden = False
        self.refusal = ""

    def take(self, event: Event) -> tuple[tuple[Delta, ...], Output]:
        """What can be shown by now."""
        shown: list[Delta] = []
        for delta in event.deltas:
            if delta.number != self._number:
                shown += self._close()
                self._stream, self._number = StreamFilter(self._policy), delta.number
            if self.refusal:
                break
            if delta.type == "text":
                self._read += len(delta.text)
                shown += self._show(self._stream.feed(delta.text))
            else:
                shown.append(delta)
        if event.finish_reason:
            shown += self._close()
            if self._note and not self.refusal:
                shown += self._show(self._note)
        self._waiting.append((self._read, event.output))
        output = Output(event.output.request)
        while self._waiting and self._waiting[0][0] <= self._released and not self._hidden:
            output += self._waiting.popleft()[1]
        return tuple(shown), output

    def _close(self) -> list[Delta]:
        rest = self._show(self._stream.close())
        self._released = self._read
        return rest

    def _show(self, text: str) -> list[Delta]:
        self._released += len(text)
        self._hidden = self._hidden or any(finding.action in ("refuse", "mask") for finding in self._stream.findings)
        if self._stream.refused:
            self.refusal = self._stream.findings[-1].say
        return [Delta(self._number, "text", text)] if text else []
