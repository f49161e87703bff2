"""Keys, seals and masks: X25519, HKDF-SHA256, ChaCha20 and ChaCha20-Poly1305 of the package ``cryptography``."""

from __future__ import annotations

import numpy as np
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from coterie.secure.fixed_point import Integers

KEY_BYTES = 32
_NONCE = bytes(12)  # every key here encrypts once


def secret_key() -> bytes:
    """A new secret key of X25519."""
    return X25519PrivateKey.generate().private_bytes_raw()


def public_key(secret: bytes) -> bytes:
    """The public half of a secret key."""
    return X25519PrivateKey.from_private_bytes(secret).public_key().public_bytes_raw()


def shared_key(secret: bytes, public: bytes, session: bytes, purpose: str, *sites: str) -> bytes:
    """The key that only the two owners can make, for this session, purpose and sites.

    Raises :class:`ValueError` for a public key that is none, or that gives the same secret with every other.
    """
    agreed = X25519PrivateKey.from_private_bytes(secret).exchange(X25519PublicKey.from_public_bytes(public))
    return derived(agreed, session, purpose, *sites)


def derived(secret: bytes, session: bytes, purpose: str, *sites: str) -> bytes:
    """A key from ``secret`` with HKDF; the digest of the session is its salt."""
    info = "\x1f".join(["coterie secure sum", purpose, *sites]).encode()
    return HKDF(SHA256(), KEY_BYTES, session, info).derive(secret)


def mask(key: bytes, length: int) -> Integers:
    """``length`` integers modulo 2^64 that nobody can tell from random ones without the key."""
    stream = Cipher(algorithms.ChaCha20(key, bytes(16)), mode=None).encryptor()
    return np.frombuffer(stream.update(bytes(8 * length)), dtype="<u8").astype(np.uint64)


def seal(key: bytes, plain: bytes) -> bytes:
    """``plain`` encrypted with a key that is used this once. What it is for is in the key."""
    return ChaCha20Poly1305(key).encrypt(_NONCE, plain, None)


def unseal(key: bytes, sealed: bytes) -> bytes | None:
    """What was sealed, None where it was not sealed with this key."""
    try:
        return ChaCha20Poly1305(key).decrypt(_NONCE, sealed, None)
    except InvalidTag:
        return None
