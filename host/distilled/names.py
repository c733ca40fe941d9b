"""Names of data sets and of students, which become names of files."""

import re

from ...editing.writing import windows_refuses

LONGEST = 100  # letters


def plain_name(name: str, socket: str) -> str:
    """The name without blanks around it. Raises ValueError, naming the socket, unless every system can name a file so."""
    plain = name.strip()
    if not plain:
        raise ValueError(f"{socket}: it is empty. Give a name, such as cat2dog.")
    if len(plain) > LONGEST:
        raise ValueError(f"{socket}: the name has {len(plain)} letters. Give one of at most {LONGEST}.")
    if re.search(r'[<>:"/\\|?*\x00-\x1f]', plain) or plain.startswith(".") or plain.endswith("."):
        raise ValueError(f"{socket}: {plain!r} cannot be a name. Use letters, digits, - and _ only; no folders.")
    if windows_refuses(plain):
        raise ValueError(f"{socket}: Windows cannot make files called {plain!r}. Give another name.")
    return plain
