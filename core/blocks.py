"""Hands out cache blocks, counts who refers to each, and remembers what full ones hold. Lists and integers only.

Blocks after vLLM's PagedAttention (arXiv:2309.06180): a sequence has as many as it has tokens, anywhere in the pool.
A full block is known by a hash of its tokens and of all before them, so whoever begins alike reads none of it again.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Iterable
from collections.abc import Sequence as Many

BLOCK_TOKENS = 16  #: slots of one block


def blocks_of(tokens: int) -> int:
    """How many blocks so many tokens need."""
    return -(-tokens // BLOCK_TOKENS)


def root_digest(salt: str | None) -> bytes:
    """What the first block of a text is hashed with: two salts share nothing."""
    return hashlib.blake2b((salt or "").encode(), digest_size=16).digest()


def next_digest(before: bytes, tokens: Many[int]) -> bytes:
    """Of a full block, whose text so far has the digest ``before``."""
    return hashlib.blake2b(before + array("q", tokens).tobytes(), digest_size=16).digest()


class BlockPool:
    """All cache blocks of one engine.

    Invariant: each block is referred to by at least one sequence, or idle (nobody refers to it, but its content is
    known), or empty. Idle ones are given away when no empty one is left, least recently used first.
    """

    def __init__(self, tokens: int) -> None:
        self.blocks = tokens // BLOCK_TOKENS
        self._empty = list(range(self.blocks - 1, -1, -1))
        self._idle: OrderedDict[int, None] = OrderedDict()  #: oldest first
        self._references = [0] * self.blocks
        self._known: dict[bytes, int] = {}  #: digest -> block
        self._digests: dict[int, bytes] = {}  #: block -> digest

    @property
    def tokens(self) -> int:
        """Slots altogether."""
        return self.blocks * BLOCK_TOKENS

    @property
    def free_blocks(self) -> int:
        """Blocks that nobody refers to."""
        return len(self._empty) + len(self._idle)

    def take(self, count: int) -> list[int]:
        """Give away blocks that nobody refers to; the caller has asked ``free_blocks``."""
        return [self._take() for _ in range(count)]

    def share(self, blocks: Iterable[int]) -> None:
        """One more refers to each of these."""
        for block in blocks:
            self._references[block] += 1
            self._idle.pop(block, None)

    def give(self, blocks: Iterable[int]) -> None:
        """One fewer refers to each of these. A text's last blocks come first: useless without those before."""
        for block in blocks:
            self._references[block] -= 1
            if self._references[block]:
                continue
            if block in self._digests:
                self._idle[block] = None
            else:
                self._empty.append(block)

    def is_shared(self, block: int) -> bool:
        """More than one refers to it: nobody may write there."""
        return self._references[block] > 1

    def remember(self, block: int, digest: bytes) -> None:
        """A block is full; where another one holds the same, that one stays the one that is found."""
        if digest not in self._known and block not in self._digests:
            self._known[digest] = block
            self._digests[block] = digest

    def find(self, digests: Iterable[bytes]) -> list[int]:
        """The longest run of known blocks that a text begins with; nobody refers to them by that."""
        found = []
        for digest in digests:
            block = self._known.get(digest)
            if block is None:
                break
            found.append(block)
        return found

    def _take(self) -> int:
        if self._empty:
            block = self._empty.pop()
        else:
            block, _ = self._idle.popitem(last=False)
            del self._known[self._digests.pop(block)]
        self._references[block] = 1
        return block
