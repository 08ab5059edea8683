"""SSH keys and pinned host keys, all under `LLMCTL_HOME/ssh`; `~/.ssh` is neither read nor written.

    ssh/id_ed25519[.pub]     the client key of this home, made once
    ssh/host_keys/KEY        the host key that node KEY shall use, made before it is launched
    ssh/known_hosts/KEY      what node KEY must show; the file belongs to one machine, so its name column is `*`

Its one error:

    KeyFileError              3: an identity file that is missing, unreadable, encrypted or no private key
"""

from __future__ import annotations

import os
import secrets
from dataclasses import dataclass
from pathlib import Path


class KeyFileError(Exception):
    """A private key that cannot serve; `hint` says what to do."""

    exit_code = 3
    code = "identity_file"

    def __init__(self, message: str, *, hint: str) -> None:
        super().__init__(message)
        self.hint = hint


@dataclass(frozen=True)
class KeyPair:
    """An ed25519 key in OpenSSH's text forms."""

    private: str
    public: str
    """`ssh-ed25519 BASE64 [COMMENT]`."""


def generate(comment: str = "") -> KeyPair:
    """A new ed25519 pair."""
    from cryptography.hazmat.primitives import serialization as form
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    key = Ed25519PrivateKey.generate()
    private = key.private_bytes(form.Encoding.PEM, form.PrivateFormat.OpenSSH, form.NoEncryption())
    public = key.public_key().public_bytes(form.Encoding.OpenSSH, form.PublicFormat.OpenSSH)
    return KeyPair(private.decode(), f"{public.decode()} {comment}".rstrip())


def client_key(home: Path) -> Path:
    """The private key that this home logs in with, 0600; made on first use, once even when several processes ask."""
    return _made_once(home / "ssh" / "id_ed25519", "llmctl")


def host_key(home: Path, key: str) -> KeyPair:
    """The host key meant for node `key`: the same at every call, so that a launch can be repeated after a crash."""
    path = _made_once(home / "ssh" / "host_keys" / key, key)
    return KeyPair(path.read_text(), public_key(path))


def public_key(identity_file: Path) -> str:
    """The public half of a private key file, without its comment. Raises KeyFileError."""
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives import serialization as form

    try:
        data = identity_file.expanduser().read_bytes()
    except OSError as error:
        reason = error.strerror or str(error)
        raise KeyFileError(
            f"{identity_file}: {reason}", hint="name a readable private key as identity_file"
        ) from error
    try:
        load = form.load_ssh_private_key if b"OPENSSH PRIVATE KEY" in data else form.load_pem_private_key
        private = load(data, password=None)
        public = private.public_key().public_bytes(form.Encoding.OpenSSH, form.PublicFormat.OpenSSH)
    except (TypeError, ValueError, UnsupportedAlgorithm) as error:
        locked = "password" in str(error).lower() or "encrypted" in str(error).lower()
        message = "is encrypted" if locked else "is not a private key that SSH can use"
        hint = (
            "llmctl runs unattended: make a key without a passphrase, or leave identity_file out to use llmctl's own"
            if locked
            else "identity_file takes the private half in OpenSSH or PEM form (no .pub, no .ppk)"
        )
        raise KeyFileError(f"{identity_file} {message}", hint=hint) from error
    return public.decode()


def known_hosts(home: Path, key: str) -> Path:
    """Where the pinned host key of node `key` stands (or will)."""
    return home / "ssh" / "known_hosts" / key


def pin(path: Path, public: str) -> None:
    """Write `public` as the one host key of the known_hosts file `path`; a link is followed, the file replaced whole.

    The name column is `*`: a machine of the user's own is another node in each attempt, and OpenSSH looks for the node's key."""
    words = public.split()
    if len(words) < 2:
        raise ValueError(f"not an SSH public key: {public!r}")
    target = path.resolve()
    target.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}")
    write_private(temporary, f"* {words[0]} {words[1]}\n")
    temporary.replace(target)


def pinned(path: Path) -> list[tuple[str, str]]:
    """(type, base64) of each host key that the known_hosts file allows; empty where nothing is pinned yet."""
    try:
        lines = path.read_text().splitlines()
    except FileNotFoundError:
        return []
    rows = [line.split() for line in lines if line.strip() and not line.startswith(("#", "@"))]
    return [(row[1], row[2]) for row in rows if len(row) >= 3]


def forget(home: Path, key: str) -> None:
    """Remove the keys of a node that is gone."""
    for path in (
        home / "ssh" / "host_keys" / key,
        home / "ssh" / "host_keys" / f"{key}.pub",
        known_hosts(home, key),
    ):
        path.unlink(missing_ok=True)


def write_private(path: Path, text: str) -> None:
    """A new file that nobody else can read, not even for a moment. Refuses to follow or overwrite what is there."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(text)


def _made_once(path: Path, comment: str) -> Path:
    """`path`, after making a key pair there if there is none. The private half decides: link(2) lets one maker win."""
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    pair = generate(comment)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    write_private(temporary, pair.private)
    try:
        os.link(temporary, path)
        path.with_name(f"{path.name}.pub").write_text(pair.public + "\n")
    except FileExistsError:
        pass
    finally:
        temporary.unlink()
    return path
