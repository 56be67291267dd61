"""The state directory: the admin key, and who holds it."""

import stat
import subprocess
import sys
from pathlib import Path

import pytest

from weft.server.cli.client import connect, local_url
from weft.server.cli.state import KEY_FILE, base_folder, keep_admin_key, locked, read_admin_key
from weft.server.config import ConfigError


def test_the_admin_key_is_generated_once_and_is_the_owners_alone(tmp_path: Path) -> None:
    assert read_admin_key(tmp_path) is None
    key, new = keep_admin_key(tmp_path)
    assert new
    assert len(key) > 30
    assert keep_admin_key(tmp_path) == (key, False)
    assert read_admin_key(tmp_path) == key
    assert stat.S_IMODE((tmp_path / KEY_FILE).stat().st_mode) == 0o600
    other = tmp_path / "other"
    other.mkdir()
    assert keep_admin_key(other)[0] != key


def test_models_have_folders_of_their_own(tmp_path: Path) -> None:
    (tmp_path / "a" / "base").mkdir(parents=True)
    (tmp_path / "b" / "base").mkdir(parents=True)
    models = [str(tmp_path / "a" / "base"), str(tmp_path / "b" / "base"), "org/base", "demo"]
    folders = [base_folder(tmp_path, model) for model in models]
    assert len(set(folders)) == len(folders)
    assert base_folder(tmp_path, str(tmp_path / "a" / ".." / "a" / "base")) == folders[0]
    assert all(folder.parent == tmp_path / "models" for folder in folders)


def test_a_folder_is_one_servers_at_a_time(tmp_path: Path) -> None:
    script = "import sys; from pathlib import Path; from weft.server.cli.state import locked\n"
    script += "with locked(Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()"
    holder = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path / "x")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdin is not None and holder.stdout is not None
    with holder:
        assert holder.stdout.readline() == "held\n"
        refusal = rf"in use by another weft server \(process {holder.pid}\); choose another --state-dir"
        with pytest.raises(ConfigError, match=refusal), locked(tmp_path / "x"):
            pass
        holder.stdin.close()
        assert holder.wait(10) == 0
    with locked(tmp_path / "x") as folder:
        assert folder == tmp_path / "x"


def test_an_unwritable_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="state_dir: cannot write to"), locked(tmp_path / "file" / "x"):
        pass


@pytest.mark.parametrize(
    ("url", "sent"),
    [
        (None, True),
        ("http://127.0.0.1:9000", True),
        ("http://localhost:9000", True),
        ("http://[::1]:9000", True),
        ("http://10.1.2.3:8000", False),
        ("http://localhost.example:8000", False),
    ],
)
def test_the_kept_key_is_sent_to_this_machine_alone(tmp_path: Path, url: str | None, sent: bool) -> None:
    key, _ = keep_admin_key(tmp_path)
    with connect(url, None, tmp_path) as server:
        assert server.headers.get("Authorization") == (f"Bearer {key}" if sent else None)
    with connect(url, "given", tmp_path) as server:
        assert server.headers["Authorization"] == "Bearer given"


@pytest.mark.parametrize(
    ("host", "url"),
    [
        ("0.0.0.0", "http://127.0.0.1:80"),
        ("::", "http://[::1]:80"),
        ("10.0.0.1", "http://10.0.0.1:80"),
        ("example.org", "http://example.org:80"),
    ],
)
def test_where_a_server_of_this_machine_is_reached(host: str, url: str) -> None:
    assert local_url(host, 80) == url
