"""Rendered conversations packed into rows of one length, for supervised fine-tuning.

Everything is packed before training. A conversation is never cut in the middle: one that is too long for a row keeps
as many whole turns from its beginning as fit, up to an assistant's end, and is dropped if not even the first answer
fits; both are counted. None waits for a better row: with all lengths known, best fit places them at once.
"""

import hashlib
from bisect import bisect_left, insort
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from nanochat_jax.chat import Conversation, Rendered, render
from nanochat_jax.data.batches import Batch, NothingFitsError
from nanochat_jax.errors import UserError
from nanochat_jax.tokenizer import Tokenizer


@dataclass(frozen=True)
class SFTStats:
    """What became of the conversations."""

    conversations: int
    shortened: int  # too long, so that turns at the end are left out
    dropped: int  # too long up to the first answer's end
    tokens: int
    supervised_tokens: int
    rows: int
    capacity: int  # tokens that the rows could hold

    @property
    def padding_share(self) -> float:
        return 1 - self.tokens / self.capacity


@dataclass(frozen=True)
class Rows:
    """Packed conversations."""

    sequence_len: int
    bos: int
    tokens_N: np.ndarray  # of all conversations, one after the other in the order of rows
    supervised_N: np.ndarray  # bool
    starts: np.ndarray  # int64 (conversations + 1,), where each begins in tokens_N
    row_starts: np.ndarray  # int64 (rows + 1,), which conversation each row begins with
    stats: SFTStats

    def __len__(self) -> int:
        return len(self.row_starts) - 1

    @property
    def fingerprint(self) -> str:
        """Tells these rows from all others."""
        arrays = self.tokens_N, self.supervised_N, self.starts, self.row_starts
        return hashlib.sha256(b"".join(array.tobytes() for array in arrays)).hexdigest()

    def row(self, index: int) -> Batch:
        """tokens, targets (−1 where unsupervised) and segment_ids, int32 (sequence_len,) each.

        Segments count from 0; what is left of the row is a segment of its own, of bos tokens without targets.
        """
        first, last = self.row_starts[index], self.row_starts[index + 1]
        begin, end = self.starts[first], self.starts[last]
        lengths = np.diff(self.starts[first : last + 1])
        rest = self.sequence_len + 1 - (end - begin)
        tokens = np.pad(self.tokens_N[begin:end].astype(np.int32), (0, rest), constant_values=self.bos)
        supervised = np.pad(self.supervised_N[begin:end], (0, rest))
        segments = np.repeat(np.arange(len(lengths) + 1, dtype=np.int32), [*lengths, rest])
        return {
            "tokens": tokens[:-1],
            "targets": np.where(supervised[1:], tokens[1:], -1),  # bos is never supervised: nothing crosses over
            "segment_ids": segments[:-1],
        }


def pack_conversations(conversations: Iterable[Conversation], tokenizer: Tokenizer, sequence_len: int) -> Rows:
    """Render and pack conversations.

    Args:
        conversations: in any order; the same ones in the same order give the same rows.
        tokenizer: of the model.
        sequence_len: tokens the model sees at once.

    Raises:
        UserError: if a conversation is not valid.
        NothingFitsError: if none fits.
    """
    if sequence_len < 1:
        raise UserError(f"sequence-len={sequence_len} must be positive")
    dtype = np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.int32
    kept: list[tuple[np.ndarray, np.ndarray]] = []
    total = shortened = 0
    for conversation in conversations:
        rendered = render(conversation, tokenizer)
        length = whole_turns(rendered, sequence_len + 1, tokenizer)
        total += 1
        shortened += 0 < length < len(rendered.tokens)
        if length:
            kept.append((np.array(rendered.tokens[:length], dtype), np.array(rendered.supervised[:length])))
    if not kept:
        raise NothingFitsError(
            f"of {total:,} conversations none fits into sequence-len={sequence_len} with its first answer: "
            "choose a larger one, or other conversations"
        )
    rows = best_fit([len(tokens) for tokens, _ in kept], sequence_len + 1)
    kept_in_order = [kept[i] for row in rows for i in row]
    tokens_N = np.concatenate([tokens for tokens, _ in kept_in_order])
    supervised_N = np.concatenate([supervised for _, supervised in kept_in_order])
    return Rows(
        sequence_len=sequence_len,
        bos=tokenizer.bos,
        tokens_N=tokens_N,
        supervised_N=supervised_N,
        starts=np.cumsum([0, *(len(tokens) for tokens, _ in kept_in_order)]),
        row_starts=np.cumsum([0, *map(len, rows)]),
        stats=SFTStats(
            conversations=total,
            shortened=shortened,
            dropped=total - len(kept),
            tokens=len(tokens_N),
            supervised_tokens=int(supervised_N.sum()),
            rows=len(rows),
            capacity=len(rows) * (sequence_len + 1),
        ),
    )


def whole_turns(rendered: Rendered, limit: int, tokenizer: Tokenizer) -> int:
    """Tokens of the longest beginning that fits and ends with an assistant's turn; 0 if there is none."""
    if len(rendered.tokens) <= limit:
        return len(rendered.tokens)
    end = tokenizer.control["<|assistant_end|>"]
    return max((i + 1 for i, token in enumerate(rendered.tokens[:limit]) if token == end), default=0)


def best_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Numbers of the things in each row: longest first, each into the fullest row that has room for it.

    Args:
        lengths: of the things, none above the capacity.
        capacity: of a row.
    """
    rows: list[list[int]] = []
    by_room: dict[int, list[int]] = {}  # rows with that much room
    rooms: list[int] = []  # the keys, sorted
    for thing in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        place = bisect_left(rooms, lengths[thing])
        if place < len(rooms):
            room = rooms[place]
            row = by_room[room].pop()
            if not by_room[room]:
                del by_room[room], rooms[place]
        else:
            room, row = capacity, len(rows)
            rows.append([])
        rows[row].append(thing)
        left = room - lengths[thing]
        if left not in by_room:
            by_room[left] = []
            insort(rooms, left)
        by_room[left].append(row)
    return rows
