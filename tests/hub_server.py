"""A Hub on loopback: real HTTP, as huggingface_hub's client expects it of the real one.

Models and data sets with commits, trees by the page, files by range with ETags and hashes, large
ones from a storage host of their own, uploads by LFS, commits in one request. It can misbehave:
refuse, move, cut, stall, damage, forget ranges. It offers no Xet.
"""

import base64
import contextlib
import hashlib
import json
import re
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from gsae_core.checkpoints.hub import look, one_sae, parse_address
from gsae_core.runs.work.transfer import PullRequest, Transfer, ask

LARGE = (".safetensors", ".npz", ".pt", ".bin", ".parquet")
PAGE = 50  # entries of a tree in one answer
TOKEN = "hf_loopbacktoken"


@dataclass
class Repo:
    """A repository: commits of whole file trees, newest last."""

    kind: str
    name: str
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    private: bool = False
    gated: bool = False
    card: dict[str, Any] = field(default_factory=dict)

    def commit(self, files: dict[str, bytes | None], *, branch: str = "main") -> str:
        """Add a commit that sets files, or removes those that are None; return its id."""
        tree = dict(self.commits.get(self.refs.get(branch, ""), {}))
        for path, content in files.items():
            if content is None:
                tree.pop(path, None)
            else:
                tree[path] = content
        oid = hashlib.sha1(f"{self.name} {len(self.commits)}".encode()).hexdigest()
        self.commits[oid] = tree
        self.refs[branch] = oid
        return oid

    @property
    def head(self) -> dict[str, bytes]:
        return self.commits[self.refs["main"]]


@dataclass
class Seen:
    """A request that came in."""

    method: str
    path: str
    range: str | None
    authorization: str | None
    host: str


class Hub:
    """The repositories, and how the server misbehaves.

    Attributes:
        cut: path -> byte of the file at which its transfer breaks, and how many times it does.
        damaged: paths whose bytes come flipped.
        padded: paths that come longer than they say.
        no_ranges: whether ranges are taken no notice of.
        slow_seconds: pause between two pieces of a file.
        moved: old name -> new name.
        break_upload, break_commit: whether the connection ends in the middle of one.
        down: status that everything is answered with.
    """

    def __init__(self) -> None:
        self.repos: dict[tuple[str, str], Repo] = {}
        self.stored: dict[str, bytes] = {}
        self.seen: list[Seen] = []
        self.cut: dict[str, tuple[int, int]] = {}
        self.damaged: set[str] = set()
        self.padded: set[str] = set()
        self.no_ranges = False
        self.slow_seconds = 0.0
        self.moved: dict[str, str] = {}
        self.break_upload = self.break_commit = False
        self.down: int | None = None
        self.url = ""
        self.storage_url = ""
        self._names: dict[str, str] = {}

    def add(
        self, name: str, files: dict[str, bytes], *, kind: str = "models", **options: Any
    ) -> Repo:
        """Add a repository with one commit."""
        repo = self.repos[kind, name] = Repo(kind, name, **options)
        repo.commit(dict(files))
        return repo

    def store(self, path: str, content: bytes) -> str:
        oid = hashlib.sha256(content).hexdigest()
        self.stored[oid] = content
        self._names[oid] = path
        return oid

    def path_of(self, oid: str) -> str:
        return self._names.get(oid, "")

    def requests(self, method: str, part: str) -> list[Seen]:
        """Return the requests of a method whose path holds `part`."""
        return [one for one in self.seen if one.method == method and part in one.path]


@contextlib.contextmanager
def serving_hub() -> Iterator[Hub]:
    """Serve an empty Hub; files are under 127.0.0.1, its storage under localhost."""
    hub = Hub()

    class Handler(_Handler):
        pass

    Handler.hub = hub
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    port = server.server_address[1]
    hub.url, hub.storage_url = f"http://127.0.0.1:{port}", f"http://localhost:{port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class Refused(Exception):
    def __init__(self, status: int, code: str = "", message: str = "") -> None:
        super().__init__(message)
        self.status, self.code, self.message = status, code, message


def git_blob(content: bytes) -> str:
    return hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        self._answer()

    do_HEAD = do_POST = do_PUT = do_GET

    def _answer(self) -> None:
        self.close_connection = True
        where = urlsplit(self.path)
        self.query = parse_qs(where.query)
        path = where.path
        headers: Message = self.headers
        authorization = headers.get("Authorization")
        self.hub.seen.append(
            Seen(
                self.command,
                unquote(path),
                headers.get("Range"),
                authorization,
                headers.get("Host", ""),
            )
        )
        self.known = authorization == f"Bearer {TOKEN}"
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            try:
                if self.hub.down is not None:
                    raise Refused(self.hub.down)
                if authorization is not None and not self.known and "/storage/" not in path:
                    raise Refused(401, message="Invalid credentials in Authorization header")
                self._route(path)
            except Refused as refusal:
                self._body()
                self._send(
                    refusal.status,
                    json.dumps({"error": refusal.message}).encode(),
                    {"X-Error-Code": refusal.code, "X-Error-Message": refusal.message},
                )

    def _route(self, path: str) -> None:
        for pattern, method in ROUTES:
            if found := re.fullmatch(pattern, path):
                return getattr(self, method)(
                    **{k: unquote(v or "") for k, v in found.groupdict().items()}
                )
        raise Refused(404, message=f"no such address: {path}")

    # Reading

    def _repo(self, kind: str, name: str) -> Repo:
        if name in self.hub.moved:
            new = self.hub.moved[name]
            self._send(307, b"", {"Location": self.path.replace(name, new, 1)})
            raise BrokenPipeError
        repo = self.hub.repos.get((kind, name))
        if repo is None or (repo.private and not self.known):
            raise Refused(401 if not self.known else 404, "RepoNotFound", "Repository not found")
        return repo

    def _open(self, kind: str, name: str) -> Repo:
        repo = self._repo(kind, name)
        if repo.gated:
            raise Refused(403, "GatedRepo", "Access to this repository is restricted")
        return repo

    def _tree(self, repo: Repo, revision: str) -> tuple[str, dict[str, bytes]]:
        oid = repo.refs.get(revision, revision)
        if oid not in repo.commits:
            raise Refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return oid, repo.commits[oid]

    def info(self, kind: str, name: str, revision: str) -> None:
        repo = self._repo(kind, name)
        oid, tree = self._tree(repo, revision or "main")
        self._json(
            {
                "_id": "1",
                "id": repo.name,
                "sha": oid,
                "private": repo.private,
                "gated": "manual" if repo.gated else False,
                "siblings": [{"rfilename": path} for path in tree],
                "cardData": repo.card,
                "tags": [],
                "disabled": False,
                "downloads": 0,
                "likes": 0,
            }
        )

    def tree(self, kind: str, name: str, revision: str, folder: str) -> None:
        repo = self._open(kind, name)
        oid, files = self._tree(repo, revision)
        recursive = self.query.get("recursive", ["False"])[0].lower() in ("true", "1")
        entries = self._entries(files, folder.strip("/"), recursive)
        if folder and not entries:
            raise Refused(404, "EntryNotFound", f"{folder} does not exist on {revision}")
        start = int(self.query.get("cursor", ["0"])[0])
        headers = {"X-Repo-Commit": oid}
        if start + PAGE < len(entries):
            again = f"{self.hub.url}{urlsplit(self.path).path}?recursive={recursive}"
            headers["Link"] = f'<{again}&cursor={start + PAGE}>; rel="next"'
        self._json(entries[start : start + PAGE], headers)

    def _entries(
        self, files: dict[str, bytes], folder: str, recursive: bool
    ) -> list[dict[str, Any]]:
        prefix = f"{folder}/" if folder else ""
        entries: dict[str, dict[str, Any]] = {}
        for path, content in sorted(files.items()):
            if not path.startswith(prefix):
                continue
            rest = path.removeprefix(prefix).split("/")
            for depth in range(1, len(rest) if recursive else min(2, len(rest))):
                inner = prefix + "/".join(rest[:depth])
                entries[inner] = {"type": "directory", "path": inner, "oid": "0" * 40, "size": 0}
            if recursive or len(rest) == 1:
                entries[path] = self._entry(path, content)
        return list(entries.values())

    def _entry(self, path: str, content: bytes) -> dict[str, Any]:
        entry = {"type": "file", "path": path, "size": len(content), "oid": git_blob(content)}
        if path.endswith(LARGE):
            oid = self.hub.store(path, content)
            entry["lfs"] = {"oid": oid, "size": len(content), "pointerSize": 130}
        return entry

    def paths_info(self, kind: str, name: str, revision: str) -> None:
        body = self._body()
        repo = self._open(kind, name)
        _, files = self._tree(repo, revision)
        try:
            wanted = json.loads(body)["paths"]
        except ValueError:
            wanted = parse_qs(body.decode())["paths"]
        found = []
        for path in wanted if isinstance(wanted, list) else [wanted]:
            if path in files:
                found.append(self._entry(path, files[path]))
            elif any(other.startswith(f"{path}/") for other in files):
                found.append({"type": "directory", "path": path, "oid": "0" * 40, "size": 0})
        self._json(found)

    def resolve(self, kind: str, name: str, revision: str, path: str) -> None:
        kind = "datasets" if kind else "models"
        repo = self._open(kind, name)
        oid, files = self._tree(repo, revision)
        if path not in files:
            self._send(
                404,
                b"",
                {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": oid, "X-Error-Message": path},
            )
            return
        content = files[path]
        headers = {"X-Repo-Commit": oid}
        if path.endswith(LARGE):
            sha = self.hub.store(path, content)
            headers |= {
                "Location": f"{self.hub.storage_url}/storage/{sha}",
                "X-Linked-Etag": f'"{sha}"',
                "X-Linked-Size": str(len(content)),
                "ETag": f'"{git_blob(content)}"',
            }
            self._send(302, b"", headers)
        else:
            self._file(path, content, headers | {"ETag": f'"{git_blob(content)}"'})

    def storage(self, oid: str) -> None:
        if self.command == "PUT":
            self._upload(oid)
        elif oid in self.hub.stored:
            self._file(self.hub.path_of(oid), self.hub.stored[oid], {"ETag": f'"{oid}"'})
        else:
            raise Refused(404)

    def _file(self, path: str, content: bytes, headers: dict[str, str]) -> None:
        if path in self.hub.damaged:
            content = bytes(byte ^ 1 for byte in content)
        if path in self.hub.padded:
            content += b"more"
        start, stop, status = 0, len(content), 200
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if asked and not self.hub.no_ranges:
            start, status = int(asked[1]), 206
            stop = min(int(asked[2]) + 1, stop) if asked[2] else stop
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(content)}"
        body = content[start:stop]
        self._head(status, len(body), headers | {"Accept-Ranges": "bytes"})
        if self.command == "HEAD":
            return
        limit, times = self.hub.cut.get(path, (len(content), 0))
        if times:
            self.hub.cut[path] = (limit, times - 1)
            body = content[start : max(start, limit)]
        for at in range(0, len(body), 2**14):
            self.wfile.write(body[at : at + 2**14])
            self.wfile.flush()
            time.sleep(self.hub.slow_seconds)

    # Writing

    def create(self) -> None:
        fields = json.loads(self._body())
        self._need_token()
        name = "/".join(filter(None, [fields.get("organization"), fields["name"]]))
        if ("models", name) in self.hub.repos:
            raise Refused(409, message="You already created this model repo")
        private = fields.get("visibility") == "private" or bool(fields.get("private"))
        self.hub.add(name, {".gitattributes": b""}, private=private)
        self._json({"url": f"{self.hub.url}/{name}"})

    def validate(self) -> None:
        self._body()
        self._json({"errors": [], "warnings": []})

    def whoami(self) -> None:
        self._need_token()
        self._json({"name": "ada", "type": "user", "auth": {}})

    def preupload(self, kind: str, name: str, revision: str) -> None:
        fields = json.loads(self._body())
        self._need_token()
        self._repo(kind, name)
        self._json(
            {
                "files": [
                    {
                        "path": file["path"],
                        "uploadMode": "lfs" if file["path"].endswith(LARGE) else "regular",
                        "shouldIgnore": False,
                    }
                    for file in fields["files"]
                ]
            }
        )

    def lfs_batch(self, name: str) -> None:
        fields = json.loads(self._body())
        self._need_token()
        objects = []
        for wanted in fields["objects"]:
            entry: dict[str, Any] = {"oid": wanted["oid"], "size": wanted["size"]}
            if wanted["oid"] not in self.hub.stored:
                href = f"{self.hub.storage_url}/storage/{wanted['oid']}"
                entry["actions"] = {"upload": {"href": href}}
            objects.append(entry)
        self._json({"transfer": "basic", "objects": objects})

    def _upload(self, oid: str) -> None:
        if self.hub.break_upload:
            self.rfile.read(1)
            raise BrokenPipeError
        content = self._body()
        if hashlib.sha256(content).hexdigest() != oid:
            raise Refused(400, message="wrong checksum")
        self.hub.stored[oid] = content
        self._send(200, b"", {})

    def branch(self, kind: str, name: str, branch: str) -> None:
        self._body()
        self._need_token()
        repo = self._repo(kind, name)
        if branch in repo.refs:
            raise Refused(409, message="Reference already exists")
        repo.refs[branch] = repo.refs["main"]
        self._json({})

    def commits(self, kind: str, name: str, revision: str) -> None:
        lines = [json.loads(line) for line in self._body().splitlines() if line.strip()]
        self._need_token()
        repo = self._repo(kind, name)
        if self.hub.break_commit:
            raise BrokenPipeError
        changes: dict[str, bytes | None] = {}
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                changes[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                changes[value["path"]] = self.hub.stored[value["oid"]]
            elif line["key"] == "deletedFile":
                changes[value["path"]] = None
        oid = repo.commit(changes, branch=revision)
        self._json({"commitUrl": f"{self.hub.url}/{name}/commit/{oid}", "commitOid": oid})

    # HTTP

    def _need_token(self) -> None:
        if not self.known:
            raise Refused(401, message="Invalid username or password.")

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline().strip() or b"0", 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            return b"".join(parts)
        size = int(self.headers.get("Content-Length") or 0)
        # A second call, after a refusal, finds nothing left.
        del self.headers["Content-Length"]
        return self.rfile.read(size) if size else b""

    def _json(self, value: Any, headers: dict[str, str] | None = None) -> None:
        self._send(
            200, json.dumps(value).encode(), {"Content-Type": "application/json"} | (headers or {})
        )

    def _send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self._head(status, len(body), headers)
        if self.command != "HEAD":
            self.wfile.write(body)

    def _head(self, status: int, size: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            if value:
                self.send_header(name, value)
        self.send_header("Content-Length", str(size))
        self.send_header("Connection", "close")
        self.end_headers()


_KIND = r"/api/(?P<kind>models|datasets)/(?P<name>[^/]+/[^/]+|[^/]+)"
_REVISION = r"(?P<revision>[^/]+)"
ROUTES = (
    (rf"{_KIND}/tree/{_REVISION}(?P<folder>/.*)?", "tree"),
    (rf"{_KIND}/paths-info/{_REVISION}", "paths_info"),
    (rf"{_KIND}/preupload/{_REVISION}", "preupload"),
    (rf"{_KIND}/commit/{_REVISION}", "commits"),
    (rf"{_KIND}/branch/(?P<branch>[^/]+)", "branch"),
    (rf"{_KIND}(/revision/{_REVISION})?", "info"),
    (r"/api/repos/create", "create"),
    (r"/api/validate-yaml", "validate"),
    (r"/api/whoami-v2", "whoami"),
    (r"/storage/(?P<oid>\w+)", "storage"),
    (r"/(?P<name>[^/]+/[^/]+)\.git/info/lfs/objects/batch", "lfs_batch"),
    (
        rf"/(?P<kind>datasets/)?(?P<name>[^/]+/[^/]+|[^/]+)/resolve/{_REVISION}/(?P<path>.+)",
        "resolve",
    ),
)


def asked(root: Path, address: str = "ada/saes", to: str = "pulled") -> Transfer:
    """Return the transfer of the one SAE of a repository."""
    found = look(parse_address(address))
    sae = one_sae(found)
    return ask(root, PullRequest(found.repo, found.commit, sae.path, sae.library, sae.files, to))
