"""A local server that answers like huggingface.co, for models and data sets."""

import hashlib
import http.server
import json
import re
import threading
from urllib.parse import unquote, urlsplit

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

    def do_GET(self):
        path = unquote(urlsplit(self.path).path)
        self.server.asked.append((self.command, path))
        if self.server.status:
            return self.send(self.server.status)
        if self.server.silent:
            self.server.over.wait(20)
            return None
        if path.startswith("/api/"):
            path = re.sub("^/api/(models|datasets)/", "", path)
            name, what, revision = [*re.split("/(revision|tree)/", path), "", "main"][:3]
        else:
            what = ""
            name, _, rest = path[1:].removeprefix("datasets/").partition("/resolve/")
            revision, _, file = rest.partition("/")
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
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
