"""
Podman: the list of containers in its storage, and its own database.

`overlay-containers/containers.json` in the storage (written when the container is created) has the name and the
image. Labels and the newest name (`podman rename`) are in libpod's database: SQLite since Podman 5, bolt before,
where a container's configuration is JSON under ctr/<id>/config. Both are only read, and without a lock.
"""

from __future__ import annotations

import mmap
import os
import sqlite3
from contextlib import closing
from typing import Any

from procwatch.enrich import bolt
from procwatch.enrich.containers import ContainerRef
from procwatch.enrich.runtimes import Found, Roots, strings
from procwatch.enrich.tree import Tree, decode, dig, text
from procwatch.errors import DecodeError

_DRIVERS = ("overlay", "vfs", "btrfs", "zfs")


def look(ref: ContainerRef, tree: Tree, roots: Roots) -> Found | None:
    """
    See the package.
    """
    for root in roots.containers:
        stored = stored_container(ref.id, tree, root)
        config = _config(ref.id, tree, root)
        if stored is None and config is None:
            continue
        about = decode(text(stored, "metadata"))
        names = dig(stored, "names")
        return Found(
            runtime="podman",
            name=text(config, "name") or text(about, "name") or (text(names[0]) if names else None),
            image=text(config, "rootfsImageName") or text(about, "image-name"),
            image_id=text(config, "rootfsImageID") or text(about, "image-id") or text(stored, "image"),
            labels=strings(dig(config, "labels")),
            created=text(config, "createdTime") or text(stored, "created"),
        )
    return None


def stored_container(name: str, tree: Tree, root: str) -> dict[str, Any] | None:
    """
    What containers/storage, which CRI-O uses as well, says of a container.
    """
    for driver in _DRIVERS:
        # Containers that go when the machine goes (`--rm`) are listed apart since Podman 4.4.
        for file in ("containers.json", "volatile-containers.json"):
            stored = tree.json(f"{root}/{driver}-containers/{file}")
            for container in stored if isinstance(stored, list) else ():
                if text(container, "id") == name:
                    assert isinstance(container, dict)
                    return container
    return None


def _config(name: str, tree: Tree, root: str) -> Any:
    """
    libpod's configuration of a container.
    """
    for path in (f"{root}/db.sql", f"{root}/libpod/db.sql"):
        if (fd := tree.open(path)) is not None:
            return decode(_from_sqlite(fd, name))
    if (fd := tree.open(f"{root}/libpod/bolt_state.db")) is not None:
        return decode(_from_bolt(fd, name))
    return None


def _from_sqlite(fd: int, name: str) -> str | None:
    try:
        # By descriptor, because the path may lie in another tree. "immutable": no lock is taken and no file made.
        uri = f"file:/proc/self/fd/{fd}?mode=ro&immutable=1"
        with closing(sqlite3.connect(uri, uri=True, timeout=0)) as database:
            row = database.execute("SELECT JSON FROM ContainerConfig WHERE ID = ?", (name,)).fetchone()
        return row[0] if row and isinstance(row[0], str) else None
    except (sqlite3.Error, UnicodeError):
        return None
    finally:
        os.close(fd)


def _from_bolt(fd: int, name: str) -> bytes | None:
    try:
        with mmap.mmap(fd, 0, prot=mmap.PROT_READ) as data:
            return bolt.get(data, b"ctr", name.encode(), b"config")
    except (OSError, ValueError, DecodeError):
        return None
    finally:
        os.close(fd)
