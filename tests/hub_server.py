"""The part of the Hugging Face hub's HTTP interface that downloads use, on the loopback, with faults on demand."""

import contextlib
import hashlib
import json
import re
import threading
import urllib.parse
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Hub:
    """A folder with OWNER/NAME/… in it, as data sets; what goes wrong is set by the tests."""

    folder: Path
    endpoint: str = ""
    break_off_at: dict[str, list[int]] = field(default_factory=dict)  # by name of a file: after so many bytes, in turn
    damaged: set[str] = field(default_factory=set)  # files that arrive with a flipped bit
    requests: list[tuple[str, str, str]] = field(default_factory=list)  # method, path, range
    sent: Counter[str] = field(default_factory=Counter)  # bytes by name of a file


@contextlib.contextmanager
def serve(folder: Path) -> Iterator[Hub]:
    hub = Hub(folder)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self.answer(with_body=False)

        def do_GET(self) -> None:
            self.answer(with_body=True)

        def answer(self, with_body: bool) -> None:
            url = urllib.parse.urlsplit(self.path)
            path = urllib.parse.unquote(url.path)
            hub.requests.append((self.command, path, self.headers.get("Range", "")))
            if match := re.fullmatch(r"/api/datasets/([^/]+/[^/]+)(/revision/.+)?", path):
                self.listing(match[1])
            elif match := re.fullmatch(r"/datasets/([^/]+/[^/]+)/resolve/[^/]+/(.+)", path):
                self.file(hub.folder / match[1] / match[2], with_body)
            else:
                self.missing("EntryNotFound")

        def missing(self, code: str) -> None:
            self.send_response(404)
            self.send_header("X-Error-Code", code)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def listing(self, repo: str) -> None:
            folder = hub.folder / repo
            if not folder.is_dir():
                return self.missing("RepoNotFound")
            siblings = [
                {
                    "rfilename": str(path.relative_to(folder)),
                    "size": path.stat().st_size,
                    "lfs": {"sha256": sha256(path), "size": path.stat().st_size, "pointerSize": 130},
                }
                for path in sorted(folder.rglob("*"))
                if path.is_file()
            ]
            body = json.dumps({"id": repo, "sha": COMMIT, "siblings": siblings}).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def file(self, path: Path, with_body: bool) -> None:
            if not path.is_file():
                return self.missing("EntryNotFound")
            data = path.read_bytes()
            etag = sha256(path)
            if path.name in hub.damaged:
                data = data[:-1] + bytes([data[-1] ^ 1])
            wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
            start = int(wanted[1]) if wanted else 0
            stop = int(wanted[2]) + 1 if wanted and wanted[2] else len(data)
            self.send_response(206 if wanted else 200)
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("ETag", f'"{etag}"')
            self.send_header("X-Linked-ETag", f'"{etag}"')
            self.send_header("X-Linked-Size", str(len(data)))
            self.send_header("Accept-Ranges", "bytes")
            self.send_header("Content-Length", str(stop - start))
            if wanted:
                self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{len(data)}")
            self.end_headers()
            if not with_body:
                return
            if breaks := hub.break_off_at.get(path.name):
                stop = min(stop, start + breaks.pop(0))
                self.close_connection = True
            self.wfile.write(data[start:stop])
            hub.sent[path.name] += stop - start

        def log_message(self, *args: object) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    hub.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
