"""A stand-in of the hub's API on loopback: makes repositories, checks cards, takes commits. It stores what it gets."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Hub:
    """What was sent: repositories with their visibility, and the files of each."""

    address: str = ""
    private: dict[str, bool] = field(default_factory=dict)
    files: dict[str, dict[str, bytes]] = field(default_factory=dict)
    tokens: set[str] = field(default_factory=set)
    refuses: bool = False


@contextmanager
def serving() -> Iterator[Hub]:
    """A hub for the length of a ``with`` block."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(hub))
    hub.address = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None: ...

        def do_GET(self) -> None:
            repo = self.path.removeprefix("/api/models/").split("/revision")[0]
            self.answer(200, {"id": repo, "sha": "0" * 40, "siblings": [], "private": True})

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            hub.tokens.add(self.headers.get("Authorization") or "")
            if hub.refuses:
                self.answer(403, {"error": "you may not write here"})
            elif self.path == "/api/repos/create":
                asked = json.loads(body)
                repo = f"{asked['organization']}/{asked['name']}"
                hidden = asked.get("visibility", "public") == "private" or bool(asked.get("private"))
                hub.private.setdefault(repo, hidden)
                self.answer(200, {"url": f"{hub.address}/{repo}", "name": repo, "id": repo})
            elif self.path == "/api/validate-yaml":
                card = json.loads(body)["content"]
                good = card.startswith("---\n") and "base_model: " in card and "library_name: " in card
                self.answer(200 if good else 400, {"errors": [], "warnings": []})
            elif "/preupload/" in self.path:
                files = [{**file, "uploadMode": "regular", "shouldIgnore": False} for file in json.loads(body)["files"]]
                self.answer(200, {"files": files})
            elif "/commit/" in self.path:
                repo = self.path.removeprefix("/api/models/").split("/commit")[0]
                for line in body.decode().splitlines():
                    entry = json.loads(line)
                    if entry["key"] == "file":
                        content = base64.b64decode(entry["value"]["content"])
                        hub.files.setdefault(repo, {})[entry["value"]["path"]] = content
                self.answer(
                    200, {"commitUrl": f"{hub.address}/{repo}/commit/1", "commitOid": "1" * 40, "success": True}
                )
            else:
                self.answer(404, {"error": self.path})

        def answer(self, code: int, content: Any) -> None:
            body = json.dumps(content).encode()
            self.send_response(code)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    return Handler
