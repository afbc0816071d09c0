"""Verification of a folder: size and checksum of every file, in a manifest that is written last."""

import hashlib
import json
from pathlib import Path

from flip_hf.console.files import sync

MANIFEST = "manifest.json"


def _digest(path: Path) -> str:
    """Returns the BLAKE2b digest of a file of any size, which is as fast as reading from most disks."""
    digest = hashlib.blake2b()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / MANIFEST)


def write_manifest(folder: Path) -> None:
    """Syncs every file of a folder to the disk and lists it; call when all of them are written."""
    listed = {}
    for path in _files(folder):
        sync(path)
        listed[path.relative_to(folder).as_posix()] = {"size": path.stat().st_size, "blake2b": _digest(path)}
    manifest = folder / MANIFEST
    manifest.write_text(json.dumps({"files": listed}, indent=1) + "\n", encoding="utf-8")
    sync(manifest)
    for inner in folder.rglob("*"):
        if inner.is_dir():
            sync(inner)
    sync(folder)


def check_manifest(folder: Path) -> list[str]:
    """Lists what is wrong with a folder, file by file; empty if it is as it was written."""
    try:
        listed = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
        wanted = [(folder / name, entry["size"], entry["blake2b"]) for name, entry in listed.items()]
    except FileNotFoundError:
        return [f"{MANIFEST} is missing"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return [f"{MANIFEST} cannot be read"]
    return [problem for path, size, digest in wanted if (problem := _problem(folder, path, size, digest))]


def _problem(folder: Path, path: Path, size: int, digest: str) -> str | None:
    name = path.relative_to(folder).as_posix()
    try:
        found = path.stat().st_size
        if found != size:
            return f"{name} has {found:,} bytes instead of {size:,}"
        return None if _digest(path) == digest else f"{name} is damaged (wrong checksum)"
    except FileNotFoundError:
        return f"{name} is missing"
    except OSError as error:
        return f"{name} cannot be read ({error.strerror})"
