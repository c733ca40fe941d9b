"""Files written whole or not at all, and names that files can have on every system."""

import contextlib
import itertools
import os
import re
import time
import uuid
from collections.abc import Callable, Iterator
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
    with _written(path.parent, content) as temporary:
        os.replace(temporary, path)


def write_numbered(folder: Path, name: Callable[[int], str], content: bytes, first: int = 1) -> Path:
    """Write a new file, whole or not at all, and never over another one. Clears what killed runs left in the folder.

    `name`: of the file with a number. `first`: the lowest number to take. Raises OSError, and leaves nothing behind then.
    """
    clear_leftovers(folder)
    with _written(folder, content) as temporary:
        for number in itertools.count(first):
            path = folder / name(number)
            with contextlib.suppress(FileExistsError):
                _name_anew(temporary, path)
                return path


@contextlib.contextmanager
def _written(folder: Path, content: bytes) -> Iterator[Path]:
    """A temporary file in the folder, which is gone afterwards."""
    temporary = folder / f"{TEMPORARY}{uuid.uuid4().hex}"
    try:
        with temporary.open("xb") as file:
            file.write(content)
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


def _name_anew(temporary: Path, path: Path) -> None:
    """Give a file a name that nothing has. Raises FileExistsError if something has it."""
    try:
        os.link(temporary, path)
    except FileExistsError:
        raise
    except OSError:  # a file system without hard links: the name is taken first, by an empty file
        path.touch(exist_ok=False)
        try:
            os.replace(temporary, path)
        except BaseException:
            path.unlink(missing_ok=True)
            raise


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
