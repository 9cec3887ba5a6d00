"""Reading and writing files: a damaged file is named, and an interruption never leaves half of one.

A file is written under a name that is new, in a folder of its own beside its place, and gets the final name when all of
it is on the disk. Whoever reads the folder meanwhile, or after a power failure, finds the old file or the new one.
"""

import contextlib
import json
import os
import re
import stat
from pathlib import Path

import numpy as np

MAX_SMALL = 2**25  # bytes: above the configuration and tokenizer of a model here, below what takes long to parse

# ---- Reading ----


def check_regular(path, max_size=None):
    """Raises OSError unless `path` is a regular file, of at most max_size bytes. To be called before a file is opened:
    opening a named pipe may wait for ever, and reading a device may never end."""
    found = os.stat(path)
    if not stat.S_ISREG(found.st_mode):
        kind = "Is a directory" if stat.S_ISDIR(found.st_mode) else "a pipe or a device"
        raise OSError(f"{path}: {kind}, not a file")
    if max_size is not None and found.st_size > max_size:
        raise OSError(f"{path}: {found.st_size} bytes are too many for such a file, {max_size} are the limit")
    if 100 < found.st_size < 1000:
        with open(path, "rb") as file:
            if file.read(40).startswith(b"version https://git-lfs"):
                raise OSError(f"{path}: a pointer of git-lfs, not the file itself: run `git lfs pull` in its folder")


def read_text(path, is_small=False):
    """The text of a UTF-8 file. Raises OSError naming the file if it cannot be read or is not UTF-8, and, where it must
    be a small regular file, if it is not."""
    if is_small:
        check_regular(path, MAX_SMALL)
    try:
        return Path(path).read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise OSError(f"{path}: no UTF-8 text ({error.reason} at byte {error.start})") from None


def read_json(path):
    """The object in a JSON file. Raises OSError naming the file if it cannot be read or holds anything else."""
    return parse_json(path, read_text(path, is_small=True))


def parse_json(path, text):
    """The object in a JSON text, which was found in the file `path`. Raises OSError naming the file if it is none."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise OSError(f"{path}: not JSON ({error})") from None
    if not isinstance(found, dict):
        raise OSError(f"{path}: a JSON object was expected, not {type(found).__name__}")
    return found


def map_file(path, offset=0, size=None):
    """The bytes of a file, or of a part of it, as an array that is read when it is first used (mode "c", copy on write:
    changes stay in memory). Raises OSError naming the file if it is empty or no regular file."""
    check_regular(path)
    if os.path.getsize(path) == 0:
        raise OSError(f"{path}: empty")
    return np.asarray(np.memmap(path, np.uint8, "c", offset, size))


def map_part(path, data, offset, size):
    """`size` bytes from `offset` on of the file that `data` maps as a whole. A large part has a mapping of its own,
    so that its memory is released as soon as a backend has made a copy. Each mapping keeps a file open, and a process
    may have few hundred files open, so the small parts share the mapping of the whole file."""
    return map_file(path, offset, size) if size >= 2**16 else data[offset : offset + size]


# ---- Writing ----


@contextlib.contextmanager
def replacing(path):
    """Yields the name of a file to write. When the block ends, that file replaces `path`; after an error it is removed
    and `path` is as before. Raises OSError naming the file if it cannot be written, a full disk included."""
    path = Path(path)
    try:
        with scratch_folder(path) as folder:
            part = folder / path.name
            yield part
            with open(part, "rb+") as file:
                os.fsync(file.fileno())
            os.replace(part, path)
    except OSError as error:
        raise OSError(f"cannot write {path}: {error.strerror or error}; the old file is unchanged") from None


def write_text(path, text):
    with replacing(path) as part:
        part.write_text(text, encoding="utf-8")


@contextlib.contextmanager
def new_folder(out):
    """Yields the name of a folder to fill. When the block ends it is renamed to `out`; after an error it is removed.
    Raises OSError if `out` cannot be made."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with scratch_folder(out) as folder:
        part = folder / out.name
        part.mkdir()
        yield part
        try:
            os.rename(part, out)
        except OSError as error:
            raise OSError(f"cannot make {out}: {error.strerror}") from None


@contextlib.contextmanager
def scratch_folder(path):
    """Yields a new, empty folder beside `path`, with a name that nothing had before, and removes it at the end."""
    import tempfile  # here, as it takes 5 ms, and most programs only read

    prefix = f".{path.name[:99]}."
    with tempfile.TemporaryDirectory(".part", prefix, path.parent, ignore_cleanup_errors=True) as folder:
        yield Path(folder)


# ---- One writer at a time ----


@contextlib.contextmanager
def locked(folder):
    """Lets one process at a time write into `folder`, which need not exist yet. Raises OSError at once if another
    process is in such a block for the same folder.

    The lock is the operating system's, on the open file .NAME.lock beside the folder: it ends with the process, however
    that ends. What a process that was killed left in its scratch folders is removed here, where nobody else can be
    using it.
    """
    folder = Path(folder).resolve()
    path = folder.with_name(f".{folder.name}.lock")
    folder.parent.mkdir(parents=True, exist_ok=True)
    is_ours = not path.exists()
    with open(path, "ab") as file:
        try:
            lock(file)
            is_current = os.path.samestat(os.fstat(file.fileno()), os.stat(path))
        except (BlockingIOError, PermissionError, FileNotFoundError):
            is_current = False
        if not is_current:  # locked by another process, or locked and removed by one just now
            raise OSError(f"another run is writing into {folder}: wait until it has ended, or name another folder")
        try:
            remove_leftovers(folder)
            yield
        finally:
            if is_ours:
                with contextlib.suppress(OSError):  # Windows does not remove an open file; an empty one may stay
                    path.unlink()


def lock(file):
    """Locks an open file for this process. Raises BlockingIOError or PermissionError if another process has locked
    it."""
    try:
        import fcntl
    except ModuleNotFoundError:  # Windows
        import msvcrt

        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
    else:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def remove_leftovers(folder):
    """Removes the scratch folders that killed processes left, for `folder` itself and for files in it."""
    import shutil

    for parent, name in (folder.parent, re.escape(folder.name[:99])), (folder, ".+"):
        for path in [*parent.glob(".*.part")]:
            if re.fullmatch(rf"\.{name}\.[a-z0-9_]{{8}}\.part", path.name):  # as tempfile names them
                shutil.rmtree(path, ignore_errors=True)
