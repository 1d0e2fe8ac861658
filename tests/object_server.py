"""An object store on loopback: SeaweedFS, which answers as S3 does, and a proxy before it that disturbs the answers.

    with seaweedfs(directory) as server:              # server.s3, and server.http, where the same objects are files
        with Disturbing(server.s3) as proxy:          # another address for the same objects
            proxy.disturb = "reset"

Clients find them by AWS_ENDPOINT_URL; `environment(address)` has it.
"""

import contextlib
import http.client
import re
import subprocess
import sys
import threading
import time
import urllib.request
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from tests.tiny_training import free_port, wait_until

BUCKET = "bucket"


def environment(address: str) -> dict[str, str]:
    """The variables by which a client finds the store at `host:port`."""
    return {
        "AWS_ENDPOINT_URL": f"http://{address}",
        "AWS_ACCESS_KEY_ID": "anyone",
        "AWS_SECRET_ACCESS_KEY": "anything",
        "AWS_REGION": "us-east-1",
        "no_proxy": "127.0.0.1",
    }


@dataclass
class Server:
    s3: str  # host:port
    http: str  # URL of the bucket


@contextlib.contextmanager
def seaweedfs(directory: Path):
    """A server with an empty bucket."""
    s3, master, volume, filer = (free_port() for _ in range(4))
    # The port for gRPC would be 10,000 higher, and that may not exist.
    ports = {"s3": s3, "master": master, "volume": volume, "filer": filer}
    options = [f"-{name}.port={port}" for name, port in ports.items()]
    options += [f"-{name}.port.grpc={free_port()}" for name in ports]
    # A bucket takes seven volumes at once.
    options += ["-volume.max=20", "-master.volumeSizeLimitMB=64", "-ip=127.0.0.1", "-ip.bind=127.0.0.1"]
    with (directory / "log").open("wb") as log:
        program = Path(sys.executable).with_name("weed")
        process = subprocess.Popen([program, "server", "-s3", f"-dir={directory}", *options], stdout=log, stderr=log)
    try:

        def bucket_is_made() -> bool:
            assert process.poll() is None, (directory / "log").read_text()[-2000:]
            with contextlib.suppress(OSError):
                request = urllib.request.Request(f"http://127.0.0.1:{s3}/{BUCKET}", method="PUT")
                with urllib.request.urlopen(request, timeout=10):
                    return True
            return False

        wait_until(bucket_is_made, "the object store")
        yield Server(f"127.0.0.1:{s3}", f"http://127.0.0.1:{filer}/buckets/{BUCKET}")
    finally:
        process.kill()  # to end in order takes it 25 s
        process.wait()


class Disturbing(ThreadingHTTPServer):
    """Hands requests on, and disturbs every third answer to a GET, or all, as `disturb` says."""

    daemon_threads = True

    def __init__(self, upstream: str) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.upstream = upstream
        self.disturb = ""  # slow, error, reset, truncated, busy; or gone, forbidden, silent: always
        self.disturbed = 0
        self.asked: list[tuple[str, str]] = []  # method and path
        self._lock = threading.Lock()

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.server_port}"

    def __enter__(self):
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_):
        self.shutdown()
        self.server_close()

    def how(self, method: str, path: str) -> str:
        """What to do with this request."""
        with self._lock:
            self.asked.append((method, path))
            always = self.disturb in ("gone", "forbidden", "silent")
            if not self.disturb or not (always or (method == "GET" and len(self.asked) % 3 == 0)):
                return ""
            self.disturbed += 1
            return self.disturb

    def handle_error(self, request, client_address):
        pass  # a client that goes away is no failure of a test


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def _answer(self) -> None:
        server: Any = self.server
        how = server.how(self.command, self.path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if how == "silent":
            self.close_connection = True
            return
        status = {"error": 500, "busy": 429, "gone": 404, "forbidden": 403}.get(how)
        if status:
            return self._send(status, {}, b"")
        upstream = http.client.HTTPConnection(server.upstream)
        upstream.request(self.command, self.path, body, dict(self.headers))
        response = upstream.getresponse()
        content, length = response.read(), response.headers.get("Content-Length", "0")
        upstream.close()
        headers = {n: v for n, v in response.headers.items() if n not in ("Content-Length", "Connection")}
        if how == "slow":
            time.sleep(0.3)
        if how == "truncated":  # an answer that is whole by its own account
            content = content[: len(content) // 2]
            length = str(len(content))
            if found := re.fullmatch(r"bytes (\d+)-\d+(/.*)", headers.get("Content-Range", "")):
                headers["Content-Range"] = f"bytes {found[1]}-{int(found[1]) + len(content) - 1}{found[2]}"
        self._send(response.status, headers | {"Content-Length": length}, content, cut=how == "reset")

    def _send(self, status: int, headers: dict[str, str], content: bytes, cut: bool = False) -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": "0"} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content[: len(content) // 2] if cut else content)
        self.close_connection = self.close_connection or cut

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _answer

    def log_message(self, *_):
        pass
