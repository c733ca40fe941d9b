"""Ray's client server as `ray start` runs it, with ports of its own for the clients' servers.

    python ray_client_server.py FIRST_PORT --host … --port … --address … --runtime-env-agent-address …

Every Ray of a machine hands out its clients' servers from 23000 upward, each port once it is seen to be free and some
seconds before it is taken: of two Rays, one client's server may end where the other's is.
"""

import sys

from ray.util.client.server import proxier
from ray.util.client.server.server import main

CLIENTS = 20

first = int(sys.argv.pop(1))
proxier.MIN_SPECIFIC_SERVER_PORT, proxier.MAX_SPECIFIC_SERVER_PORT = first, first + CLIENTS
main()
