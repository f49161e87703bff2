"""Keys of a federation: a CA, the server's certificate, and a key pair per site (EC P-384, as Flower requires).

``keys/ca.key`` signs the server's certificate and has no other use: keep it off the server. A site gets ``ca.crt`` and
its own private key, or makes the key itself and gives you the public half.
"""

from __future__ import annotations

import datetime
import hashlib
import ipaddress
import os
from collections.abc import Sequence
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from coterie.data.clients import SAFE_ID
from coterie.types import ClientId, CoterieError

_LOCAL = ("127.0.0.1", "localhost")  # where the server's own processes reach it
_CA_DAYS, _SERVER_DAYS = 3650, 825
# What cryptography raises for a damaged key, depending on where the damage is; TypeError for an encrypted one.
_KEY_FAULTS = (OSError, ValueError, TypeError, NotImplementedError, UnsupportedAlgorithm)


def init_keys(folder: Path, sites: Sequence[ClientId], hosts: Sequence[str]) -> None:
    """Make a CA, a server certificate for ``hosts`` and a key pair for each of ``sites`` in the new ``folder``.

    Raises :class:`CoterieError` if ``folder`` is not empty: no key is ever overwritten.
    """
    if folder.exists() and any(folder.iterdir()):
        raise CoterieError(f"{folder} is not empty; name another folder, or add a site with `coterie keys add`")
    for site in sites:
        _check_id(site)
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    ca_key = ec.generate_private_key(ec.SECP384R1())
    ca = _certificate("Coterie federation CA", ca_key, ca_key)
    _secret(folder / "ca.key", _pem(ca_key))
    (folder / "ca.crt").write_bytes(ca.public_bytes(Encoding.PEM))
    key = ec.generate_private_key(ec.SECP384R1())
    server = _certificate("Coterie server", key, ca_key, ca, hosts)
    _secret(folder / "server.key", _pem(key))
    (folder / "server.crt").write_bytes(server.public_bytes(Encoding.PEM))
    for site in sites:
        add_site(folder, site)


def add_site(folder: Path, site: ClientId, public: Path | None = None) -> None:
    """Add the public key of one more site; without one, make a key pair for it."""
    _check_id(site)
    if not (folder / "ca.crt").is_file():
        raise CoterieError(f"{folder} holds no keys; make them with `coterie keys init {folder}`")
    sites = folder / "sites"
    sites.mkdir(exist_ok=True, mode=0o700)
    alike = next((path.stem for path in sites.glob("*.pub") if path.stem.lower() == site.lower()), None)
    if alike is not None:  # some disks would keep both in one file
        raise CoterieError(f"{alike} already has a key in {sites}; to replace it, remove {alike}.pub first")
    if public is None:
        site_key(sites / site)
    else:
        load_public(public)
        (sites / f"{site}.pub").write_bytes(public.read_bytes())


def site_key(path: Path) -> None:
    """Make a key pair: ``path`` and ``path.pub``."""
    if path.exists():
        raise CoterieError(f"{path} already exists; name another file")
    key = ec.generate_private_key(ec.SECP384R1())
    _secret(path, key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()))
    path.with_name(f"{path.name}.pub").write_bytes(
        key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)
    )


def known_sites(folder: Path) -> dict[ClientId, Path]:
    """The public key file of every site, in ``folder`` or in its folder ``sites``."""
    inner = folder / "sites"
    return {path.stem: path for path in sorted((inner if inner.is_dir() else folder).glob("*.pub"))}


def key_digest(public: Path) -> str:
    """SHA-256 of a public key in the form in which Flower gives it to the server."""
    pem = load_public(public).public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    return hashlib.sha256(pem).hexdigest()


def load_public(path: Path) -> ec.EllipticCurvePublicKey:
    """The public key in ``path``. Raises :class:`CoterieError` for anything else."""
    try:
        key = serialization.load_ssh_public_key(path.read_bytes())
    except _KEY_FAULTS as fault:
        raise CoterieError(f"{path} is not a public key, or a damaged one: {fault}") from fault
    if not isinstance(key, ec.EllipticCurvePublicKey):
        raise CoterieError(f"{path} is not an elliptic curve key; make one with `coterie keys site`")
    return key


def check_private(path: Path) -> str:
    """The digest of the private key in ``path``. Raises as :func:`load_private`."""
    pem = load_private(path).public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    return hashlib.sha256(pem).hexdigest()


def load_private(path: Path) -> ec.EllipticCurvePrivateKey:
    """The private key in ``path``. Raises :class:`CoterieError` if it is not one, or if other users can read it."""
    try:
        key = serialization.load_ssh_private_key(path.read_bytes(), None)
    except _KEY_FAULTS as fault:
        raise CoterieError(f"{path} is not a private key, or a damaged or encrypted one: {fault}") from fault
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise CoterieError(f"{path} is not an elliptic curve key; make one with `coterie keys site`")
    if path.stat().st_mode & 0o077:
        raise CoterieError(f"other users can read the private key {path}; run `chmod 600 {path}`")
    return key


def _check_id(site: ClientId) -> None:
    if not SAFE_ID.fullmatch(site):
        raise CoterieError(f"{site!r} is not a valid site id; use letters, digits, '.', '_' and '-'")


def _certificate(
    name: str,
    key: ec.EllipticCurvePrivateKey,
    signer: ec.EllipticCurvePrivateKey,
    ca: x509.Certificate | None = None,
    hosts: Sequence[str] = (),
) -> x509.Certificate:
    """A certificate for ``key``: without ``ca`` that of the CA itself, else that of a server at ``hosts``."""
    now, subject = datetime.datetime.now(datetime.UTC), x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    certificate = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(ca.subject if ca else subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(minutes=5))
        .not_valid_after(now + datetime.timedelta(days=_SERVER_DAYS if ca else _CA_DAYS))
        .add_extension(x509.BasicConstraints(ca=ca is None, path_length=None if ca else 0), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key()), critical=False)
        .add_extension(_usage(ca is None), critical=True)
    )
    if ca:
        names = [_general(host) for host in dict.fromkeys([*hosts, *_LOCAL])]
        certificate = certificate.add_extension(x509.SubjectAlternativeName(names), critical=False)
        usage = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH])
        certificate = certificate.add_extension(usage, critical=False)
    return certificate.sign(signer, hashes.SHA384())


def _usage(of_ca: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not of_ca,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=of_ca,
        crl_sign=of_ca,
        encipher_only=False,
        decipher_only=False,
    )


def _general(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def _secret(path: Path, data: bytes) -> None:
    """Write a new file that only this user can read."""
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(data)
