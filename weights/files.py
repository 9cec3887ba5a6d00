"""Reading and writing files: a damaged one is named, and no interruption leaves half of one.

A file that is written gets a name of its own first, and the final name when all of it is on the disk. Whoever reads the
folder meanwhile, or after a power failure, finds the old file or the new one, never a part of one.
"""

import contextlib
import json
import os
import shutil
from pathlib import Path


def read_text(path):
    """The text of a UTF-8 file. Raises OSError naming the file if it cannot be read or is not UTF-8."""
    try:
        return Path(path).read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise OSError(f"{path}: no UTF-8 text ({error.reason} at byte {error.start})") from None


def read_json(path):
    """The object in a JSON file. Raises OSError naming the file if it cannot be read or holds anything else."""
    try:
        found = json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise OSError(f"{path}: not JSON ({error})") from None
    if not isinstance(found, dict):
        raise OSError(f"{path}: a JSON object was expected, not {type(found).__name__}")
    return found


@contextlib.contextmanager
def replacing(path):
    """Yields the name of a file to write. When the block ends, that file replaces `path`; after an error it is removed
    and `path` is as before. Raises OSError naming the file if it cannot be written, a full disk included."""
    path = Path(path)
    part = path.with_name(path.name + ".part")
    try:
        yield part
        with open(part, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:
        raise OSError(f"cannot write {path}: {error.strerror or error}; what was there before still is") from None
    finally:
        part.unlink(missing_ok=True)


def write_text(path, text):
    with replacing(path) as part:
        part.write_text(text, encoding="utf-8")


@contextlib.contextmanager
def new_folder(out):
    """Yields the name of a folder to fill. When the block ends it is renamed to `out`; after an error it is removed."""
    part = out.with_name(out.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        yield part
        os.rename(part, out)
    finally:
        shutil.rmtree(part, ignore_errors=True)
