"""Runs ComfyUI's main.py and ends with the process that started it, however that one ended.

The parent holds the other end of our standard input: when it is gone, reading returns, on every platform.
"""

import os
import runpy
import sys
import threading


def _end_with_parent() -> None:
    while os.read(0, 1):  # not sys.stdin: its lock, held here, would upset the interpreter when it ends
        pass
    os._exit(1)


if __name__ == "__main__":
    threading.Thread(target=_end_with_parent, daemon=True).start()
    main = sys.argv[1]
    sys.argv[:] = sys.argv[1:]
    sys.path[0] = os.path.dirname(main)
    runpy.run_path(main, run_name="__main__")
