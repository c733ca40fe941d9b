"""What answers at ray:// up to a point and then never again, by the protocol of Ray's client; run by the Python that has Ray.

    python silent_head.py FOLDER UNTIL ...

For each UNTIL it writes a port, and makes the file FOLDER/UNTIL when that is silent. UNTIL is what it does not answer any more:
`ping`, the first question; `init`, that for a server of our own; `log`, the end of the log after that server did not start;
`resources`, the first question to that server; `work`, what is asked of actors.
"""

import os
import platform
import sys
import threading
from concurrent import futures
from pathlib import Path

import grpc
import ray
from ray.core.generated import ray_client_pb2, ray_client_pb2_grpc
from ray.util.client.common import GRPC_OPTIONS

NOT_STARTED = "Traceback (most recent call last):\nRuntimeError: Starting Ray client server failed"


class Silent:
    """What answers until something. `mark`: the file that says it does so no more."""

    def __init__(self, mark: Path) -> None:
        self.until, self._mark = mark.name, mark

    def never(self) -> None:
        """Answer no more."""
        self._mark.touch()
        threading.Event().wait()


class Driver(Silent, ray_client_pb2_grpc.RayletDriverServicer):
    """Questions with one answer."""

    def ClusterInfo(self, request, context):  # noqa: N802
        if self.until == "ping":
            self.never()
        if request.type != ray_client_pb2.ClusterInfoType.CLUSTER_RESOURCES:
            joined = request.type == ray_client_pb2.ClusterInfoType.IS_INITIALIZED
            return ray_client_pb2.ClusterInfoResponse(json="true" if joined else "{}")
        if self.until == "resources":
            self.never()
        return ray_client_pb2.ClusterInfoResponse(resource_table=ray_client_pb2.ClusterInfoResponse.ResourceTable())

    def KVPut(self, request, context):  # noqa: N802
        return ray_client_pb2.KVPutResponse(already_exists=False)


class Data(Silent, ray_client_pb2_grpc.RayletDataStreamerServicer):
    """The stream of a client's requests."""

    def Datapath(self, requests, context):  # noqa: N802
        for request in requests:
            kind = request.WhichOneof("type")
            if self.until == "init" or kind in ("task", "connection_cleanup"):
                self.never()
            response = ray_client_pb2.DataResponse(req_id=request.req_id)
            if kind == "init":
                response.init.ok = self.until != "log"
                response.init.msg = NOT_STARTED
            elif kind == "connection_info":
                info = response.connection_info
                info.num_clients, info.python_version = 1, platform.python_version()
                info.ray_version, info.ray_commit = ray.__version__, ray.__commit__
            elif kind == "put":
                response.put.valid, response.put.id = True, os.urandom(28)
            yield response


class Log(ray_client_pb2_grpc.RayletLogStreamerServicer):
    """The log of the client's server, which has no end."""

    def Logstream(self, requests, context):  # noqa: N802
        threading.Event().wait()


def serve(mark: Path) -> grpc.Server:
    """A server that is silent after what the file is called. Writes its port."""
    server = grpc.server(futures.ThreadPoolExecutor(64), options=GRPC_OPTIONS)
    ray_client_pb2_grpc.add_RayletDriverServicer_to_server(Driver(mark), server)
    ray_client_pb2_grpc.add_RayletDataStreamerServicer_to_server(Data(mark), server)
    ray_client_pb2_grpc.add_RayletLogStreamerServicer_to_server(Log(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    sys.stdout.write(f"{port}\n")
    sys.stdout.flush()
    return server


folder, *ends = sys.argv[1:]
servers = [serve(Path(folder, until)) for until in ends]
servers[0].wait_for_termination()
