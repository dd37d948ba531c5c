"""A hub on this machine: just what huggingface_hub asks of the real one to read a model, and to upload one."""

import base64
import hashlib
import json
import re
import socket
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import huggingface_hub
import pytest
import transformers.utils.hub
import yaml
from huggingface_hub import constants

Files = dict[str, bytes]
LFS = (".safetensors",)


@dataclass
class FakeHub:
    """Repositories by id and branch, what was asked of them, and how they misbehave."""

    endpoint: str = ""
    repos: dict[str, dict[str, Files]] = field(default_factory=dict)
    gated: set[str] = field(default_factory=set)
    asked: list[str] = field(default_factory=list)  # "GET /api/models/me/tiny", in turn
    served: Counter[str] = field(default_factory=Counter)  # bytes of each file that went out
    ranges: list[str] = field(default_factory=list)  # what resumed downloads asked for
    cut_after: int | None = None  # bytes, of the next large file: then the connection breaks
    writable: bool = True
    down: bool = False
    created: dict[str, dict[str, Any]] = field(default_factory=dict)
    uploads: Files = field(default_factory=dict)  # what came as large files, by its hash

    def add(self, name: str, folder: Path, branch: str = "main", **more: bytes) -> str:
        """Put a folder's files, and ``more`` by name, into a repository; return the commit."""
        files = {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}
        self.repos.setdefault(name, {})[branch] = files | {key.replace("__", "."): text for key, text in more.items()}
        return self.commit(name, branch)

    def commit(self, name: str, branch: str = "main") -> str:
        return commit_of(self.repos[name][branch])


def commit_of(files: Files) -> str:
    return hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()


class RefusedError(Exception):
    """What is answered instead: a status, and what the hub calls the reason."""

    def __init__(self, status: int, code: str = "", message: str = "") -> None:
        self.status, self.code, self.message = status, code, message


def handler(hub: FakeHub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None:
            pass

        def answer(self) -> None:
            path = unquote(urlsplit(self.path).path)
            hub.asked.append(f"{self.command} {path}")
            body = self.body()
            try:
                for pattern, method in routes.items():
                    if match := re.fullmatch(pattern, f"{self.command} {path}"):
                        method(self, *match.groups(), body) if self.command in "POST PUT" else method(
                            self, *match.groups()
                        )
                        return
                raise RefusedError(404)
            except RefusedError as refused:
                self.send_response(refused.status)
                for key, value in (("X-Error-Code", refused.code), ("X-Error-Message", refused.message)):
                    if value:
                        self.send_header(key, value)
                self.send_header("Content-Length", "0")
                self.end_headers()

        def body(self) -> bytes:
            if self.headers.get("Transfer-Encoding") != "chunked":
                return self.rfile.read(int(self.headers.get("Content-Length") or 0))
            chunks = []
            while size := int(self.rfile.readline(), 16):
                chunks.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(chunks)

        do_GET = do_HEAD = do_POST = do_PUT = answer  # noqa: N815

        def json(self, data: Any, status: int = 200) -> None:
            content = json.dumps(data).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def files(self, name: str, revision: str = "main") -> Files:
            if hub.down:
                raise RefusedError(503)
            if self.headers.get("Authorization") == "Bearer hf_expired":
                raise RefusedError(401, "", "Invalid credentials in Authorization header")
            if name not in hub.repos:
                raise RefusedError(404, "RepoNotFound")
            if name in hub.gated:
                raise RefusedError(403, "GatedRepo")
            for branch, files in hub.repos[name].items():
                if revision in (branch, commit_of(files)):
                    return files
            raise RefusedError(404, "RevisionNotFound")

        # --- reading

        def info(self, name: str, revision: str = "main") -> None:
            files = self.files(name, revision)
            self.json({"id": name, "sha": commit_of(files), "siblings": [{"rfilename": one} for one in files]})

        def tree(self, name: str, revision: str) -> None:
            files = self.files(name, revision)
            self.json(
                [
                    {"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                    for path, content in files.items()
                ]
            )

        def refs(self, name: str) -> None:
            branches = [
                {"name": branch, "ref": f"refs/heads/{branch}", "targetCommit": commit_of(files)}
                for branch, files in hub.repos[name].items()
            ]
            self.json({"branches": branches, "converts": [], "tags": []})

        def resolve(self, name: str, revision: str, path: str) -> None:
            files = self.files(name, revision)
            if path not in files:
                raise RefusedError(404, "EntryNotFound")
            content, whole = files[path], len(files[path])
            wanted = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
            start = int(wanted[1]) if wanted else 0
            self.send_response(206 if wanted else 200)
            self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
            self.send_header("X-Repo-Commit", commit_of(files))
            self.send_header("Content-Length", str(whole - start))
            if wanted:
                hub.ranges.append(wanted[0])
                self.send_header("Content-Range", f"bytes {start}-{whole - 1}/{whole}")
            self.end_headers()
            if self.command == "HEAD":
                return
            content = content[start:]
            if path.endswith(LFS) and hub.cut_after is not None:
                content, hub.cut_after = content[: hub.cut_after], None
                self.close_connection = True
            hub.served[path] += len(content)
            self.wfile.write(content)

        # --- writing

        def create(self, body: bytes) -> None:
            asked = json.loads(body)
            name = f"{asked['organization'] or 'me'}/{asked['name']}"
            if self.headers.get("Authorization") != "Bearer hf_test":
                raise RefusedError(401, "", "Invalid username or password.")
            known = name in hub.repos
            if not known:
                hub.created[name] = asked
                hub.repos[name] = {"main": {}}
            self.json({"url": f"{hub.endpoint}/{name}", "name": name}, 409 if known else 200)

        def auth_check(self, name: str) -> None:
            self.files(name)
            if not hub.writable:
                raise RefusedError(403, "", "You have no write access to it.")
            self.json({})

        def validate(self, body: bytes) -> None:
            block = re.match(r"---\n(.*?)\n---\n", json.loads(body)["content"], flags=re.DOTALL)
            if block is None or not isinstance(yaml.safe_load(block[1]), dict):
                self.json({"errors": [{"message": "no metadata"}]}, 400)
            else:
                self.json({})

        def preupload(self, _name: str, _revision: str, body: bytes) -> None:
            paths = [one["path"] for one in json.loads(body)["files"]]
            modes = [{"path": path, "uploadMode": "lfs" if path.endswith(LFS) else "regular"} for path in paths]
            self.json({"files": [{**one, "shouldIgnore": False, "oid": None} for one in modes]})

        def batch(self, _name: str, body: bytes) -> None:
            objects = json.loads(body)["objects"]
            self.json(
                {
                    "transfer": "basic",
                    "objects": [
                        {**one, "actions": {"upload": {"href": f"{hub.endpoint}/lfs/{one['oid']}"}}} for one in objects
                    ],
                }
            )

        def put(self, oid: str, body: bytes) -> None:
            assert hashlib.sha256(body).hexdigest() == oid
            hub.uploads[oid] = body
            self.json({})

        def receive(self, name: str, revision: str, body: bytes) -> None:
            files = dict(self.files(name, revision))
            for line in body.splitlines():
                operation = json.loads(line)
                value = operation["value"]
                if operation["key"] == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                if operation["key"] == "lfsFile":
                    files[value["path"]] = hub.uploads[value["oid"]]
            hub.repos[name][revision] = files
            oid = commit_of(files)
            self.json({"commitUrl": f"{hub.endpoint}/{name}/commit/{oid}", "commitOid": oid})

    name = r"([\w.-]+/[\w.-]+)"
    routes: dict[str, Callable[..., None]] = {
        rf"GET /api/models/{name}": Handler.info,
        rf"GET /api/models/{name}/revision/(.+)": Handler.info,
        rf"GET /api/models/{name}/tree/([^/]+)": Handler.tree,
        rf"GET /api/models/{name}/refs": Handler.refs,
        rf"GET /api/models/{name}/auth-check/write": Handler.auth_check,
        rf"(?:GET|HEAD) /{name}/resolve/([^/]+)/(.+)": Handler.resolve,
        r"POST /api/repos/create": Handler.create,
        r"POST /api/validate-yaml": Handler.validate,
        rf"POST /api/models/{name}/preupload/(.+)": Handler.preupload,
        rf"POST /{name}\.git/info/lfs/objects/batch": Handler.batch,
        r"PUT /lfs/(\w+)": Handler.put,
        rf"POST /api/models/{name}/commit/(.+)": Handler.receive,
    }
    return Handler


class Server(ThreadingHTTPServer):
    """A server of which nothing is left when it is closed.

    A thread that waits for a client's next request would write of its broken connection on the next test's stderr.
    """

    daemon_threads = False

    def __init__(self, *arguments: Any) -> None:
        self.connections: list[socket.socket] = []
        super().__init__(*arguments)

    def process_request(self, request: Any, client_address: Any) -> None:
        self.connections.append(request)
        super().process_request(request, client_address)

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), OSError):  # of a client that went away
            super().handle_error(request, client_address)

    def server_close(self) -> None:
        for connection in self.connections:
            with suppress(OSError):  # it is closed already
                connection.shutdown(socket.SHUT_RDWR)
        super().server_close()  # waits for the threads


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FakeHub]:
    """A hub that this process, and those it starts, take for the real one; with an empty cache, and a token."""
    fake = FakeHub()
    server = Server(("127.0.0.1", 0), handler(fake))
    fake.endpoint = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    cache = str(tmp_path / "cache")
    for name, value in {
        "HF_ENDPOINT": fake.endpoint,
        "HF_HOME": cache,
        "HF_HUB_CACHE": cache,
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_TOKEN": "hf_test",
    }.items():
        monkeypatch.setenv(name, value)
    reach(monkeypatch, fake.endpoint)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", cache)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    yield fake
    server.shutdown()
    server.server_close()
    huggingface_hub.close_session()


def reach(monkeypatch: pytest.MonkeyPatch, endpoint: str) -> None:
    """Let huggingface_hub, which read its environment when it was imported, ask ``endpoint``."""
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(transformers.utils.hub, "_hf_api", None, raising=False)  # made again when it is asked for
    monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", endpoint)  # by which transformers 5.5 pushes
