"""Headers and stream comment that carry a request's labels to a replica, and its token counts back to the gateway. Pure."""

from __future__ import annotations

from tandem.engine.usage import TokenCounts

LABELS_HEADER = "x-tandem-usage-labels"
"""Request header, with `UsageLabels`: the replica charges the request to them."""
COUNTS_HEADER = "x-tandem-usage"
"""Response header of answers that are not streams: tokens of the prompt and of the answer."""
COMMENT_END = b" tandem-usage\n\n"
"""End of the comment, in the format of server-sent events, after the last event of a stream."""
LONGEST_COMMENT = 80
"""Bytes that the comment has at most."""


def counts_to_header(counts: TokenCounts) -> bytes:
    """The value of COUNTS_HEADER."""
    return b"%d %d" % counts


def counts_from_header(value: str | None) -> TokenCounts | None:
    """The counts in a header; None for anything else."""
    numbers = (value or "").split(" ")
    if len(numbers) == 2 and all(number.isascii() and number.isdecimal() for number in numbers):
        return TokenCounts(int(numbers[0]), int(numbers[1]))
    return None


def counts_to_comment(counts: TokenCounts) -> bytes:
    """The comment that ends a stream."""
    return b": " + counts_to_header(counts) + COMMENT_END


def split_comment(chunk: bytes) -> tuple[bytes, TokenCounts | None]:
    """The last chunk of a stream without its comment, and the counts in that; chunks without a comment stay as they are."""
    if not chunk.endswith(COMMENT_END):
        return chunk, None
    start = chunk.rfind(b": ", 0, len(chunk) - len(COMMENT_END))
    counts = counts_from_header(chunk[start + 2 : -len(COMMENT_END)].decode("latin-1"))
    return (chunk, None) if start < 0 or counts is None else (chunk[:start], counts)


class StreamCounts:
    """The counts in a stream that comes in chunks, however it is cut."""

    def __init__(self) -> None:
        self.counts: TokenCounts | None = None
        """None: the comment has not come."""
        self._partial_comment = b""
        """A line at the end of a chunk that may become the comment."""
        self._line_ended = True

    def without_comment(self, chunk: bytes) -> bytes:
        """The next chunk as the client gets it. A comment that is not whole yet is held back; at the end of a stream it is lost,
        as clients ignore comments.
        """
        chunk, self._partial_comment = self._partial_comment + chunk if self._partial_comment else chunk, b""
        stripped, counts = split_comment(chunk)
        if counts is not None:
            self.counts, self._line_ended = counts, True
            return stripped
        line_start = chunk.rfind(b"\n", 0, max(0, len(chunk) - 1)) + 1
        if (
            chunk.startswith(b":", line_start)
            and (line_start or self._line_ended)
            and len(chunk) - line_start < LONGEST_COMMENT
        ):
            chunk, self._partial_comment = chunk[:line_start], chunk[line_start:]
        if chunk:
            self._line_ended = chunk.endswith(b"\n")
        return chunk
