#!/usr/bin/env python3
"""The one developer command: demo, test, serve, lint, bench, train, lock. Try: python dev.py --help"""

import sys

if sys.version_info < (3, 10):
    sys.exit("dev.py needs Python 3.10 or newer; this is Python %d.%d." % sys.version_info[:2])

from devtools.cli import main  # noqa: E402 (an older Python could not even parse it)

if __name__ == "__main__":
    sys.exit(main())
