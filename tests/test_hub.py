"""Names on the Hugging Face hub, against a small server that plays the hub: pinned, resumed, refused, offline."""

import errno
import hashlib
import json
import shutil
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from huggingface_hub import constants, file_download
from huggingface_hub.utils import close_session

from cavelight.errors import UserError
from cavelight.spec.events import Event, Note, Phase
from cavelight.weights.hub import local_folder

NAME = "cave/light"
OLD, NEW = "a" * 40, "b" * 40
WEIGHTS = bytes(range(256)) * 4000
FILES = {
    "config.json": b"{}",
    "model.safetensors": WEIGHTS,
    "tokenizer.json": b'{"a": 1}',
    "tokenizer_config.json": b"{}",
    "generation_config.json": b"{}",
    "chat_template.jinja": b"{{ x }}",
    "modeling.py": b"import os",
    "pytorch_model.bin": b"pickle",
    "original/consolidated.safetensors": b"more",
}
FETCHED = {name for name in FILES if name not in {"modeling.py", "pytorch_model.bin"} and "/" not in name}


@dataclass
class Hub:
    """What the server has, does and saw."""

    commits: dict[str, dict[str, bytes]]
    refs: dict[str, str]
    refusal: tuple[int, str] | None = None  # status and error code for everything
    cut: int | None = None  # the first download of weights breaks off after this many bytes
    broken: bool = False  # every download of weights breaks off
    trickle: bool = False  # weights come slowly
    requests: list[tuple[str, str, str | None]] = field(default_factory=list)  # method, path, range

    def downloads(self) -> list[tuple[str, str | None]]:
        return [
            (path.rsplit("/", 1)[1], part)
            for method, path, part in self.requests
            if method == "GET" and "/resolve/" in path
        ]


class Answers(BaseHTTPRequestHandler):
    """As much of the hub's protocol as a snapshot takes: model info, file tree, files with ranges."""

    protocol_version = "HTTP/1.1"
    server: Any

    def do_GET(self) -> None:
        hub: Hub = self.server.hub
        path = urlsplit(self.path).path
        hub.requests.append((self.command, path, self.headers.get("Range")))
        if hub.refusal:
            status, code = hub.refusal
            return self.reply(status, b"", **{"X-Error-Code": code, "X-Error-Message": code})
        match path.strip("/").split("/"):
            case ["api", "models", *name, "revision", revision]:
                return self.info("/".join(name), hub.refs.get(revision, revision))
            case ["api", "models", *_, "tree", commit]:
                files = hub.commits[commit].items()
                tree = [{"type": "file", "path": n, "size": len(d), "oid": digest(d)} for n, d in files]
                return self.reply(200, json.dumps(tree).encode())
            case [_, _, "resolve", commit, *file]:
                return self.file(hub, commit, "/".join(file))
        raise AssertionError(path)

    do_HEAD = do_GET

    def info(self, name: str, commit: str) -> None:
        hub: Hub = self.server.hub
        if name != NAME:
            return self.reply(401, b"", **{"X-Error-Message": "Invalid username or password."})
        if commit not in hub.commits:
            return self.reply(404, b"", **{"X-Error-Code": "RevisionNotFound"})
        siblings = [{"rfilename": n, "size": len(d), "blobId": digest(d)} for n, d in hub.commits[commit].items()]
        self.reply(200, json.dumps({"id": name, "sha": commit, "siblings": siblings}).encode())

    def file(self, hub: Hub, commit: str, file: str) -> None:
        content = hub.commits[commit][file]
        start = int((self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").rstrip("-"))
        heads = {"ETag": f'"{digest(content)}"', "X-Repo-Commit": commit}
        if start:
            heads["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        stop = len(content)
        if self.command == "GET" and file.endswith(".safetensors") and (hub.cut or hub.broken):
            stop, hub.cut = start + (hub.cut or 0), None
        self.reply(206 if start else 200, content[start:stop], len(content) - start, **heads)

    def reply(self, status: int, content: bytes, length: int | None = None, **heads: str) -> None:
        length = len(content) if length is None else length
        self.send_response(status)
        for key, value in {"Content-Length": str(length), **heads}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            for at in range(0, len(content), 2**16):
                self.wfile.write(content[at : at + 2**16])
                threading.Event().wait(0.05 if self.server.hub.trickle else 0)
            self.close_connection = len(content) < length

    def log_message(self, *args: object) -> None:
        """Nothing on the screen."""


def digest(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub of its own, with a cache of its own: nothing of the machine's configuration is read or written."""
    server: Any = ThreadingHTTPServer(("127.0.0.1", 0), Answers)
    server.hub = Hub({OLD: FILES | {"config.json": b'{"old": 1}'}, NEW: FILES}, {"main": NEW, "v1": OLD})
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    endpoint = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    for variable in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "home" / "hub"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "home" / "token"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 2**16)
    monkeypatch.setattr(file_download.time, "sleep", lambda seconds: None)
    close_session()
    yield server.hub
    close_session()
    server.shutdown()
    server.server_close()


def content(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_only_what_matters_is_fetched_and_said(hub: Hub) -> None:
    events: list[Event] = []
    folder = local_folder(NAME, on_event=events.append)
    assert content(folder) == {name: FILES[name] for name in FETCHED}
    assert [event for event in events if isinstance(event, Note)] == [Note(f"{NAME}@main is commit {NEW}")]
    phases = [event for event in events if isinstance(event, Phase)]
    total = sum(len(FILES[name]) for name in FETCHED)
    assert phases[-1] == Phase(f"fetching {NAME}", total, total, "B")
    assert [phase.done for phase in phases] == sorted(phase.done for phase in phases)


def test_what_is_there_is_not_fetched_twice(hub: Hub) -> None:
    first = local_folder(NAME)
    hub.requests.clear()
    assert local_folder(NAME) == first
    assert hub.downloads() == []


@pytest.mark.parametrize("source", [(f"{NAME}@v1", None), (NAME, "v1"), (NAME, OLD)], ids=["@", "revision", "commit"])
def test_a_revision_is_pinned_to_its_commit(hub: Hub, source: tuple[str, str | None]) -> None:
    events: list[Event] = []
    folder = local_folder(*source, on_event=events.append)
    assert (folder / "config.json").read_bytes() == b'{"old": 1}'
    assert events[0] == Note(f"{NAME}@{source[1] or 'v1'} is commit {OLD}")
    files = [path for _, path, _ in hub.requests if "/resolve/" in path]
    assert files and all(f"/resolve/{OLD}/" in path for path in files)


def test_a_download_that_breaks_off_goes_on_where_it_broke(hub: Hub) -> None:
    hub.cut = 300_000
    folder = local_folder(NAME)
    assert (folder / "model.safetensors").read_bytes() == WEIGHTS
    assert [part for file, part in hub.downloads() if file == "model.safetensors"] == [None, f"bytes={4 * 2**16}-"]


def test_a_download_that_fails_for_good_keeps_what_is_complete(hub: Hub) -> None:
    hub.broken = True
    with pytest.raises(
        UserError, match=r"Fetching cave/light broke off. Got: RemoteProtocolError.*run the same command again"
    ):
        local_folder(NAME)
    hub.broken = False
    before = {file for file, _ in hub.downloads()} - {"model.safetensors"}
    hub.requests.clear()
    assert content(local_folder(NAME)) == {name: FILES[name] for name in FETCHED}
    assert (
        "model.safetensors" in {file for file, _ in hub.downloads()}
        and before & {f for f, _ in hub.downloads()} == set()
    )


def test_ctrl_c_stops_the_download(hub: Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("cavelight.weights.hub.LOOK", 0.02)
    hub.trickle = True
    seen: list[int] = []

    def interrupt(event: Event) -> None:
        if isinstance(event, Phase) and event.done > len(WEIGHTS) // 4:
            seen.append(event.done)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        local_folder(NAME, on_event=interrupt)
    assert seen[0] < len(WEIGHTS)
    assert not [name for name in content(tmp_path) if name.endswith("model.safetensors")]
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("ThreadPoolExecutor")]


@pytest.mark.parametrize("revision", [None, "main", NEW])
def test_offline_a_complete_copy_will_do(hub: Hub, monkeypatch: pytest.MonkeyPatch, revision: str | None) -> None:
    online = local_folder(NAME)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    close_session()
    events: list[Event] = []
    assert local_folder(NAME, revision, events.append) == online
    (note,) = events
    assert isinstance(note, Note)
    assert "cannot be reached" in note.text and f"the copy of commit {NEW} that was fetched before" in note.text


def test_offline_a_copy_with_a_hole_will_not_do(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    (local_folder(NAME) / "model.safetensors").unlink()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    close_session()
    with pytest.raises(UserError, match="cannot be reached for cave/light"):
        local_folder(NAME)


def test_nobody_listens(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")
    with pytest.raises(UserError, match=r"cannot be reached for cave/light.*Got: ConnectError.*Do: check the network"):
        local_folder(NAME)


@pytest.mark.parametrize(
    ("refusal", "message"),
    [
        ((403, "GatedRepo"), "is open only to those who accepted its terms.*HF_TOKEN"),
        ((401, "GatedRepo"), "is open only to those who accepted its terms"),
        ((404, "RepoNotFound"), "neither a folder cave/light here nor a model cave/light on the Hugging Face hub"),
        ((401, ""), "refuses cave/light.*log in with"),
        ((403, "DisabledRepo"), "refuses cave/light"),
        ((500, ""), "refuses cave/light.*try later"),
        ((429, ""), "refuses cave/light.*try later"),
    ],
)
def test_refusals(hub: Hub, refusal: tuple[int, str], message: str) -> None:
    hub.refusal = refusal
    with pytest.raises(UserError, match=message):
        local_folder(NAME)


def test_a_revision_that_is_not_there(hub: Hub) -> None:
    with pytest.raises(UserError, match="cave/light has no revision v7"):
        local_folder(f"{NAME}@v7")


def test_a_repository_without_weights(hub: Hub) -> None:
    hub.commits[NEW] = {"config.json": b"{}", "model.gguf": b"GGUF"}
    with pytest.raises(UserError, match=r"holds no checkpoint that can be read. Got: config.json, model.gguf"):
        local_folder(NAME)
    assert hub.downloads() == []


def test_a_disk_that_is_too_small(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(UserError, match=r"does not fit on the disk. Got: 0.0 GB to fetch, 0.0 GB free"):
        local_folder(NAME)
    assert hub.downloads() == []


def test_a_disk_that_fills_up(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(file_download, "http_get", full)
    with pytest.raises(UserError, match="The disk is full while writing"):
        local_folder(NAME)


def test_folders_are_taken_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "cave" / "light"
    folder.mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert local_folder(folder) == folder
    assert local_folder("cave/light") == Path("cave/light")
    with pytest.raises(UserError, match="is a folder, which has no revisions"):
        local_folder(folder, "main")


@pytest.mark.parametrize(
    "source",
    [
        *("gpt2", "/nowhere/at/all", "./cave/light", "a/b/c", "../a", "a/b@", "a/b@../../x", "a/..", "", "a b/c"),
        *("x" * 5000, "~nobody-here/model", "a\0b", "link"),
    ],
    ids=lambda source: source[:20] or "empty",
)
def test_what_is_neither_a_folder_nor_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str) -> None:
    (tmp_path / "inside").mkdir()
    (tmp_path / "inside" / "link").symlink_to("link")
    monkeypatch.chdir(tmp_path / "inside")
    with pytest.raises(UserError, match=r"There is no folder|is a folder"):
        local_folder(source, "main")


def test_two_revisions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"cave/light@v1 names a revision already. Got: v2 besides"):
        local_folder("cave/light@v1", "v2")
