"""A web server in this process that serves one file and breaks connections as told, for tests of downloads."""

import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Server(ThreadingHTTPServer):
    """Serves one file at /set/...; each of the first `broken` connections ends after `cut_bytes`."""

    def __init__(self, content, ranges=True, broken=0, cut_bytes=0, status=0):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.content, self.ranges, self.broken, self.cut_bytes, self.status = content, ranges, broken, cut_bytes, status
        self.asked: list[str | None] = []  # the Range header of each request

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}/set"


class _Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        server = self.server
        asked = self.headers.get("Range")
        server.asked.append(asked)
        if server.status:
            return self.send_error(server.status)
        start = int(asked.removeprefix("bytes=").removesuffix("-")) if asked and server.ranges else 0
        if start and start >= len(server.content):
            return self.send_error(416)
        body = server.content[start:]
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if server.broken:
            server.broken -= 1
            body = body[: server.cut_bytes]
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@contextmanager
def serving(content, **how):
    server = Server(content, **how)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
