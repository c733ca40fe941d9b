"""Which pairs are kept for measuring."""

import hashlib

HELD_OUT = 10  # one pair in ten is never trained on


def is_held_out(key: str) -> bool:
    """Whether a pair is kept for measuring, by its key alone."""
    return hashlib.sha256(key.encode()).digest()[0] % HELD_OUT == 0
