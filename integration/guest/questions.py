"""A guest asks this machine for what it cannot see or do itself, and goes on when it is answered."""

from __future__ import annotations

import socketserver
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager


@contextmanager
def answered(answers: Mapping[str, Callable[[], object]]) -> Iterator[int]:
    """Answer a guest's questions until the block is left; the value is the port that it needs for it.

    In its script `ask NAME` calls the function of that name, in a thread here, and prints what it returns: one line.
    """

    class Question(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            question = self.rfile.readline().decode().strip()
            self.wfile.write(f"{answers[question]()}\n".encode())

    class Server(socketserver.ThreadingTCPServer):
        daemon_threads = True  # an answer that nobody needs any more is not waited for

    with Server(("127.0.0.1", 0), Question) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server.server_address[1]
        finally:
            server.shutdown()
            thread.join()
