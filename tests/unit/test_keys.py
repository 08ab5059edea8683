"""Keys and pinned host keys, without ssh-keygen and without ~/.ssh."""

from __future__ import annotations

import stat
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization as form
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

from provisioning import keys


def private(
    key: object, password: bytes | None = None, kind: form.PrivateFormat = form.PrivateFormat.OpenSSH
) -> bytes:
    lock = form.BestAvailableEncryption(password) if password else form.NoEncryption()
    return key.private_bytes(form.Encoding.PEM, kind, lock)


def test_client_key_is_private_and_stays(tmp_path: Path) -> None:
    path = keys.client_key(tmp_path)
    assert path == tmp_path / "ssh" / "id_ed25519"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    before = path.read_bytes()
    assert keys.client_key(tmp_path).read_bytes() == before
    assert (tmp_path / "ssh" / "id_ed25519.pub").read_text().split()[:2] == keys.public_key(path).split()


def test_one_of_many_makers_wins(tmp_path: Path) -> None:
    barrier, seen = threading.Barrier(8), []

    def make() -> None:
        barrier.wait()
        seen.append(keys.public_key(keys.client_key(tmp_path)))

    threads = [threading.Thread(target=make) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(seen) == 8
    assert len(set(seen)) == 1
    assert not list((tmp_path / "ssh").glob(".*")), "no temporary file is left"


def test_host_key_of_a_node_is_the_same_at_every_call(tmp_path: Path) -> None:
    first = keys.host_key(tmp_path, "n0")
    assert keys.host_key(tmp_path, "n0") == first
    assert keys.host_key(tmp_path, "n1") != first


def test_home_of_the_user_is_left_alone(tmp_path: Path) -> None:
    home = tmp_path / "user"
    home.mkdir()
    code = f"from pathlib import Path; from provisioning import keys; keys.client_key(Path({str(tmp_path / 'llmctl')!r}))"
    subprocess.run([sys.executable, "-c", code], env={"HOME": str(home)}, check=True)
    assert list(home.iterdir()) == []


@pytest.mark.parametrize(
    "key",
    [
        lambda: private(rsa.generate_private_key(65537, 2048), kind=form.PrivateFormat.TraditionalOpenSSL),
        lambda: private(ec.generate_private_key(ec.SECP256R1()), kind=form.PrivateFormat.PKCS8),
        lambda: private(ed25519.Ed25519PrivateKey.generate()),
    ],
    ids=["rsa", "ecdsa", "ed25519"],
)
def test_public_half_of_any_kind(tmp_path: Path, key: Callable[[], bytes]) -> None:
    (tmp_path / "key").write_bytes(key())
    assert keys.public_key(tmp_path / "key").startswith(("ssh-rsa ", "ssh-ed25519 ", "ecdsa-sha2-nistp256 "))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (lambda: private(ed25519.Ed25519PrivateKey.generate(), b"secret"), "is encrypted"),
        (
            lambda: private(
                rsa.generate_private_key(65537, 2048), b"secret", form.PrivateFormat.TraditionalOpenSSL
            ),
            "is encrypted",
        ),
        (lambda: b"ssh-ed25519 AAAA me", "is not a private key"),
        (lambda: b"\xff\xfe", "is not a private key"),
        (None, "No such file"),
    ],
)
def test_unusable_key_says_why_and_what_to_do(
    tmp_path: Path, content: Callable[[], bytes] | None, said: str
) -> None:
    if content is not None:
        (tmp_path / "key").write_bytes(content())
    with pytest.raises(keys.KeyFileError, match=said) as caught:
        keys.public_key(tmp_path / "key")
    assert caught.value.hint
    assert caught.value.exit_code == 3
    assert b"secret" not in str(caught.value).encode()


def test_pin_replaces_and_follows_a_link(tmp_path: Path) -> None:
    path, shared = keys.known_hosts(tmp_path, "n0"), keys.known_hosts(tmp_path, "ssh-host-22")
    assert keys.pinned(path) == []
    path.parent.mkdir(parents=True)
    path.symlink_to(shared.name)
    first, second = keys.generate().public, keys.generate("comment").public
    keys.pin(path, first)
    keys.pin(path, second)
    assert keys.pinned(shared) == [tuple(second.split()[:2])]
    assert path.is_symlink()
    assert stat.S_IMODE(shared.stat().st_mode) == 0o600


def test_pin_takes_no_half_key(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not an SSH public key"):
        keys.pin(tmp_path / "known", "ssh-ed25519")


def test_forget(tmp_path: Path) -> None:
    keys.pin(keys.known_hosts(tmp_path, "n0"), keys.host_key(tmp_path, "n0").public)
    keys.forget(tmp_path, "n0")
    keys.forget(tmp_path, "n0")
    assert [path for path in (tmp_path / "ssh").rglob("*") if path.is_file()] == []
