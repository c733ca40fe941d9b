"""Files written whole or not at all, and names that files can have on every system."""

import os
import re
import time
import uuid
from collections.abc import Callable
from pathlib import Path

TEMPORARY = ".pix2pix_zero_"
STALE_SECONDS = 3600
"""A temporary file that is older was left by a run that was killed."""

# What Windows gives to devices, whatever ending follows.
_DEVICES = re.compile(r"(con|prn|aux|nul|conin\$|conout\$|(com|lpt)[0-9\u00b9\u00b2\u00b3])\s*(\..*)?", re.IGNORECASE)


def write_whole(path: Path, content: bytes) -> None:
    """Write a file or replace it; at no moment is there a part of it. It gets the rights that new files get in its folder.

    Raises OSError, and leaves nothing behind then.
    """
    temporary = path.parent / f"{TEMPORARY}{uuid.uuid4().hex}"
    try:
        with temporary.open("xb") as file:
            file.write(content)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_numbered(folder: Path, name: Callable[[int], str], content: bytes, first: int = 1) -> Path:
    """Write a new file, whole or not at all, and never over another one. Clears what killed runs left in the folder.

    `name`: of the file with a number. `first`: the lowest number to take. Raises OSError, and leaves nothing behind then.
    """
    clear_leftovers(folder)
    path = _reserve(folder, name, first)
    try:
        write_whole(path, content)
    except BaseException:
        path.unlink(missing_ok=True)
        raise
    return path


def clear_leftovers(folder: Path, seconds: float = STALE_SECONDS) -> None:
    """Remove the temporary files of runs that were killed, older than so many seconds. Those that cannot be removed stay."""
    for old in folder.glob(f"{TEMPORARY}*"):
        try:
            if time.time() - old.stat().st_mtime >= seconds:
                old.unlink()
        except OSError:  # somebody else's, or cleared by another run
            continue


def windows_refuses(name: str) -> bool:
    """Whether Windows cannot make a file or folder of this name, so that it could not travel there."""
    return bool(_DEVICES.fullmatch(name)) or name.endswith((".", " "))


def _reserve(folder: Path, name: Callable[[int], str], number: int) -> Path:
    """A new empty file that no other run can take."""
    while True:
        path = folder / name(number)
        try:
            path.touch(exist_ok=False)
            return path
        except FileExistsError:
            number += 1
