"""Routing request: replica pool, adapter, session and hashed text prefixes of a request. Pure.

Texts are compared by hashes of their prefixes, not by tokens: a gateway has no tokenizer. Prefixes end at `PREFIX_LENGTHS`, which
grow by 4/3 and 3/2 in turn: a text of any length gives at most 13 hashes, and the common prefix of two texts is known to within a
third.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass

PREFIX_LENGTHS = (512, 768, 1024, 1536, 2048, 3072, 4096, 6144, 8192, 12288, 16384, 24576, 32768)
"""Lengths of hashed prefixes, in bytes. Shorter common prefixes are not worth a longer queue."""
MAX_HASHED_BYTES = PREFIX_LENGTHS[-1]
"""Bytes of a text that are hashed at most, in about 30 microseconds."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RoutingRequest:
    """The properties of a request that the router uses."""

    pool: str
    """Id of the replica pool: the base model's id, or `prefill_pool` of it."""
    adapter: str | None = None
    """Id of the adapter."""
    prefix_hashes: tuple[int, ...] = ()
    """Hashes of the text's prefixes, the i-th of `PREFIX_LENGTHS[i]` bytes; seeded with the adapter's id."""
    size: int = 0
    """Bytes of the text that were read."""
    session: int | None = None
    """Hash of the conversation's key."""
    pinned: bool = False
    """Whether only this version of the model may answer."""


def hash_key(text: str) -> int:
    """64 bits for a name, the same in every process."""
    return _to_int(hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=8))


def hash_prefixes(seed: str, parts: Iterable[bytes]) -> tuple[tuple[int, ...], int]:
    """The hashes of a text's prefixes, and the number of bytes read.

    At most `MAX_HASHED_BYTES` of the `parts` are read. Hashes under different seeds are unrelated.
    """
    hasher = hashlib.blake2b(seed.encode(errors="surrogatepass") + b"\0", digest_size=8)
    hashes: list[int] = []
    size, next_length = 0, PREFIX_LENGTHS[0]
    for part in parts:
        start = 0
        while size + len(part) - start >= next_length:
            end = start + next_length - size
            hasher.update(part[start:end])
            hashes.append(_to_int(hasher))
            size, start = next_length, end
            if size == MAX_HASHED_BYTES:
                return tuple(hashes), size
            next_length = PREFIX_LENGTHS[len(hashes)]
        hasher.update(part[start:])
        size += len(part) - start
    return tuple(hashes), size


def _to_int(hasher: hashlib.blake2b) -> int:
    return int.from_bytes(hasher.digest(), "big")
