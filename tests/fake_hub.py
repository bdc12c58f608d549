"""A local server that answers like huggingface.co, for models and data sets."""

import base64
import hashlib
import http.server
import json
import re
import threading
from urllib.parse import unquote, urlsplit

import yaml
from huggingface_hub import constants

COMMIT, OLD = "a" * 40, "b" * 40


class Hub(http.server.ThreadingHTTPServer):
    """Repositories by name and commit."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Answer)
        self.repositories, self.asked, self.ranges = {}, [], []
        self.cut = {}
        """The number of bytes of a file after which the connection is cut, once."""
        self.main, self.gated, self.tokens = COMMIT, set(), set()
        self.configs = {}
        """The `configs` of the card of data sets, by name."""
        self.writers = {}
        """The owners to whose repositories each token may write."""
        self.private, self.objects = set(), {}
        self.status, self.silent, self.over = None, False, threading.Event()
        self.endpoint = f"http://127.0.0.1:{self.server_address[1]}"
        self.thread = threading.Thread(target=self.serve_forever, args=(0.01,))
        self.thread.start()

    def add(self, name, files, commit=COMMIT):
        self.repositories.setdefault(name, {})[commit] = files

    def asked_for(self, method):
        return [path.rpartition("/")[2] for m, path in self.asked if m == method]

    def stop(self):
        if self.thread.is_alive():
            self.over.set()
            self.shutdown()
            self.thread.join()
            self.server_close()


def sha1(content):
    return hashlib.sha1(content, usedforsecurity=False).hexdigest()


class Answer(http.server.BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def send(self, status, content=b"", cut=None, **headers):
        self.send_response(status)
        for name, value in {"Content-Length": len(content), **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content[:cut])

    @property
    def token(self):
        return self.headers.get("Authorization", "").removeprefix("Bearer ")

    def do_PUT(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.objects[hashlib.sha256(body).hexdigest()] = body
        self.send(200)

    def do_POST(self):
        path = unquote(urlsplit(self.path).path)
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.asked.append((self.command, path))
        lines = [json.loads(line) for line in body.splitlines()]
        if self.server.status:
            return self.send(self.server.status)
        if path == "/api/validate-yaml":
            return self.send(200, b'{"errors": [], "warnings": []}')
        if path == "/api/repos/create":
            (asked,) = lines
            owner, repositories = asked.get("organization"), self.server.repositories
            if owner != self.server.writers.get(self.token):
                return self.send(403, X_Error_Message="You cannot create repositories there.")
            name = f"{owner}/{asked['name']}"
            if name in repositories:
                return self.send(409)
            is_private = asked.get("private") or asked.get("visibility") == "private"
            repositories[name] = {self.server.main: {".gitattributes": b""}}
            self.server.private |= {name} if is_private else set()
            return self.send(200, json.dumps({"url": f"{self.server.endpoint}/{name}"}).encode())
        name, what = re.fullmatch("/(?:api/models/)?([^/]+/[^/]+?)(?:[.]git)?/(.*)", path).groups()
        if name.partition("/")[0] != self.server.writers.get(self.token):
            return self.send(403, X_Error_Message="This token may only read.")
        if what == "preupload/main":
            modes = {True: "lfs", False: "regular"}
            files = [
                {"path": p, "uploadMode": modes[p.endswith(".safetensors")], "shouldIgnore": False}
                for p in (file["path"] for file in lines[0]["files"])
            ]
            return self.send(200, json.dumps({"files": files}).encode())
        if what == "info/lfs/objects/batch":
            objects = [
                {**one, "actions": {"upload": {"href": f"{self.server.endpoint}/lfs"}}}
                for one in lines[0]["objects"]
            ]
            return self.send(200, json.dumps({"objects": objects}).encode())
        assert what == "commit/main"
        files = self.server.repositories[name][self.server.main]
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.server.objects[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        url = f"{self.server.endpoint}/{name}/commit/{self.server.main}"
        answer = {"success": True, "commitUrl": url, "commitOid": self.server.main}
        return self.send(200, json.dumps(answer).encode())

    def do_GET(self):
        path = unquote(urlsplit(self.path).path)
        self.server.asked.append((self.command, path))
        if self.server.status:
            return self.send(self.server.status)
        if self.server.silent:
            self.server.over.wait(20)
            return None
        if path == "/api/whoami-v2":
            if (token := self.token) in self.server.writers:
                return self.send(200, json.dumps({"name": self.server.writers[token]}).encode())
            return self.send(401, X_Error_Message="Invalid username or password.")
        if path.startswith("/api/"):
            path = re.sub("^/api/(models|datasets)/", "", path)
            found = [*re.split("/(revision|tree)/", path), "revision", "main"]
            name, what, revision = found[:3]
        else:
            what = ""
            name, _, rest = path[1:].removeprefix("datasets/").partition("/resolve/")
            revision, _, file = rest.partition("/")
        token = self.token
        if token == "wrong":
            return self.send(401, X_Error_Message="Invalid credentials in Authorization header")
        if name not in self.server.repositories:
            # Like huggingface.co, which answers alike for private and missing repositories.
            if token:
                return self.send(404, X_Error_Code="RepoNotFound")
            return self.send(401, X_Error_Message="Invalid username or password.")
        commits = self.server.repositories[name]
        commit = self.server.main if revision == "main" else revision
        if commit not in commits:
            return self.send(404, X_Error_Code="RevisionNotFound")
        files = commits[commit]
        if what == "tree":
            entries = [
                {"type": "file", "path": file, "size": len(content), "oid": sha1(content)}
                for file, content in files.items()
            ]
            return self.send(200, json.dumps(entries).encode())
        if what:
            about = {"id": name, "sha": commit, "siblings": [{"rfilename": f} for f in files]}
            about["private"] = name in self.server.private
            card = files.get("README.md", b"").decode().split("---\n")
            about["tags"] = (yaml.safe_load(card[1]) if len(card) > 2 else {}).get("tags", [])
            if name in self.server.configs:
                about["cardData"] = {"configs": self.server.configs[name]}
            return self.send(200, json.dumps(about).encode())
        if name in self.server.gated and token not in self.server.tokens:
            return self.send(403 if token else 401, X_Error_Code="GatedRepo")
        if file not in files:
            return self.send(404, X_Error_Code="EntryNotFound", X_Repo_Commit=commit)
        etag = f'"{sha1(files[file])}"'
        start, headers = 0, {"ETag": etag, "X_Repo_Commit": commit}
        if asked := self.headers.get("Range"):
            self.server.ranges.append(asked)
            size = len(files[file])
            first, last = asked.removeprefix("bytes=").split("-")
            start, end = int(first), min(int(last or size - 1) + 1, size)
            headers["Content_Range"] = f"bytes {start}-{end - 1}/{size}"
        else:
            end = None
        cut = self.server.cut.pop(file, None) if self.command == "GET" else None
        return self.send(206 if asked else 200, files[file][start:end], cut, **headers)

    do_HEAD = do_GET


def running_hub(monkeypatch, tmp_path):
    """A server, and an empty cache; `server = pytest.fixture(running_hub)` in a test file."""
    server = Hub()
    monkeypatch.setenv("HF_ENDPOINT", server.endpoint)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    for name in ("HF_TOKEN", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    yield server
    server.stop()
