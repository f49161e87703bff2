"""Keys: what is made, who can read it, what is refused; a real TLS handshake against the certificate."""

from __future__ import annotations

import base64
import socket
import ssl
import stat
import threading
from contextlib import suppress
from pathlib import Path

import pytest

from coterie.deploy.keys import add_site, check_private, init_keys, key_digest, known_sites, load_public, site_key
from coterie.deploy.superlink import check_server_keys
from coterie.types import CoterieError


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    init_keys(tmp_path / "keys", ["north", "south"], ["fed.example.org", "10.0.0.7"])
    return tmp_path / "keys"


def test_private_files_are_the_users_alone(keys: Path) -> None:
    private = [keys / "ca.key", keys / "server.key", keys / "sites" / "north", keys / "sites" / "south"]
    assert [stat.S_IMODE(path.stat().st_mode) for path in private] == [0o600] * 4
    assert list(known_sites(keys)) == ["north", "south"]
    assert check_private(keys / "sites" / "north") == key_digest(keys / "sites" / "north.pub")
    assert load_public(keys / "sites" / "north.pub").curve.name == "secp384r1"
    check_server_keys(keys)
    (keys / "server.key").chmod(0o644)
    with pytest.raises(CoterieError, match="chmod 600"):
        check_server_keys(keys)


def handshake(keys: Path, name: str) -> str | None:
    """The TLS version that a client agrees on who calls the server ``name`` and trusts the CA alone."""
    server = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    server.load_cert_chain(keys / "server.crt", keys / "server.key")
    here, there = socket.socketpair()

    def serve() -> None:
        try:
            with server.wrap_socket(there, server_side=True) as link:
                link.recv(1)
        except (ssl.SSLError, OSError):
            there.close()

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        with ssl.create_default_context(cafile=keys / "ca.crt").wrap_socket(here, server_hostname=name) as link:
            link.send(b"x")
            return link.version()
    finally:
        here.close()
        thread.join()


@pytest.mark.parametrize("name", ["fed.example.org", "10.0.0.7", "localhost", "127.0.0.1"])
def test_the_certificate_is_for_the_addresses_given_and_this_machine(keys: Path, name: str) -> None:
    assert handshake(keys, name) == "TLSv1.3"


def test_another_address_is_refused(keys: Path) -> None:
    with pytest.raises(ssl.SSLCertVerificationError):
        handshake(keys, "evil.example.org")


def test_nothing_is_written_over(keys: Path) -> None:
    with pytest.raises(CoterieError, match="is not empty"):
        init_keys(keys, [], [])
    for name in ("north", "North"):  # some disks would keep both in one file
        with pytest.raises(CoterieError, match="north already has a key"):
            add_site(keys, name)
    with pytest.raises(CoterieError, match="already exists"):
        site_key(keys / "sites" / "north")


def test_a_site_can_make_its_own_key(keys: Path, tmp_path: Path) -> None:
    site_key(tmp_path / "mine")
    add_site(keys, "west", tmp_path / "mine.pub")
    assert key_digest(known_sites(keys)["west"]) == check_private(tmp_path / "mine")
    assert not (keys / "sites" / "west").exists()
    with pytest.raises(CoterieError, match="is not a public key"):
        add_site(keys, "east", tmp_path / "mine")
    with pytest.raises(CoterieError, match="not a valid site id"):
        add_site(keys, "../east")
    (tmp_path / "mine").chmod(0o640)
    with pytest.raises(CoterieError, match="other users can read"):
        check_private(tmp_path / "mine")


def test_a_damaged_key_is_named_wherever_the_damage_is(keys: Path, tmp_path: Path) -> None:
    whole = (keys / "sites" / "north").read_bytes()
    head, _, rest = whole.partition(b"\n")
    blob = base64.b64decode(rest.rpartition(b"-----END")[0])
    cases = [whole[:-60], whole.replace(b"\n", b"", 1)]
    for at in range(len(blob)):  # a byte of every part: lengths, names, the curve's point
        spoiled = blob[:at] + bytes([blob[at] ^ 0x81]) + blob[at + 1 :]
        cases.append(head + b"\n" + base64.encodebytes(spoiled) + b"-----END OPENSSH PRIVATE KEY-----\n")
    path, errors = tmp_path / "key", []
    for case in cases:
        path.write_bytes(case)
        path.chmod(0o600)
        with suppress(CoterieError):  # a byte of the comment does no harm
            check_private(path)
            continue
        errors.append(case)
    assert len(errors) > len(cases) // 2


def test_without_keys_the_server_says_what_to_type(tmp_path: Path) -> None:
    with pytest.raises(CoterieError, match=r"keys init .* or use --insecure"):
        check_server_keys(tmp_path / "keys")
