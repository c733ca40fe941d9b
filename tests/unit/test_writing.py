"""Files are whole or not there, whatever happens while they are written."""

import errno
import os
import random
import subprocess
import sys
import time

import pytest
from pix2pix_zero.devtools.hosts import ROOT
from pix2pix_zero.editing.writing import TEMPORARY, clear_leftovers, windows_refuses, write_numbered, write_whole

SIZE = 1 << 20
LOAD = f"""
import importlib.util
from pathlib import Path
spec = importlib.util.spec_from_file_location("writing", {str(ROOT / "editing" / "writing.py")!r})
writing = importlib.util.module_from_spec(spec)
spec.loader.exec_module(writing)
"""


def numbered(number):
    return f"a_{number:05}.bin"


def in_a_process(code, **options):
    return subprocess.Popen([sys.executable, "-c", LOAD + code], stdout=subprocess.PIPE, text=True, **options)


def test_numbers_go_on_and_nothing_is_written_over(tmp_path):
    (tmp_path / numbered(3)).write_bytes(b"old")
    assert [write_numbered(tmp_path, numbered, b"new", 2).name for _ in range(2)] == [numbered(2), numbered(4)]
    assert (tmp_path / numbered(3)).read_bytes() == b"old"


@pytest.mark.skipif(os.name == "nt", reason="Windows has no umask")
@pytest.mark.parametrize("umask", [0o022, 0o002, 0o077])
def test_files_have_the_rights_that_new_files_get(tmp_path, umask):
    before = os.umask(umask)
    try:
        write_whole(tmp_path / "a", b"1")
        made = write_numbered(tmp_path, numbered, b"1")
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "a", made)} == {0o666 & ~umask}


def test_a_full_disk_leaves_nothing_behind(tmp_path):
    """A real limit of the system, on the size of files, in a process of its own."""
    pytest.importorskip("resource")
    (tmp_path / "kept").write_bytes(b"old")
    code = f"""
import resource, signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
folder = Path({str(tmp_path)!r})
for write in (lambda: writing.write_whole(folder / "kept", bytes(5000)),
              lambda: writing.write_numbered(folder, "a_{{}}".format, bytes(5000))):
    try:
        write()
    except OSError as error:
        print(error.strerror)
"""
    told, _ = in_a_process(code).communicate(timeout=60)
    assert told.splitlines() == ["File too large"] * 2
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]
    assert (tmp_path / "kept").read_bytes() == b"old"


def test_killed_while_it_writes_a_file_is_the_old_one_or_the_new_one(tmp_path):
    """Twenty processes that replace a file without end, each killed at a random moment; then a later save clears up."""
    path, moments = tmp_path / "a", random.Random(0)
    code = f"""
print("ready", flush=True)
for value in range(10**9):
    writing.write_whole(Path({str(path)!r}), bytes([value % 256]) * {SIZE})
"""
    # the last of them just before the new file takes the old one's place
    in_the_midst = """
def wait(*_):
    print("midst", flush=True)
    time.sleep(600)
import time
writing.os.replace = wait
"""
    for number in range(20):
        with in_a_process((in_the_midst if number == 19 else "") + code) as process:
            process.stdout.readline()
            if number == 19:
                process.stdout.readline()
            time.sleep(0.05 * moments.random())
            process.kill()
        if path.exists():
            content = path.read_bytes()
            assert len(content) == SIZE and len(set(content)) == 1
    assert list(tmp_path.glob(f"{TEMPORARY}*")), "what was being written when the process was killed"
    for old in tmp_path.glob(f"{TEMPORARY}*"):
        os.utime(old, (0, 0))
    write_numbered(tmp_path, numbered, b"1")
    assert {each.name for each in tmp_path.iterdir()} == {"a", numbered(1)}


def test_killed_while_it_saves_numbered_files_each_of_them_is_whole(tmp_path):
    moments = random.Random(1)
    code = f"""
print("ready", flush=True)
while True:
    writing.write_numbered(Path({str(tmp_path)!r}), "a_{{}}.bin".format, b"x" * 4096)
"""
    for _ in range(20):
        with in_a_process(code) as process:
            process.stdout.readline()
            time.sleep(0.05 * moments.random())
            process.kill()
    sizes = {each.stat().st_size for each in tmp_path.glob("a_*.bin")}
    assert sizes == {4096}


def test_numbers_are_taken_where_the_file_system_has_no_links(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    (tmp_path / numbered(1)).write_bytes(b"old")
    assert write_numbered(tmp_path, numbered, b"new").read_bytes() == b"new"
    assert {each.name: each.read_bytes() for each in tmp_path.iterdir()} == {numbered(1): b"old", numbered(2): b"new"}


def test_what_is_being_written_just_now_is_left_alone(tmp_path):
    others = tmp_path / f"{TEMPORARY}now"
    others.write_bytes(b"half")
    clear_leftovers(tmp_path)
    assert others.exists()


@pytest.mark.parametrize(
    "name", ["aux", "CON", "nul.txt", "com1", "LPT9.a.b", "com\u00b9", "CONIN$", "aux .txt", "a.", "a "]
)
def test_names_that_windows_refuses(name):
    assert windows_refuses(name)


@pytest.mark.parametrize("name", ["auxiliary", "console", "com", "com10", "a.con", "nulls.txt", "\u00e4", "cat2dog"])
def test_names_that_windows_takes(name):
    assert not windows_refuses(name)
