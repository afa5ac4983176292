"""A small server with the parts of the Hugging Face hub's HTTP API that the real `huggingface_hub` uses to list and download.

Repositories are dictionaries of files at commits; large files (`.safetensors`, `.parquet`, `.bin`) have sha256 ETags and are
redirected, as on the hub. It knows of gated repositories and tokens, of Range requests, and can cut or hold a download midway.
"""

from __future__ import annotations

import asyncio
import hashlib
import threading
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, RedirectResponse, Response, StreamingResponse
from starlette.routing import Route

LARGE = (".safetensors", ".parquet", ".bin")
TOKEN = "hf_the_right_one"
PIECE = 64 * 1024


@dataclass
class Repo:
    """A repository: what each commit holds, and what each branch or tag is."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    gated: bool = False
    private: bool = False

    def commit(self, files: Mapping[str, bytes], *refs: str) -> str:
        """A new commit with these files, which `refs` (main) are then; its id."""
        sha = hashlib.sha1(repr((len(self.commits), sorted(files.items()))).encode()).hexdigest()
        self.commits[sha] = dict(files)
        for ref in refs or ("main",):
            self.refs[ref] = sha
        return sha


@dataclass
class FakeHub:
    """The server, from `with` to its end; `url` is for HF_ENDPOINT."""

    models: dict[str, Repo] = field(default_factory=dict)
    datasets: dict[str, Repo] = field(default_factory=dict)
    requests: list[tuple[str, str, str]] = field(default_factory=list)
    """Method, path and Range header of each request."""
    cut_after: int | None = None
    """Bytes of one large file after which its connection is cut, once."""
    hold_after: int | None = None
    """Bytes of a large file after which it waits until `go_on` is set."""
    go_on: threading.Event = field(default_factory=threading.Event)
    held: threading.Event = field(default_factory=threading.Event)
    """Set when a download waits."""
    corrupt: bool = False
    """Large files come with one byte changed."""
    busy: bool = False
    """Every request is answered 503."""

    def __post_init__(self) -> None:
        routes = []
        for prefix, api in (("", "models"), ("/datasets", "datasets")):
            routes += [
                Route(f"/api/{api}/{{org}}/{{name}}", self.info),
                Route(f"/api/{api}/{{org}}/{{name}}/refs", self.refs),
                Route(f"/api/{api}/{{org}}/{{name}}/revision/{{revision:path}}", self.info),
                Route(f"{prefix}/{{org}}/{{name}}/resolve/{{revision}}/{{path:path}}", self.resolve),
            ]
        routes.append(Route("/storage/{sha256}", self.storage))
        self._server = uvicorn.Server(
            uvicorn.Config(Starlette(routes=routes), host="127.0.0.1", port=0, lifespan="off", log_config=None)
        )
        self._thread = threading.Thread(target=self._server.run, daemon=True)

    def __enter__(self) -> FakeHub:
        self._thread.start()
        while not self._server.started:
            time.sleep(0.01)
        self.url = f"http://127.0.0.1:{self._server.servers[0].sockets[0].getsockname()[1]}"
        return self

    def __exit__(self, *exc: object) -> None:
        self.go_on.set()
        self._server.should_exit = self._server.force_exit = True
        self._thread.join()

    def model(self, name: str, files: Mapping[str, bytes], **options: Any) -> Repo:
        """A model repository with one commit on main."""
        repo = self.models[name] = Repo(**options)
        repo.commit(files)
        return repo

    def dataset(self, name: str, files: Mapping[str, bytes], **options: Any) -> Repo:
        """A dataset repository with one commit on main."""
        repo = self.datasets[name] = Repo(**options)
        repo.commit(files)
        return repo

    def downloads(self) -> list[str]:
        """Paths of the GET requests for files so far."""
        return [path for method, path, _ in self.requests if method == "GET" and "/resolve/" in path]

    def ranges(self) -> list[str]:
        """The Range headers of requests for large files, as they came."""
        return [
            span for method, path, span in self.requests if method == "GET" and path.startswith("/storage/") and span
        ]

    async def info(self, request: Request) -> Response:
        """What a repository holds at a revision."""
        repo, sha, refusal = self._find(request)
        if refusal is not None:
            return refusal
        assert repo is not None
        siblings = [
            {"rfilename": path, "size": len(content), "blobId": _git(content), **_lfs(path, content)}
            for path, content in repo.commits[sha].items()
        ]
        name = "{org}/{name}".format(**request.path_params)
        return JSONResponse(
            {"id": name, "modelId": name, "sha": sha, "private": repo.private, "gated": "manual" if repo.gated else False,
             "siblings": siblings, "tags": [], "downloads": 0, "likes": 0}
        )  # fmt: skip

    async def refs(self, request: Request) -> Response:
        """The branches of a repository."""
        repo, _, refusal = self._find(request)
        if refusal is not None:
            return refusal
        assert repo is not None
        branches = [{"name": name, "ref": f"refs/heads/{name}", "targetCommit": sha} for name, sha in repo.refs.items()]
        return JSONResponse({"branches": branches, "tags": [], "converts": []})

    async def resolve(self, request: Request) -> Response:
        """A file at a revision: small ones at once, large ones by redirect."""
        repo, sha, refusal = self._find(request)
        if refusal is not None:
            return refusal
        assert repo is not None
        if repo.gated and request.headers.get("authorization") != f"Bearer {TOKEN}":
            return _refused(403, "GatedRepo", "Access to this repository is restricted")
        path = request.path_params["path"]
        content = repo.commits[sha].get(path)
        if content is None:
            return _refused(404, "EntryNotFound", "Entry not found")
        headers = {"X-Repo-Commit": sha}
        if path.endswith(LARGE):
            digest = hashlib.sha256(content).hexdigest()
            headers |= {"X-Linked-Etag": f'"{digest}"', "X-Linked-Size": str(len(content))}
            # Another host, as the hub's storage is: a client sends no token there.
            storage = self.url.replace("127.0.0.1", "localhost")
            return RedirectResponse(f"{storage}/storage/{digest}", 302, headers=headers)
        return self._bytes(request, content, {**headers, "ETag": f'"{_git(content)}"'})

    async def storage(self, request: Request) -> Response:
        """A large file by its digest."""
        self._note(request)
        assert "authorization" not in request.headers, "the token was sent to another host"
        wanted = request.path_params["sha256"]
        repos = (*self.models.values(), *self.datasets.values())
        contents = (content for repo in repos for files in repo.commits.values() for content in files.values())
        content = next(content for content in contents if hashlib.sha256(content).hexdigest() == wanted)
        if self.corrupt:
            content = bytes([content[0] ^ 1]) + content[1:]
        return self._bytes(request, content, {"ETag": f'"{wanted}"'}, large=True)

    def _bytes(self, request: Request, content: bytes, headers: dict[str, str], *, large: bool = False) -> Response:
        start, status = 0, 200
        if (span := request.headers.get("range", "")).startswith("bytes="):
            start, status = int(span.removeprefix("bytes=").partition("-")[0]), 206
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        headers |= {"Content-Length": str(len(content) - start), "Accept-Ranges": "bytes"}

        async def pieces() -> AsyncIterator[bytes]:
            for place in range(start, len(content), PIECE):
                if large and self.cut_after is not None and place >= self.cut_after:
                    self.cut_after = None
                    raise ConnectionResetError("cut by the test")
                if large and self.hold_after is not None and place >= self.hold_after:
                    self.held.set()
                    while not self.go_on.is_set():
                        await asyncio.sleep(0.01)
                yield content[place : place + PIECE]

        return StreamingResponse(pieces(), status, headers=headers)

    def _find(self, request: Request) -> tuple[Repo | None, str, Response | None]:
        self._note(request)
        if self.busy:
            return None, "", Response("down for maintenance", 503)
        token = request.headers.get("authorization")
        if token not in (None, f"Bearer {TOKEN}"):
            return None, "", JSONResponse({"error": "Invalid credentials in Authorization header"}, 401)
        path = request.url.path
        kept = self.datasets if path.startswith(("/api/datasets/", "/datasets/")) else self.models
        repo = kept.get("{org}/{name}".format(**request.path_params))
        if repo is None or (repo.private and token is None):
            return None, "", _refused(401 if token is None else 404, "RepoNotFound", "Repository not found")
        revision = request.path_params.get("revision", "main")
        sha = repo.refs.get(revision, revision)
        if sha not in repo.commits:
            return None, "", _refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return repo, sha, None

    def _note(self, request: Request) -> None:
        self.requests.append((request.method, request.url.path, request.headers.get("range", "")))


def _refused(status: int, code: str, message: str) -> Response:
    return JSONResponse({"error": message}, status, headers={"X-Error-Code": code, "X-Error-Message": message})


def _git(content: bytes) -> str:
    return hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()


def _lfs(path: str, content: bytes) -> dict[str, Any]:
    if not path.endswith(LARGE):
        return {}
    return {"lfs": {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 130}}
