"""A real server that hits a limit of memory: it finishes or refuses in words, and the next small edit works in it."""

import hashlib
import io

import psutil
import pytest
from forked_python import process_at
from PIL import Image
from pix2pix_zero.devtools.process import one_thread
from pix2pix_zero.devtools.server import GraphError, Server
from pix2pix_zero.devtools.soak import in_words
from pix2pix_zero.devtools.soak_runs import large_edit, reference

LIMIT = getattr(psutil, "RLIMIT_AS", None)
ROOM = 100_000_000  # bytes beside what the server holds when it has made the small edit


@pytest.mark.skipif(LIMIT is None, reason="only Linux limits the memory of a process that runs")
def test_after_a_limit_of_memory_was_hit_the_next_edit_works_in_the_same_server(quick_environment):
    # as many arenas as a thread would take addresses that it does not use
    variables = {**one_thread(), "MALLOC_ARENA_MAX": "1"}
    with Server(quick_environment, options=["--disable-api-nodes"], gpu=False, variables=variables) as server:
        schemas = server.object_info()

        def small_edit(nonce):
            graph, shown = reference(nonce, schemas)
            png = server.view(server.run(graph)[shown]["images"][0])
            return hashlib.sha256(Image.open(io.BytesIO(png)).tobytes()).hexdigest()

        before = small_edit("first")
        process = psutil.Process(process_at(server.port))
        limit = process.memory_info().vms + ROOM
        process.rlimit(LIMIT, (limit, limit))
        refused = []
        for side in (192, 384):
            try:
                server.run(large_edit(side, schemas))
            except GraphError as error:
                assert in_words(error), (error, error.details.get("exception_type"), error.details.get("traceback"))
                refused.append(side)
            assert small_edit(f"after {side}") == before
        assert refused, "the limit was never hit"
