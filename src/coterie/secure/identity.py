"""A site's registered key, and those of the sites that it adds its vectors up with: signatures that all can check."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA384

from coterie.secure.session import SecureSumError, Site

_ECDSA = ec.ECDSA(SHA384())


@dataclass(frozen=True)
class Identity:
    """``private`` is the site's own key, ``peers`` are the public keys of all sites that it knows (EC P-384)."""

    private: ec.EllipticCurvePrivateKey
    peers: Mapping[Site, ec.EllipticCurvePublicKey]

    def sign(self, data: bytes) -> str:
        """The signature under ``data``, as hexadecimal digits."""
        return self.private.sign(data, _ECDSA).hex()

    def check(self, site: Site, data: bytes, signature: str) -> None:
        """Raises :class:`SecureSumError` if ``signature`` is not the one of ``site`` under ``data``."""
        if site not in self.peers:
            raise SecureSumError(f"this site has no public key of {site}; put {site}.pub into [site] peers")
        try:
            self.peers[site].verify(bytes.fromhex(signature), data, _ECDSA)
        except (InvalidSignature, ValueError) as fault:
            raise SecureSumError(f"the signature of {site} is wrong: it is of another key, round or group") from fault


def identities(sites: Collection[Site]) -> dict[Site, Identity]:
    """New keys for sites that are simulated in this process."""
    private = {site: ec.generate_private_key(ec.SECP384R1()) for site in sorted(sites)}
    public = {site: key.public_key() for site, key in private.items()}
    return {site: Identity(key, public) for site, key in private.items()}
