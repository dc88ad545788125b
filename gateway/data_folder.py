"""Whose `DATA_DIR` may be: it holds the hashes of keys, clients' files and the owner's door.

As with sshd's and PostgreSQL's files, nobody else may write it: who can puts a database of his own there. A
group of this user alone is nobody else. Debian has one for each user, and Kubernetes makes a volume writable
for a pod's `fsGroup`, a number that the container knows nobody of.
"""

from __future__ import annotations

import grp
import os
import pwd
import stat
from collections.abc import Callable, Collection, Iterable
from pathlib import Path

from handler.errors import BadSettings

ROOT = 0
_WANTED = "it has to be a folder that this user alone may write, mode 0700"


def make(folder: Path) -> str | None:
    """Make `folder` for this user alone, or take the one that is there; what a person should know of it.

    Raises `BadSettings` as `check` does, and `OSError`.
    """
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise BadSettings([f"DATA_DIR={folder}: {error.strerror}; {_WANTED}"]) from None
    check(folder, serves=True)
    mode = stat.S_IMODE(folder.stat().st_mode)
    if not mode & stat.S_IRWXO:
        return None
    return (
        f"DATA_DIR={folder} may be read by everybody (mode {mode:04o}): what the gateway makes in it "
        "may not, but what was put there may; `chmod 700` is safe"
    )


def check(folder: Path, *, serves: bool) -> None:
    """Raise `BadSettings` if others may write `folder`, or it is another user's. It need not be there.

    Root may look into everybody's with a command, but what it `serves` is not to be in others' hands.
    """
    try:
        found = folder.stat()
    except OSError:  # who needs it says so
        return
    if why := fault(found, _owners(found, serves=serves)):
        raise BadSettings([f"DATA_DIR={folder} {why}; {_WANTED}"])


def check_database(url: str, folder: Path, *, serves: bool) -> None:
    """Raise `BadSettings` for a SQLite file at `url` whose folder is not there, or as `check` does.

    That of `folder`, DATA_DIR, is made with it and checked by itself.
    """
    driver, _, rest = url.partition("://")  # SQLAlchemy would say the same, and its import takes its time
    place = Path(rest[1:].partition("?")[0]).parent
    if not driver.startswith("sqlite") or place == folder:
        return
    try:
        found = place.stat()
    except OSError as error:
        raise BadSettings([f"DATABASE_URL, the folder {place}: {error.strerror}; {_WANTED}"]) from None
    if why := fault(found, _owners(found, serves=serves)):
        raise BadSettings([f"DATABASE_URL, the folder {place} {why}; {_WANTED}"])


def _owners(found: os.stat_result, *, serves: bool) -> set[int]:
    me = os.geteuid()
    return {me, ROOT} if serves or me != ROOT else {ROOT, found.st_uid}


def fault(
    found: os.stat_result,
    owners: Collection[int],
    *,
    users: Callable[[], Iterable[pwd.struct_passwd]] = pwd.getpwall,
    groups: Callable[[], Iterable[grp.struct_group]] = grp.getgrall,
) -> str | None:
    """Why what has these attributes is not for `owners` alone, on a system of these users and groups."""
    mode, group = stat.S_IMODE(found.st_mode), found.st_gid
    if found.st_uid not in owners:
        return f"belongs to the user {found.st_uid}"
    if mode & stat.S_IWOTH:
        return f"may be written by everybody (mode {mode:04o})"
    if not mode & stat.S_IWGRP or group == ROOT:
        return None
    known = list(users())
    members = {name for one in groups() if one.gr_gid == group for name in one.gr_mem}
    members |= {user.pw_name for user in known if user.pw_gid == group}
    if others := sorted(members - {user.pw_name for user in known if user.pw_uid in owners}):
        return f"may be written by others of the group {group}, such as {others[0]} (mode {mode:04o})"
    return None
