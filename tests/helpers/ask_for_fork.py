"""`python ask_for_fork.py DOOR ARGUMENTS`: what `python ARGUMENTS` does, in a fork of the process at this socket.

The fork ends when this process does. It has little to import, so that it starts at once.
"""

import json
import os
import socket
import sys

with socket.socket(socket.AF_UNIX) as call:
    call.connect(sys.argv[1])
    request = {"arguments": sys.argv[2:], "folder": os.getcwd(), "variables": dict(os.environ)}
    content = json.dumps(request).encode()
    socket.send_fds(call, [len(content).to_bytes(8, "big")], [0, 1, 2])
    call.sendall(content)
    status = call.recv(1)  # nothing if it was killed
sys.exit(status[0] if status else 1)
