"""Which documents are held out: a hash of the text decides, so that equal documents never straddle the split."""

import hashlib
from dataclasses import dataclass

_KEYS = 2**63
"""Keys are below this, so that they fit int64."""


def document_key(text: str) -> int:
    """A number in [0, 2**63) that depends on the text alone.

    Raises:
        UnicodeEncodeError: the text holds a lone surrogate, which UTF-8 cannot express.
    """
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest()) >> 1


@dataclass(frozen=True)
class Split:
    """The rule of one corpus."""

    limit: int
    """Documents whose key is below it are held out."""
    cut_share: float = 0.0
    """Above 0 where the corpus is one document: its last part of about this share is held out."""

    def part(self, text: str, key: int, *, validation: bool) -> str | None:
        """What of this document belongs to the validation (or the training) split; None if nothing does."""
        if not self.cut_share:
            return text if (key < self.limit) == validation else None
        cut = int(len(text) * (1 - self.cut_share))
        # A cut between lines, unless lines are so long that it would move far.
        line = text.rfind("\n", 0, cut) + 1
        cut = line if line > cut // 2 else cut
        return (text[cut:] if validation else text[:cut]) or None


def plan_split(share: float) -> Split:
    """The rule for a corpus of many documents."""
    return Split(limit=int(share * _KEYS))


def settle_split(share: float, *, least_key: int, greatest_key: int) -> Split:
    """The rule once the corpus is known: with few documents the share's limit may leave a side empty.

    Then the document nearest to the limit changes side, with its duplicates; a corpus of a single document (repeated
    or not) is cut in two. A share of 0 holds out nothing.
    """
    split = plan_split(share)
    if share == 0:
        return split
    if least_key == greatest_key:
        return Split(limit=0, cut_share=share)
    return Split(limit=min(max(split.limit, least_key + 1), greatest_key))
