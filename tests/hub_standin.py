"""A stand-in for the hub on 127.0.0.1: the parts of its HTTP interface that its client uses here.

Model information, file tree, resolve with ETag, X-Repo-Commit and ranges (large files by a redirect
to another host, as on the hub), creation of repositories, preupload, git-LFS and commits.
"""

from __future__ import annotations

import base64
import hashlib
import http.server
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest

TOKEN = "hf_made_up"
LFS = (".safetensors", ".bin", ".tiktoken")
"""Endings of files that the hub keeps outside of git."""


@dataclass
class Repo:
    """A repository: its branches, each the commit (by number) and files it stands at."""

    branches: dict[str, tuple[str, dict[str, bytes]]] = field(default_factory=dict)
    gated: bool = False
    private: bool = False

    def commit(self, files: dict[str, bytes], branch: str = "main") -> str:
        """Set the files of a branch; returns the commit's sha."""
        text = json.dumps({name: hashlib.sha1(data).hexdigest() for name, data in files.items()})
        sha = hashlib.sha1(f"{len(self.branches)} {branch} {text}".encode()).hexdigest()
        self.branches[branch] = (sha, dict(files))
        return sha

    def at(self, revision: str) -> tuple[str, dict[str, bytes]] | None:
        """(sha, files) of a branch or commit."""
        if revision in self.branches:
            return self.branches[revision]
        return next((b for b in self.branches.values() if b[0] == revision), None)


@dataclass
class Hub:
    """Its state. requests: (method, path, headers) of each; cuts: answers still to break off."""

    repos: dict[str, Repo] = field(default_factory=dict)
    requests: list[tuple[str, str, dict[str, str]]] = field(default_factory=list)
    cuts: int = 0
    refuses: bool = False
    """Creating repositories is forbidden."""
    lfs: dict[str, bytes] = field(default_factory=dict)
    url: str = ""

    def add(self, name: str, directory: Path, branch: str = "main", **flags: Any) -> Repo:
        """A repository with a directory's files."""
        repo = self.repos.setdefault(name, Repo())
        for flag, value in flags.items():
            setattr(repo, flag, value)
        repo.commit(
            {
                path.relative_to(directory).as_posix(): path.read_bytes()
                for path in sorted(directory.rglob("*"))
                if path.is_file()
            },
            branch,
        )
        return repo

    def fetched(self) -> list[str]:
        """Names of the files whose content was asked for, in order."""
        names = {
            f"/cdn/{hashlib.sha256(data).hexdigest()}": name
            for repo in self.repos.values()
            for _, files in repo.branches.values()
            for name, data in files.items()
        }
        asked = [path for method, path, _ in self.requests if method == "GET"]
        found = [re.match(r"/[^/]+/[^/]+/resolve/[^/]+/(.+)", path) for path in asked]
        named = [f[1] if f else names.get(p) for f, p in zip(found, asked, strict=True)]
        return [name for name in named if name]


class Handler(http.server.BaseHTTPRequestHandler):
    """One request to the Hub in `self.server.hub`."""

    protocol_version = "HTTP/1.1"

    @property
    def hub(self) -> Hub:
        return self.server.hub  # type: ignore[attr-defined]

    def do_GET(self) -> None:
        self._answer()

    do_HEAD = do_POST = do_PUT = do_GET

    def log_message(self, *_: Any) -> None:
        pass

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append(
            (self.command, path, {k.lower(): v for k, v in self.headers.items()})
        )
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        for pattern, answer in (
            (r"/api/repos/create", self._create),
            (r"/api/validate-yaml", lambda: self._json({"errors": [], "warnings": []})),
            (r"/api/models/([^/]+/[^/]+)(?:/revision/([^/]+))?", self._info),
            (r"/api/models/([^/]+/[^/]+)/tree/([^/]+)", self._tree),
            (r"/api/models/([^/]+/[^/]+)/branch/([^/]+)", self._branch),
            (r"/api/models/([^/]+/[^/]+)/preupload/([^/]+)", self._preupload),
            (r"/api/models/([^/]+/[^/]+)/commit/([^/]+)", self._commit),
            (r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", self._lfs_batch),
            (r"/lfs/([0-9a-f]{64})", self._lfs_put),
            (r"/cdn/([0-9a-f]{64})", self._cdn),
            (r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", self._resolve),
        ):
            if found := re.fullmatch(pattern, path):
                answer(*found.groups())
                return
        self._fail(404, "EntryNotFound")

    # ---- reading

    def _found(self, name: str, revision: str | None) -> tuple[str, dict[str, bytes]] | None:
        """(sha, files), or an answer that says what is wrong, as the hub words it."""
        token = self.headers.get("Authorization")
        repo = self.hub.repos.get(name)
        if token not in (None, f"Bearer {TOKEN}"):
            self._fail(401, None, "Invalid credentials in Authorization header")
        elif repo is None or (repo.private and token is None):
            self._fail(401 if token is None else 404, "RepoNotFound", "Repository not found")
        elif (found := repo.at(revision or "main")) is None:
            self._fail(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        else:
            return found
        return None

    def _info(self, name: str, revision: str | None) -> None:
        if found := self._found(name, revision):
            sha, files = found
            siblings = [{"rfilename": file} for file in files]
            self._json(
                {
                    "id": name,
                    "sha": sha,
                    "siblings": siblings,
                    "private": self.hub.repos[name].private,
                }
            )

    def _tree(self, name: str, revision: str) -> None:
        if found := self._found(name, revision):
            entries: list[dict[str, Any]] = []
            for file, data in found[1].items():
                entry = {"type": "file", "path": file, "size": len(data), "oid": "0" * 40}
                if file.endswith(LFS):
                    oid = hashlib.sha256(data).hexdigest()
                    entry["lfs"] = {"oid": oid, "size": len(data), "pointerSize": 134}
                entries.append(entry)
            self._json(entries)

    def _resolve(self, name: str, revision: str, file: str) -> None:
        if not (found := self._found(name, revision)):
            return
        sha, files = found
        if self.hub.repos[name].gated and "Authorization" not in self.headers:
            self._fail(401, "GatedRepo", "Access to model is restricted")
        elif file not in files:
            self._fail(404, "EntryNotFound", "Entry not found", {"X-Repo-Commit": sha})
        elif file.endswith(LFS):
            oid = hashlib.sha256(files[file]).hexdigest()
            self.hub.lfs[oid] = files[file]
            # Another host name: the token must not follow.
            location = self.hub.url.replace("127.0.0.1", "localhost") + f"/cdn/{oid}"
            linked = {"X-Linked-ETag": f'"{oid}"', "X-Linked-Size": str(len(files[file]))}
            self._send(302, b"", {"Location": location, "X-Repo-Commit": sha, **linked})
        else:
            self._content(files[file], {"X-Repo-Commit": sha})

    def _cdn(self, oid: str) -> None:
        self._content(self.hub.lfs[oid], {})

    def _content(self, data: bytes, headers: dict[str, str]) -> None:
        headers |= {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "Accept-Ranges": "bytes"}
        status, begin = 200, 0
        if wanted := self.headers.get("Range"):
            begin = int(wanted.removeprefix("bytes=").partition("-")[0])
            status = 206
            headers["Content-Range"] = f"bytes {begin}-{len(data) - 1}/{len(data)}"
        self._send(status, data[begin:], headers, may_be_cut=True)

    # ---- writing

    def _create(self) -> None:
        wanted = json.loads(self.body)
        name = f"{wanted.get('organization') or 'someone'}/{wanted['name']}"
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self._fail(401, None, "Invalid credentials in Authorization header")
        elif self.hub.refuses:
            self._fail(
                403, None, "You don't have the rights to create a model under this namespace"
            )
        elif name in self.hub.repos:
            self._json({"error": "You already created this model repo", "url": name}, 409)
        else:
            repo = self.hub.repos[name] = Repo()
            repo.private = wanted.get("visibility") == "private" or wanted.get("private") is True
            repo.commit({})
            self._json({"url": f"{self.hub.url}/{name}", "name": name, "id": name})

    def _branch(self, name: str, branch: str) -> None:
        if self._found(name, None):
            repo = self.hub.repos[name]
            if branch in repo.branches:
                self._json({"error": "Reference already exists"}, 409)
                return
            repo.commit(repo.branches["main"][1], branch)
            self._json({})

    def _preupload(self, name: str, revision: str) -> None:
        if self._found(name, revision):
            files = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith(LFS) else "regular",
                    "shouldIgnore": False,
                    "oid": None,
                }
                for file in json.loads(self.body)["files"]
            ]
            self._json({"files": files})

    def _lfs_batch(self, name: str) -> None:
        objects = [
            {**entry, "actions": {"upload": {"href": f"{self.hub.url}/lfs/{entry['oid']}"}}}
            for entry in json.loads(self.body)["objects"]
        ]
        self._json({"transfer": "basic", "objects": objects})

    def _lfs_put(self, oid: str) -> None:
        assert hashlib.sha256(self.body).hexdigest() == oid
        self.hub.lfs[oid] = self.body
        self._send(200, b"", {})

    def _commit(self, name: str, revision: str) -> None:
        if not (found := self._found(name, revision)):
            return
        files = dict(found[1])
        for line in self.body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                files[value["path"]] = self.hub.lfs[value["oid"]]
            elif entry["key"] == "deletedFile":
                del files[value["path"]]
        sha = self.hub.repos[name].commit(files, revision)
        self._json({"commitUrl": f"{self.hub.url}/{name}/commit/{sha}", "commitOid": sha})

    # ---- answers

    def _json(self, content: Any, status: int = 200) -> None:
        self._send(status, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def _fail(
        self, status: int, code: str | None, message: str = "", more: dict[str, str] | None = None
    ) -> None:
        headers = {"X-Error-Message": message, **(more or {})}
        if code:
            headers["X-Error-Code"] = code
        self._send(status, json.dumps({"error": message}).encode(), headers)

    def _send(
        self, status: int, body: bytes, headers: dict[str, str], may_be_cut: bool = False
    ) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if may_be_cut and self.hub.cuts and len(body) > 1000:
            self.hub.cuts -= 1
            body = body[: len(body) // 2]
            self.close_connection = True
        self.wfile.write(body)


@contextmanager
def serving(monkeypatch: pytest.MonkeyPatch, cache: Path) -> Iterator[Hub]:
    """The stand-in, and this process's hub client pointed at it, with a cache of its own."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        hub = server.hub = Hub(url=f"http://127.0.0.1:{server.server_address[1]}")
        constants = "huggingface_hub.constants."
        template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants + "ENDPOINT", hub.url)
        monkeypatch.setattr(constants + "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants + "HF_HUB_CACHE", str(cache))
        monkeypatch.setattr(constants + "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants + "DOWNLOAD_CHUNK_SIZE", 1000)
        monkeypatch.setattr(constants + "HF_TOKEN_PATH", str(cache / "no token"))
        monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
        monkeypatch.delenv("HF_TOKEN", raising=False)
        thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        try:
            yield hub
        finally:
            server.shutdown()
            thread.join()
