"""Random numbers of a tensor by its name: new heads and adapters start alike on every machine. No torch."""

from hashlib import blake2b

import numpy as np


def seeded_generator(seed: int, name: str) -> np.random.Generator:
    """A random generator that depends on the seed and the tensor's name alone."""
    key = np.frombuffer(blake2b(f"hosl/init/{seed}/{name}".encode(), digest_size=16).digest(), dtype="<u8")
    return np.random.Generator(np.random.Philox(key=key))
