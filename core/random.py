"""Random numbers derived from (seed, purpose, counter), so that nothing holds random state.

The same words give the same numbers on every machine and in every process, whatever was drawn before.
"""

import hashlib

import numpy as np


def derive(seed: int, *purpose: str | int) -> int:
    """A 64-bit seed for one purpose, e.g. `derive(seed, "partition")` or `derive(seed, client, "speed", 3)`."""
    words = "\x1f".join([str(seed), *map(str, purpose)])
    return int.from_bytes(hashlib.blake2b(words.encode(), digest_size=8).digest(), "big")


def generator(seed: int, *purpose: str | int) -> np.random.Generator:
    """A NumPy generator for one purpose (Philox: counter-based, the same stream everywhere)."""
    return np.random.Generator(np.random.Philox(derive(seed, *purpose)))


def token(seed: int, *purpose: str | int) -> str:
    """128 bits as 32 hex digits; not to be guessed by who does not know the seed."""
    words = "\x1f".join([str(seed), *map(str, purpose)])
    return hashlib.blake2b(words.encode(), digest_size=16, person=b"fedge-token").hexdigest()
