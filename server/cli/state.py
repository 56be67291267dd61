"""The state directory: the admin key, and a folder per base model that one server at a time uses."""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from weft.server.config import ConfigError

KEY_FILE = "admin.key"


def read_admin_key(state_dir: Path) -> str | None:
    """The kept key, or None where no server has generated one."""
    try:
        return (state_dir / KEY_FILE).read_text().strip() or None
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ConfigError(f"state_dir: cannot read the admin key: {error}") from error


def keep_admin_key(state_dir: Path) -> tuple[str, bool]:
    """The kept key, generated if there is none; whether it is new. The file is the owner's alone (mode 600)."""
    kept = read_admin_key(state_dir)
    if kept is not None:
        return kept, False
    key = f"weft-{secrets.token_urlsafe(24)}"
    # Created with its mode, so that there is no moment in which others can read it.
    with open(os.open(state_dir / KEY_FILE, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
        file.write(key + "\n")
    return key, True


def base_folder(state_dir: Path, model: str) -> Path:
    """The folder for one base model, so that servers of different models can share a state directory."""
    local = Path(model)
    identity = str(local.resolve()) if local.exists() else model
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", Path(identity).name) or "model"
    return state_dir / "models" / f"{name}-{hashlib.sha256(identity.encode()).hexdigest()[:8]}"


@contextmanager
def locked(folder: Path) -> Iterator[Path]:
    """Make ``folder`` and hold it for this process alone.

    Raises:
        ConfigError: it cannot be made, or another process holds it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        lock = (folder / "lock").open("a+")
    except OSError as error:
        raise ConfigError(f"state_dir: cannot write to {folder}: {error.strerror}") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            holder = lock.read().strip() or "unknown"
            raise ConfigError(
                f"state_dir: {folder} is in use by another weft server (process {holder}); choose another --state-dir"
            ) from None
        lock.truncate(0)
        lock.write(f"{os.getpid()}\n")
        lock.flush()
        yield folder
