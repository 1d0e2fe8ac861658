"""A stand-in for Comet on the loopback: it takes what `comet_ml` sends, and fails in the ways that a test asks for."""

import gzip
import json
import threading
import urllib.parse
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class StandIn:
    """Answers as Comet does, remembers what it took, and fails in the ways that a test asks for."""

    def __init__(self):
        self.values = []  # (context, name, step, epoch, value)
        self.parameters = {}
        self.system = {}
        self.others = {}
        self.tags = set()
        self.uploads = []  # (type, file name)
        self.created = []
        self.resumed = []
        self.refusals = Counter()  # by path's ending: answer so many requests with 500
        self.drops = {}  # by path's ending: the numbers of the requests whose connection is closed without an answer
        self.requests = Counter()
        self.delay_s = 0.0
        self.holds = False  # take requests and never answer
        self.changed = threading.Condition()
        self.closing = threading.Event()
        stand_in = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_):
                pass

            def do_POST(self):
                stand_in.answer(self)

            do_GET = do_PUT = do_POST

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}/clientlib/"
        self.thread = threading.Thread(target=self.server.serve_forever)
        self.thread.start()

    def close(self):
        self.closing.set()
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()

    def answer(self, request):
        body = request.rfile.read(int(request.headers.get("Content-Length") or 0))
        if request.headers.get("Content-Encoding") == "gzip":
            body = gzip.decompress(body)
        url = urllib.parse.urlsplit(request.path)
        if self.closing.wait(None if self.holds else self.delay_s):
            request.close_connection = True
            return
        with self.changed:
            self.requests.update(end for end in self.drops if url.path.endswith(end))
            if any(url.path.endswith(end) and self.requests[end] in numbers for end, numbers in self.drops.items()):
                request.close_connection = True
                return
            refused = next((end for end, left in self.refusals.items() if left and url.path.endswith(end)), None)
            if refused is not None:
                self.refusals[refused] -= 1
                status, reply = 500, {}
            else:
                status, reply = self.take(url.path, dict(urllib.parse.parse_qsl(url.query)), body)
            self.changed.notify_all()
        data = json.dumps(reply).encode()
        request.send_response(status)
        request.send_header("Content-Type", "application/json")
        request.send_header("Content-Length", str(len(data)))
        request.end_headers()
        request.wfile.write(data)

    def take(self, path, query, body):
        if path.endswith(("add/run", "get/run")):
            return self.handshake(path, json.loads(body))
        if path.endswith("experiment/metric"):
            for each in json.loads(body)["values"]:
                if each["metricName"] != "process duration":  # comet_ml's own, of its process
                    what = (each["context"], each["metricName"], each["step"])
                    self.values.append((*what, each["epoch"], each["metricValue"]))
        elif path.endswith("experiment/parameter"):
            self.parameters |= {each["parameterName"]: each["parameterValue"] for each in json.loads(body)["values"]}
        elif path.endswith("system-details"):
            listed = json.loads(body).get("logAdditionalSystemInfoList") or []
            self.system |= {each["key"]: each["value"] for each in listed}
        elif path.endswith("log-other"):
            self.others[json.loads(body)["key"]] = json.loads(body)["value"]
        elif path.endswith("add-tags-to-experiment"):
            self.tags.update(json.loads(body)["addedTags"])
        elif path.endswith("/upload"):
            self.uploads.append((query.get("type"), query.get("fileName") or query.get("figName")))
        elif path.endswith("isAlive/ver"):
            return 200, {"msg": "Healthy Server", "version": "3.70.0"}
        beats = ("is_alive_beat_duration_millis", "gpu_monitor_interval_millis", "cpu_monitor_interval_millis")
        return 200, dict.fromkeys(beats, 60_000)

    def handshake(self, path, payload):
        if path.endswith("add/run"):
            key = payload["experimentKey"]
            if key not in self.created:
                self.created.append(key)
            elif not payload["getOrCreateEnabled"]:
                return 400, {"sdk_error_code": 90999, "msg": "exists"}
        else:
            key = payload["previousExperiment"]
            if key not in self.created:
                return 400, {"sdk_error_code": 90210, "msg": "no such experiment"}
            self.resumed.append(key)
        return 200, {"runId": "r", "project_id": "p", "focusUrl": "http://127.0.0.1/", "lastOffset": 0}

    def wait_for(self, condition):
        with self.changed:
            assert self.changed.wait_for(condition, timeout=120), "Comet's stand-in waited in vain"

    def counts(self):
        return Counter(value[:3] for value in self.values)
