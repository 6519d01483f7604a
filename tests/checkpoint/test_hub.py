"""Downloading, against a local stand-in for the Hub's HTTP interface that can drop connections."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote

import pytest
import torch

from openm3.checkpoint import CheckpointError, download, load_model, resolve, save_model

SHA = "0123456789abcdef0123456789abcdef01234567"
REPO = "some-org/tiny-m3"


class Hub:
    """Serves one repo; `asked` records (method, file, Range), `drop` is how often a file's connection breaks midway."""

    def __init__(self, files: dict[str, bytes]):
        self.files = files
        self.asked: list[tuple[str, str, str | None]] = []
        self.drop: dict[str, int] = {}
        self.status = 200
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), self.handler())
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()
        self.endpoint = f"http://127.0.0.1:{self.server.server_port}"

    def fetched(self) -> list[str]:
        return [file for method, file, _ in self.asked if method == "GET"]

    def handler(hub):  # `self` is the connection's below
        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *args):
                pass

            def do_HEAD(self):
                self.answer(body=False)

            def do_GET(self):
                self.answer(body=True)

            def answer(self, body):
                path = unquote(self.path.partition("?")[0])
                if hub.status != 200:
                    return self.send(hub.status, b"{}", body, {"X-Error-Message": "out of order"})
                if re.fullmatch(rf"/api/models/{REPO}/revision/(main|{SHA})", path):
                    siblings = [{"rfilename": name} for name in hub.files]
                    info = {"id": REPO, "modelId": REPO, "sha": SHA, "siblings": siblings, "private": False}
                    return self.send(200, json.dumps(info).encode(), body, {})
                if path.startswith(f"/api/models/{REPO}/tree/{SHA}"):
                    tree = [{"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                            for name, data in hub.files.items()]  # fmt: skip
                    return self.send(200, json.dumps(tree).encode(), body, {})
                if path.startswith(f"/api/models/{REPO}/revision/"):
                    return self.send(404, b"{}", body, {"X-Error-Code": "RevisionNotFound"})
                name = path.removeprefix(f"/{REPO}/resolve/{SHA}/")
                if name in hub.files:
                    return self.file(name, body)
                self.send(404, b"{}", body, {"X-Error-Code": "RepoNotFound"})

            def file(self, name, body):
                data, asked = hub.files[name], self.headers.get("Range")
                hub.asked.append(("GET" if body else "HEAD", name, asked))
                start = int(re.match(r"bytes=(\d+)-", asked)[1]) if asked else 0
                headers = {
                    "ETag": f'"{hashlib.sha1(data).hexdigest()}"',
                    "X-Repo-Commit": SHA,
                    "Accept-Ranges": "bytes",
                }
                if asked:
                    headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
                if body and hub.drop.get(name):
                    hub.drop[name] -= 1
                    self.send(206 if asked else 200, data[start:], body, headers, cut=(len(data) - start) // 2)
                else:
                    self.send(206 if asked else 200, data[start:], body, headers)

            def send(self, status, data, body, headers, cut=None):
                self.send_response(status)
                for key, value in {"Content-Length": str(len(data)), **headers}.items():
                    self.send_header(key, value)
                self.end_headers()
                if body:
                    self.wfile.write(data[:cut])
                if cut is not None:
                    self.close_connection = True

        return Handler


@pytest.fixture
def hub(tiny_model, tmp_path, monkeypatch):
    save_model(tiny_model(), tmp_path / "repo", max_shard_bytes=300_000, dtype=torch.bfloat16)
    files = {file.name: file.read_bytes() for file in (tmp_path / "repo").iterdir()}
    files |= {
        "tokenizer.json": b"{}", "chat_template.jinja": b"{{ messages }}", "generation_config.json": b"{}",
        "LICENSE": b"terms", "merges.txt": b"a b", "README.md": b"# M3", "modeling_m3.py": b"import os",
        "pytorch_model.bin": b"\x80\x04.", "weights.pt": b"\x80\x04.", "tokenizer.pkl": b"\x80\x04.",
        "tokenizer_m3.py": b"import os", "original/model.safetensors": b"again", "figures/a.json": b"{}",
    }  # fmt: skip
    hub = Hub(files)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_PROGRESS_BARS", True)
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 4096)  # 10 MB: more than these files
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # between retries
    yield hub
    hub.server.shutdown()
    hub.server.server_close()


WANTED = {
    "config.json", "model.safetensors.index.json", "model-00001-of-00002.safetensors", "tokenizer.json",
    "model-00002-of-00002.safetensors", "chat_template.jinja", "generation_config.json", "LICENSE", "merges.txt",
}  # fmt: skip


def test_a_downloaded_model_is_found_by_its_name_and_loads(hub, tiny_model):
    with pytest.raises(CheckpointError, match=f"`openm3 download {REPO}`"):
        resolve(REPO)
    path = download(REPO, endpoint=hub.endpoint)
    assert resolve(REPO) == path
    own = tiny_model(dtype=torch.bfloat16).float().state_dict()
    own |= {name: tensor for name, tensor in tiny_model().state_dict().items() if name.endswith("router.bias")}
    assert all(torch.equal(tensor, own[name]) for name, tensor in load_model(REPO).state_dict().items())


def test_only_files_of_the_allowed_kinds_are_fetched(hub):
    path = download(REPO, endpoint=hub.endpoint)
    assert {file.name for file in path.iterdir()} == WANTED
    assert set(hub.fetched()) <= WANTED


def test_a_download_into_a_directory_of_choice(hub, tmp_path):
    path = download(REPO, local_dir=tmp_path / "here", endpoint=hub.endpoint)
    assert path == tmp_path / "here"
    assert {file.name for file in path.iterdir() if file.is_file()} == WANTED
    load_model(path)


def test_a_dropped_connection_goes_on_at_the_byte_where_it_broke(hub):
    shard = "model-00001-of-00002.safetensors"
    hub.drop[shard] = 1
    path = download(REPO, endpoint=hub.endpoint)
    assert (path / shard).read_bytes() == hub.files[shard]
    ranges = [asked for method, name, asked in hub.asked if method == "GET" and name == shard]
    assert ranges[0] is None
    begin = int(ranges[1].removeprefix("bytes=").removesuffix("-"))
    half = len(hub.files[shard]) // 2
    assert half - 4096 < begin <= half  # whole chunks only
    assert len(ranges) == 2


def test_after_a_failed_download_only_what_is_missing_is_fetched(hub):
    shard = "model-00002-of-00002.safetensors"
    hub.drop[shard] = 1000
    with pytest.raises(CheckpointError, match="run it again to go on"):
        download(REPO, endpoint=hub.endpoint)
    with pytest.raises(CheckpointError, match="nor wholly downloaded"):
        resolve(REPO)
    hub.drop.clear()
    hub.asked.clear()
    path = download(REPO, endpoint=hub.endpoint)
    assert (path / shard).read_bytes() == hub.files[shard]
    assert shard in hub.fetched()
    assert "model-00001-of-00002.safetensors" not in hub.fetched()
    load_model(REPO)


def test_downloading_again_fetches_nothing(hub):
    download(REPO, endpoint=hub.endpoint)
    hub.asked.clear()
    download(REPO, endpoint=hub.endpoint)
    assert hub.fetched() == []


@pytest.mark.parametrize(
    ("repo", "revision", "told"),
    [
        ("some-org/no-such-repo", None, "some-org/no-such-repo: no such repo on the Hub"),
        (REPO, "v9", f"{REPO}: has no revision 'v9'"),
        ("not a name", None, "'not a name': not a repo's name"),
        ("a/b/c", None, "'a/b/c': not a repo's name"),
    ],
)
def test_what_the_hub_does_not_have_is_one_clear_line(hub, repo, revision, told):
    with pytest.raises(CheckpointError) as caught:
        download(repo, revision=revision, endpoint=hub.endpoint)
    assert str(caught.value).startswith(told)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("status", [401, 403, 500])
def test_a_hub_that_refuses_or_is_broken_is_one_clear_line(hub, status):
    hub.status = status
    with pytest.raises(CheckpointError, match=REPO) as caught:
        download(REPO, endpoint=hub.endpoint)
    assert "\n" not in str(caught.value)


def test_no_hub_at_all_is_one_clear_line(hub):
    with pytest.raises(CheckpointError, match="not downloaded") as caught:
        download(REPO, endpoint="http://127.0.0.1:9")
    assert "\n" not in str(caught.value)


def test_a_repo_without_safetensors_is_refused(hub):
    hub.files = {"config.json": b"{}", "pytorch_model.bin": b"\x80\x04."}
    with pytest.raises(CheckpointError, match=r"holds no config\.json with safetensors weights"):
        download(REPO, endpoint=hub.endpoint)
