"""Private files: created with modes 0700 and 0600, and verified before each use.

Whatever is executed, or trusted like code (a cluster's record, HAProxy's configuration, sockets), lies below a folder that
passes `check_private_folder`. Ray gives mode 0777 to the folders that it creates, so those are children of such a folder
(docs/adr/0021-private-files.md).
"""

from __future__ import annotations

import contextlib
import grp
import os
import pwd
import shutil
import stat
import tempfile
from pathlib import Path

from tandem.errors import UnsafePathError

OTHERS_MODE_BITS = stat.S_IRWXG | stat.S_IRWXO
"""Mode bits that give access to anybody but the owner."""
MAX_FILE_BYTES = 2**20
"""Largest file that `read_private_file` reads."""


def make_temporary_folder(prefix: str) -> Path:
    """Create an empty folder of mode 0700 with a short random name, below /tmp where there is one.

    Short, because Unix sockets are created below it, and their paths may have 107 bytes.
    """
    folder = Path(tempfile.mkdtemp(prefix=prefix, dir="/tmp" if Path("/tmp").is_dir() else None))
    check_private_folder(folder)
    return folder


def make_private_folder(path: Path) -> None:
    """Create `path`, with missing parents; every folder that is created has mode 0700. One that exists stays as it is."""
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    for folder in reversed(missing):
        folder.mkdir(mode=0o700, exist_ok=True)


def ensure_private_folder(path: Path) -> Path:
    """The folder, created if needed; UnsafePathError or OSError unless it passes `check_private_folder`."""
    make_private_folder(path)
    check_private_folder(path)
    return path


def make_shared_folder(path: Path, home: Path) -> None:
    """Create `path` below `home`, with missing parents; where a group shares the home, each has the home's mode.

    Folders that exist keep their modes.
    """
    shared = is_shared(home)
    for folder in reversed([folder for folder in (path, *path.parents) if not folder.exists()]):
        with contextlib.suppress(FileExistsError):  # another process was first
            folder.mkdir()
            if shared:
                folder.chmod(stat.S_IMODE(home.stat().st_mode))


def is_shared(home: Path) -> bool:
    """Whether a group shares this home on purpose: it can write there, and the set-group-id bit is set."""
    try:
        mode = home.stat().st_mode
    except OSError:
        return False
    return bool(mode & stat.S_IWGRP and mode & stat.S_ISGID)


def replaceable_parent(path: Path) -> Path | None:
    """The parent of `path` where another user than root could rename or replace what is on the way to it; None: there is none.

    Stricter than `check_private_folder`: members of a group count as other users. Parents that do not exist are left out.
    """
    found = None
    for parent in path.parents:
        try:
            status = parent.stat()
        except FileNotFoundError:
            continue
        if status.st_uid not in (0, os.geteuid()):
            return parent
        # In a folder with the sticky bit only the owner of an entry can rename or remove it.
        if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH) and not status.st_mode & stat.S_ISVTX:
            found = found or parent
        elif not status.st_mode & (stat.S_IXGRP | stat.S_IXOTH):
            found = None  # nobody else can reach the parents below this one
    return found


def check_private_folder(path: Path) -> None:
    """Raise UnsafePathError unless `path` is a real folder of this user that nobody else can enter, list or replace."""
    try:
        found = path.lstat()
    except OSError as error:
        raise UnsafePathError(f"{path} cannot be examined: {error.strerror}.") from error
    if not stat.S_ISDIR(found.st_mode):
        raise UnsafePathError(f"{path} is not a folder (a symbolic link, or a file). Remove it.")
    _check_owner(path, found, "its content could be another user's program. Remove it, or run as its owner.")
    if found.st_mode & OTHERS_MODE_BITS:
        raise UnsafePathError(
            f"{path} has mode {stat.S_IMODE(found.st_mode):04o}: other users can reach it. Run `chmod 0700 {path}` if nobody "
            "else has written there; otherwise remove it."
        )
    _check_parents(path)


def read_private_file(path: Path) -> str:
    """The text of a file of this user that nobody else can write; never follows a symbolic link.

    Raises FileNotFoundError if there is none, and UnsafePathError if it belongs to another user or others can write it.
    """
    try:
        # Without O_NONBLOCK, opening somebody's FIFO would wait for ever.
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise UnsafePathError(f"{path} cannot be read ({error.strerror}). Remove it if it is not yours.") from error
    with open(descriptor, "rb") as file:
        # Of the open file: what the path names may have changed since.
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            raise UnsafePathError(f"{path} is not a regular file. Remove it.")
        _check_owner(
            path, found, "what it says is not followed. Remove it, or set TANDEM_HOME to a folder of your own."
        )
        if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            raise UnsafePathError(
                f"{path} has mode {stat.S_IMODE(found.st_mode):04o}: other users can change it. Remove it, or run "
                f"`chmod 0600 {path}` if you know its content."
            )
        return file.read(MAX_FILE_BYTES).decode()


def check_home(home: Path) -> str | None:
    """Create TANDEM_HOME with mode 0700 if it does not exist; otherwise check its owner and mode.

    Raises UnsafePathError if every user of the machine can. Returns a warning if a group can or if the home is another user's,
    unless the set-group-id bit says that a group of this user's shares it on purpose; None if there is nothing to say.
    """
    with contextlib.suppress(OSError):  # what wants to write there says why it cannot
        make_private_folder(home)
    try:
        found = home.stat()
    except OSError:
        return None
    if found.st_mode & stat.S_IWOTH:
        raise UnsafePathError(
            f"TANDEM_HOME ({home}) has mode {stat.S_IMODE(found.st_mode):04o}: every user of this machine can change what is "
            f"served and run there. Run `chmod o-w {home}`, or set TANDEM_HOME to another folder."
        )
    _check_parents(home.resolve(), owners=False)
    members = {os.getegid(), *os.getgroups()}
    if found.st_uid not in (0, os.geteuid()) and not (is_shared(home) and found.st_gid in members):
        return (
            f"TANDEM_HOME ({home}) belongs to {user_name(found.st_uid)}, and this process runs as {user_name(os.geteuid())}: its "
            "owner can change what runs as you. Set TANDEM_HOME to a folder of your own; for a home that a group of yours shares "
            "on purpose, its owner runs `chmod 2770`."
        )
    if found.st_mode & stat.S_IWGRP and not found.st_mode & stat.S_ISGID:
        return (
            f"TANDEM_HOME ({home}) can be written by the group {_group_name(found.st_gid)}: its members can change what runs "
            f"as you. Run `chmod g-w {home}`; for a home that a group shares on purpose, `chmod g+s {home}`."
        )
    return None


def remove_private_folder(path: Path) -> None:
    """Remove a folder with all that it holds, if it passes `check_private_folder`; otherwise leave it."""
    with contextlib.suppress(UnsafePathError):
        check_private_folder(path)
        shutil.rmtree(path, ignore_errors=True)


def user_name(uid: int) -> str:
    """A user's name, or `user 1234` for one that has none here."""
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return f"user {uid}"


def _group_name(gid: int) -> str:
    try:
        return grp.getgrgid(gid).gr_name
    except KeyError:
        return str(gid)


def _check_owner(path: Path, found: os.stat_result, why: str) -> None:
    """Raise UnsafePathError, with the reason and the next step of `why`, if another user owns what was found at `path`."""
    if found.st_uid != os.geteuid():
        raise UnsafePathError(
            f"{path} belongs to {user_name(found.st_uid)}, and this process runs as {user_name(os.geteuid())}: {why}"
        )


def _check_parents(path: Path, *, owners: bool = True) -> None:
    """Raise UnsafePathError if another user can rename or replace a parent of `path`; with `owners`, if one owns a parent."""
    for parent in path.parents:
        found = parent.stat()
        if owners and found.st_uid not in (0, os.geteuid()):
            raise UnsafePathError(f"{path} lies below {parent}, which belongs to {user_name(found.st_uid)}.")
        # In a folder with the sticky bit only the owner of an entry can rename or remove it.
        if found.st_mode & stat.S_IWOTH and not found.st_mode & stat.S_ISVTX:
            raise UnsafePathError(
                f"{path} lies below {parent}, where every user can rename and replace it (mode "
                f"{stat.S_IMODE(found.st_mode):04o}). Run `chmod o-w {parent}` or `chmod +t {parent}`."
            )
