"""Stand-in for the endpoints of the Hub that pushing and pulling use, on the loopback device."""

import base64
import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any


class HubServer(ThreadingHTTPServer):
    """Repositories in memory.

    Attributes:
        files: Content by (repository, name).
        requests: Method and path of all, in order.
        cut: Names of files of which only the first half is ever sent.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files: dict[tuple[str, str], bytes] = {}
        self.blobs: dict[str, bytes] = {}
        self.requests: list[tuple[str, str]] = []
        self.cut: set[str] = set()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def commit(self) -> str:
        """The name of the state of all files, forty digits."""
        return hashlib.sha1(repr(sorted(self.files.items())).encode()).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    server: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._send_file(with_content=False)

    def do_GET(self) -> None:
        if self.path.startswith("/api/models/"):
            self._note()
            repository = self.path.removeprefix("/api/models/").split("/revision/")[0]
            self._send({"id": repository, "modelId": repository, "sha": self.server.commit(), "siblings": []})
        else:
            self._send_file(with_content=True)

    def do_PUT(self) -> None:
        body = self._note()
        self.server.blobs[hashlib.sha256(body).hexdigest()] = body
        self._send({})

    def do_POST(self) -> None:
        body, server = self._note(), self.server
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            name = "/".join(filter(None, (asked.get("organization"), asked["name"])))
            self._send({"url": f"{server.address}/{name}", "id": name, "name": name})
        elif self.path == "/api/validate-yaml":
            self._send({"errors": [], "warnings": []})
        elif match := re.fullmatch(r"/api/models/(.+)/preupload/main", self.path):
            files = [
                {"path": file["path"], "uploadMode": _mode(file["path"]), "shouldIgnore": False, "oid": None}
                for file in json.loads(body)["files"]
            ]
            self._send({"files": files})
        elif self.path.endswith("/info/lfs/objects/batch"):
            objects = json.loads(body)["objects"]
            for each in objects:
                each["actions"] = {"upload": {"href": f"{server.address}/blobs/{each['oid']}"}}
            self._send({"transfer": "basic", "objects": objects})
        elif match := re.fullmatch(r"/api/models/(.+)/commit/main", self.path):
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    server.files[match[1], value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    server.files[match[1], value["path"]] = server.blobs[value["oid"]]
            commit = server.commit()
            url = f"{server.address}/{match[1]}/commit/{commit}"
            self._send({"success": True, "commitOid": commit, "commitUrl": url, "hookOutput": ""})
        else:
            self._send({"error": self.path}, status=404)

    def _note(self) -> bytes:
        self.path = self.path.partition("?")[0]
        self.server.requests.append((self.command, self.path))
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _send_file(self, *, with_content: bool) -> None:
        self._note()
        match = re.fullmatch(r"/(.+?)/resolve/[^/]+/(.+)", self.path) or re.fullmatch(r"/()(.+)", self.path)
        content = self.server.files.get((match[1], match[2])) if match else None
        if content is None:
            self._send({"error": "Entry not found"}, status=404, headers={"X-Error-Code": "EntryNotFound"})
            return
        start = int((re.match(r"bytes=(\d+)", self.headers.get("Range", "")) or [0, 0])[1])
        self.send_response(206 if start else 200)
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", self.server.commit())
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        if with_content and match[2] in self.server.cut:
            self.wfile.write(content[start : max(start, len(content) // 2)])
            self.close_connection = True
        elif with_content:
            self.wfile.write(content[start:])

    def _send(self, answer: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        body = json.dumps(answer).encode()
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def _mode(path: str) -> str:
    return "lfs" if path.endswith(".safetensors") else "regular"


@contextmanager
def serve() -> Iterator[HubServer]:
    """Run a server in a thread."""
    server = HubServer()
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
