"""Turns an adapter's source into a local folder: a path, a Hugging Face repository, an object store."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from types import MappingProxyType
from urllib.parse import unquote

import fsspec  # type: ignore[import-untyped]
from huggingface_hub import HfApi, snapshot_download

from weft.adapters.config_fields import show
from weft.adapters.errors import AdapterError, AdapterFormatError, AdapterSourceError, AdapterTooLarge
from weft.adapters.files import (
    CHAIN,
    CONFIG,
    DIFFERENCES,
    FILES,
    MODEL_CONFIG,
    MODEL_WEIGHTS,
    ROUTER,
    SETUP,
    has_weights,
    missing_weights,
)

STORES: Mapping[str, str] = MappingProxyType(
    {"s3": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "az": "adlfs", "abfs": "adlfs", "abfss": "adlfs"}
)
"""Schemes of object stores, and the package that fsspec needs for each. http is none: it could reach any address."""

MAX_LENGTH = 4096
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.\-]*)://(.*)", re.DOTALL)
_HUB = re.compile(r"(?P<repo>[\w.\-]+/[\w.\-]+)(?:@(?P<revision>[^/@]+))?(?:/(?P<folder>[^@]+))?")
_COMMIT = re.compile(r"[0-9a-f]{40}")


def resolve(source: str, *, roots: Sequence[Path], cache: Path) -> Path:
    """The local folder that holds the adapter named by ``source``.

    Args:
        source: a path, absolute or relative to a root or the working directory; ``file:///path``;
            ``hf://org/repo[@revision][/folder]``; or ``s3://``, ``gs://``, ``az://``, ``abfs://`` (through fsspec).
        roots: local sources must lie inside one of these, links followed.
        cache: downloads go here, into one folder per content; the caller may delete it once it has copied them.

    Raises:
        AdapterSourceError: the source is malformed, not allowed, or cannot be fetched.
        AdapterFormatError, AdapterTooLarge: what is there is no adapter.
    """
    if not source or len(source) > MAX_LENGTH or not unquote(source).isprintable():
        raise _refused(source, f"must be a path or URL of at most {MAX_LENGTH} printable characters")
    match = _SCHEME.fullmatch(source)
    if match is None:
        return _local(source, source, roots)
    scheme, rest = match[1].lower(), match[2]
    if scheme == "file":
        path = unquote(rest.removeprefix("localhost"))
        if not path.startswith("/"):
            raise _refused(source, "names another host; use file:///path")
        return _local(source, path, roots)
    if scheme == "hf":
        return _hub(source, rest, cache)
    if scheme in STORES:
        return _object_store(source, STORES[scheme], cache)
    allowed = ", ".join(f"{name}://" for name in ("hf", "file", *STORES))
    raise _refused(source, f"has a scheme that is not allowed; use a local path or {allowed}")


def _local(source: str, path: str, roots: Sequence[Path]) -> Path:
    if not roots:
        raise _refused(source, "is a local path, and no --adapter-root allows any")
    allowed = dict.fromkeys(Path(os.path.realpath(root)) for root in roots)
    # realpath follows links without asking whether the end exists: what lies outside the roots is not told apart. An
    # absolute path is the same from everywhere, and there may be as many roots as adapters.
    named = dict.fromkeys(base / path for base in (Path.cwd(), *allowed))
    candidates = [Path(os.path.realpath(folder)) for folder in named]
    inside = [folder for folder in candidates if not allowed.keys().isdisjoint((folder, *folder.parents))]
    if not inside:
        raise _refused(source, "is not inside an allowed folder (--adapter-root)")
    found = next((folder for folder in inside if os.path.isdir(folder)), None)
    if found is None:
        raise _refused(source, "is not a folder" if any(map(os.path.exists, inside)) else "does not exist")
    return found


def _hub(source: str, rest: str, cache: Path) -> Path:
    match = _HUB.fullmatch(rest)
    folder = PurePosixPath(match["folder"] or ".") if match else PurePosixPath()
    if match is None or folder.is_absolute() or ".." in folder.parts:
        raise _refused(source, "must look like hf://org/repo, hf://org/repo@revision or hf://org/repo@revision/folder")
    repo, revision = match["repo"], unquote(match["revision"] or "main")
    if _COMMIT.fullmatch(revision) and (known := _hub_folder(cache, repo, revision, folder)).is_dir():
        return known
    try:
        info = HfApi().model_info(repo, revision=revision, files_metadata=True)
    except Exception as error:  # the hub's client raises its own, its transport's and the standard library's errors
        raise _unreachable(source, error) from error
    sizes = {
        file.rfilename.removeprefix(f"{folder}/"): file.size or 0
        for file in info.siblings or ()
        if PurePosixPath(file.rfilename).parent == folder
    }
    _check_listing(source, sizes)
    target = _hub_folder(cache, repo, info.sha or revision, folder)

    def download(into: Path) -> None:
        # Real files, not the links of the hub's own cache, which the store would refuse.
        patterns = [str(folder / name) for name in FILES]
        snapshot_download(repo, revision=info.sha, allow_patterns=patterns, local_dir=into / "repo")
        for name in FILES.keys() & sizes.keys():
            (into / "repo" / folder / name).rename(into / name)
        shutil.rmtree(into / "repo")

    return _once(source, target, download)


def _hub_folder(cache: Path, repo: str, commit: str, folder: PurePosixPath) -> Path:
    return cache / "hub" / _key(repo, commit, str(folder))


def _object_store(source: str, package: str, cache: Path) -> Path:
    if "::" in source:
        raise _refused(source, "chains file systems with '::', which is not allowed")
    try:
        files, root = fsspec.core.url_to_fs(source)
        files.invalidate_cache(root)
        listing = {PurePosixPath(str(info["name"])).name: info for info in files.ls(root, detail=True)}
    except ImportError as error:
        raise _refused(source, f"needs the package {package}: pip install {package}") from error
    except Exception as error:  # every backend raises its own errors
        raise _unreachable(source, error) from error
    sizes = {name: int(info.get("size") or 0) for name, info in listing.items() if info.get("type") == "file"}
    _check_listing(source, sizes)
    names = sorted(FILES.keys() & sizes.keys())
    stamps = [f"{name} {files.ukey(listing[name]['name'])}" for name in names]

    def download(into: Path) -> None:
        for name in names:
            files.get_file(listing[name]["name"], str(into / name))

    return _once(source, cache / "objects" / _key(source, *stamps), download)


def _check_listing(source: str, sizes: Mapping[str, int]) -> None:
    """Refuse before the download what would be refused after it."""
    if SETUP in sizes or CHAIN in sizes or any(name.startswith(f"{ROUTER}/") for name in sizes):
        raise AdapterSourceError(f"{show(source)} has sub-folders; download it and give its folder", param="source")
    if MODEL_CONFIG in sizes and CONFIG not in sizes and any(name in sizes for name in MODEL_WEIGHTS):
        raise AdapterSourceError(f"{show(source)} is a model; download it and give its folder", param="source")
    alone = DIFFERENCES in sizes and CONFIG not in sizes
    if CONFIG not in sizes and not alone:
        raise AdapterFormatError(f"{show(source)} holds no {CONFIG}", param="source")
    if not has_weights(sizes) and not alone:
        raise AdapterFormatError(f"{show(source)}: {missing_weights(set(sizes))}", param="source")
    for name in FILES.keys() & sizes.keys():
        if sizes[name] > FILES[name]:
            raise AdapterTooLarge(f"{name} has {sizes[name]} bytes; the limit is {FILES[name]}", param="source")


def _once(source: str, target: Path, download: Callable[[Path], None]) -> Path:
    """``target``, filled by ``download`` if it is not there. It appears complete or not at all."""
    if target.is_dir():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    incoming = Path(tempfile.mkdtemp(prefix=".incoming-", dir=target.parent))
    try:
        download(incoming)
        incoming.rename(target)
    except Exception as error:  # as above; a full disk and a broken connection alike leave nothing behind
        if target.is_dir():
            return target  # another download of the same content was first
        raise error if isinstance(error, AdapterError) else _unreachable(source, error) from error
    finally:
        shutil.rmtree(incoming, ignore_errors=True)
    return target


def _key(*parts: str) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]


def _refused(source: str, why: str) -> AdapterSourceError:
    return AdapterSourceError(f"source {show(source)} {why}", param="source")


def _unreachable(source: str, error: Exception) -> AdapterSourceError:
    return _refused(source, f"cannot be fetched: {type(error).__name__}: {show(str(error))}")
