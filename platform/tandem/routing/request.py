"""What the router knows of a request: whom it is for, how its text begins, and which conversation it belongs to. Pure.

Text is compared by hashes of its beginnings, not by tokens: a gateway has no tokenizer, and needs none to see that two
prompts begin alike. The beginnings end at `PREFIX_LENGTHS`, which grow by 4/3 and 3/2 in turn, so that a text of any length is a
handful of hashes and what two texts share is known to within a third.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass

PREFIX_LENGTHS = (512, 768, 1024, 1536, 2048, 3072, 4096, 6144, 8192, 12288, 16384, 24576, 32768)
"""Where the beginnings of a text end, in bytes. What is shorter than the first is not worth a detour."""
MAX_HASHED_BYTES = PREFIX_LENGTHS[-1]
"""No more of a text is ever hashed: about 30 microseconds."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RoutingRequest:
    """A request as the router sees it."""

    pool: str
    """Id of the replica pool: the base model's id, or `prefill_pool` of it."""
    adapter: str | None = None
    """Id of the adapter."""
    prefix_hashes: tuple[int, ...] = ()
    """Hashes of the text's beginnings, the i-th up to `BOUNDS[i]`; of the same text for another adapter they are others."""
    size: int = 0
    """Bytes of the text, as far as it was looked at."""
    session: int | None = None
    """Hash of the conversation's key."""
    pinned: bool = False
    """Whether it is for this version of the model and no other."""


def hash_key(text: str) -> int:
    """64 bits for a name, the same in every process."""
    return _to_int(hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=8))


def hash_prefixes(seed: str, parts: Iterable[bytes]) -> tuple[tuple[int, ...], int]:
    """The hashes of a text's prefixes, and the number of bytes read.

    At most `MAX_HASHED_BYTES` of the `parts` are read. Hashes under different seeds are unrelated.
    """
    hasher = hashlib.blake2b(seed.encode(errors="surrogatepass") + b"\0", digest_size=8)
    found: list[int] = []
    size, bound = 0, PREFIX_LENGTHS[0]
    for part in parts:
        begin = 0
        while size + len(part) - begin >= bound:
            end = begin + bound - size
            hasher.update(part[begin:end])
            found.append(_to_int(hasher))
            size, begin = bound, end
            if size == MAX_HASHED_BYTES:
                return tuple(found), size
            bound = PREFIX_LENGTHS[len(found)]
        hasher.update(part[begin:])
        size += len(part) - begin
    return tuple(found), size


def _to_int(hasher: hashlib.blake2b) -> int:
    return int.from_bytes(hasher.digest(), "big")
