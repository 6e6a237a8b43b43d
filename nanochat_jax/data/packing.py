"""Documents of any length into rows of one length, by best fit, without throwing text away."""

from bisect import bisect_right, insort
from collections.abc import Iterable, Iterator

import numpy as np

BUFFER_DOCUMENTS = 1000
BUFFER_TOKENS = 1 << 23  # bounds the memory where documents are long


def pack(
    documents: Iterable[np.ndarray], record_len: int, bos: int, buffer_documents: int = BUFFER_DOCUMENTS
) -> Iterator[np.ndarray]:
    """Pack tokenised documents into records; every token is in exactly one record, and never first in it.

    A record takes the longest waiting document that fits, again and again. When none fits, the longest of all is
    cut to fill the record and its rest waits on, to begin behind a bos of its own: however long a document is, it
    cannot clog the buffer, and only the last record can come out short.

    Args:
        documents: token ids without bos, integer (length,) each.
        record_len: tokens in a record, that is, sequence length + 1.
        bos: put before every document and before every rest of one.
        buffer_documents: how many documents to choose from.

    Yields:
        int32 (record_len,) each; the last one may be shorter, which is the caller's to fill or to drop.
    """
    arriving = iter(documents)
    waiting: list[tuple[int, int, np.ndarray]] = []  # (length, arrival, tokens), sorted; arrivals settle ties
    arrivals = waiting_tokens = 0
    while True:
        record = np.full(record_len, bos, np.int32)
        used = 0
        while used < record_len:
            while len(waiting) < buffer_documents and waiting_tokens < BUFFER_TOKENS:
                if (document := next(arriving, None)) is None:
                    break
                insort(waiting, (len(document), arrivals, document))
                arrivals += 1
                waiting_tokens += len(document)
            if not waiting:
                break
            room = record_len - used - 1  # behind the bos
            fitting = bisect_right(waiting, room, key=lambda entry: entry[0])
            length, arrival, tokens = waiting.pop(fitting - 1)  # with none that fits: the last, which is the longest
            if length > room:
                insort(waiting, (length - room, arrival, tokens[room:]))
            taken = min(length, room)
            waiting_tokens -= taken
            record[used + 1 : used + 1 + taken] = tokens[:taken]
            used += 1 + taken
        if used:
            yield record[:used]
        if used < record_len:
            return
