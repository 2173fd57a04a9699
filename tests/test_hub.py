"""The hub client against a small server on loopback that speaks the hub's endpoints."""

from __future__ import annotations

import hashlib
import http.server
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import huggingface_hub
import pytest
from checkpoints import PLAIN, assert_loaded, checkpoint_of, weights_of
from huggingface_hub import constants
from test_convert import write_shards
from writers import write_config, write_safetensors, write_zip

from mlx_vae import AutoencoderKL
from mlx_vae.convert import CheckpointError, convert

COMMITS = {"main": "1" * 40, "old": "2" * 40}
PUBLIC, PRIVATE, GATED = "someone/pipeline", "someone/private", "someone/gated"
TOKEN = "hf_only_for_this_test"


@dataclass
class Hub:
    """Repositories: folders with a folder for each revision. Writes down which files are asked for."""

    root: Path
    address: str = ""
    fetched: list[str] = field(default_factory=list)
    status: int = 200

    def files(self, repo: str, revision: str) -> dict[str, Path]:
        folder = self.root / repo / revision
        return {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}


def handler(hub: Hub) -> type[http.server.BaseHTTPRequestHandler]:
    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def do_HEAD(self) -> None:
            self.answer()

        def do_GET(self) -> None:
            self.answer()

        def answer(self) -> None:
            path = self.path.split("?")[0]
            if hub.status != 200:
                return self.send(hub.status)
            if found := re.fullmatch(r"/api/models/([\w.-]+/[\w.-]+)(?:/revision/(\w+))?", path):
                return self.info(found[1], found[2] or "main")
            if found := re.fullmatch(r"/api/models/([\w.-]+/[\w.-]+)/tree/(\w+)", path):
                return self.tree(found[1], found[2])
            if found := re.fullmatch(r"/([\w.-]+/[\w.-]+)/resolve/(\w+)/(.+)", path):
                return self.resolve(found[1], found[2], found[3])
            return self.send(404)

        def commit(self, repo: str, revision: str) -> str | None:
            """The revision's name, if the repository and it may be seen; else an answer is sent."""
            known = self.headers.get("Authorization") == f"Bearer {TOKEN}"
            names = {commit: name for name, commit in COMMITS.items()} | {name: name for name in COMMITS}
            if repo == GATED and not known:
                self.send(401, {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access to it is restricted."})
            elif not (hub.root / repo).is_dir() or (repo == PRIVATE and not known):
                self.send(401 if repo == PRIVATE else 404, {"X-Error-Code": "RepoNotFound"})
            elif revision not in names:
                self.send(404, {"X-Error-Code": "RevisionNotFound"})
            else:
                return names[revision]
            return None

        def info(self, repo: str, revision: str) -> None:
            if name := self.commit(repo, revision):
                siblings = [{"rfilename": file} for file in hub.files(repo, name)]
                self.send_json({"id": repo, "modelId": repo, "sha": COMMITS[name], "siblings": siblings})

        def tree(self, repo: str, revision: str) -> None:
            if name := self.commit(repo, revision):
                self.send_json(
                    [
                        {"type": "file", "path": file, "size": path.stat().st_size, "oid": etag(path)}
                        for file, path in hub.files(repo, name).items()
                    ]
                )

        def resolve(self, repo: str, revision: str, file: str) -> None:
            name = self.commit(repo, revision)
            if name is None:
                return None
            path = hub.files(repo, name).get(file)
            if path is None:
                return self.send(404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMITS[name]})
            if self.command == "GET":
                hub.fetched.append(file)
            headers = {"X-Repo-Commit": COMMITS[name], "ETag": f'"{etag(path)}"', "X-Linked-Size": path.stat().st_size}
            return self.send(200, headers, path.read_bytes())

        def send_json(self, value: object) -> None:
            self.send(200, {"Content-Type": "application/json"}, json.dumps(value).encode())

        def send(self, status: int, headers: dict[str, object] | None = None, body: bytes = b"") -> None:
            self.send_response(status)
            for key, value in {**(headers or {}), "Content-Length": len(body)}.items():
                self.send_header(key, str(value))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

    return Handler


def etag(path: Path) -> str:
    return hashlib.sha1(path.read_bytes()).hexdigest()


def point_at(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", address)
    template = address + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    hub = Hub(tmp_path / "hub")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler(hub))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    hub.address = f"http://127.0.0.1:{server.server_port}"
    point_at(hub.address, monkeypatch)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_TOKEN_PATH", str(tmp_path / "no token"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no token"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    yield hub
    server.shutdown()
    server.server_close()


def publish(hub: Hub, repo: str, revision: str = "main", place: str = "vae") -> Path:
    """A VAE in a folder of a repository; the folder."""
    folder = hub.root / repo / revision / place
    folder.mkdir(parents=True)
    write_config(folder / "config.json", PLAIN)
    write_safetensors(folder / "diffusion_pytorch_model.safetensors", checkpoint_of(PLAIN, "old"))
    return folder


@pytest.fixture
def pipeline(hub: Hub) -> Path:
    """PUBLIC: a whole pipeline, with much that is no business of ours."""
    folder = publish(hub, PUBLIC)
    write_zip(folder / "diffusion_pytorch_model.bin", checkpoint_of(PLAIN, "old"))
    (folder.parent / "unet").mkdir()
    for name in ("model_index.json", "bundle.safetensors", "README.md", "unet/config.json", "unet/model.safetensors"):
        (folder.parent / name).write_text("{}")
    return folder


def test_only_the_autoencoders_files_are_fetched_and_only_once(hub: Hub, pipeline: Path) -> None:
    for _ in range(2):
        assert_loaded(AutoencoderKL.from_pretrained(PUBLIC), weights_of(PLAIN))
        assert sorted(hub.fetched) == ["vae/config.json", "vae/diffusion_pytorch_model.safetensors"]


def test_without_a_network_the_cache_serves(hub: Hub, pipeline: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    AutoencoderKL.from_pretrained(PUBLIC)
    with monkeypatch.context() as offline:
        offline.setattr(constants, "HF_HUB_OFFLINE", True)
        assert_loaded(AutoencoderKL.from_pretrained(PUBLIC), weights_of(PLAIN))
        with pytest.raises(CheckpointError, match="not in the cache, and HF_HUB_OFFLINE forbids"):
            AutoencoderKL.from_pretrained(GATED)
    point_at("http://127.0.0.1:9", monkeypatch)  # where nothing listens
    assert_loaded(AutoencoderKL.from_pretrained(PUBLIC), weights_of(PLAIN))
    with pytest.raises(CheckpointError, match=r"the hub can't be reached \(ConnectError\)\. Check the network"):
        AutoencoderKL.from_pretrained(GATED)


def test_subfolder_revision_and_variant(hub: Hub, pipeline: Path) -> None:
    folder = publish(hub, PUBLIC, "old", "autoencoder")
    (folder / "diffusion_pytorch_model.safetensors").rename(folder / "diffusion_pytorch_model.fp16.safetensors")
    assert_loaded(AutoencoderKL.from_pretrained(PUBLIC, "autoencoder", "old", "fp16"), weights_of(PLAIN))
    with pytest.raises(CheckpointError, match="no weights in autoencoder/; there are the variants fp16"):
        AutoencoderKL.from_pretrained(PUBLIC, "autoencoder", "old")
    with pytest.raises(CheckpointError, match=r"no config\.json in autoencoder"):
        AutoencoderKL.from_pretrained(PUBLIC, "autoencoder")
    with pytest.raises(CheckpointError, match=r"no revision newest\. Check the branch, tag or commit"):
        AutoencoderKL.from_pretrained(PUBLIC, revision="newest")


def test_shards_are_fetched(hub: Hub) -> None:
    folder = publish(hub, PUBLIC, place="")
    (folder / "diffusion_pytorch_model.safetensors").unlink()
    write_shards(folder, checkpoint_of(PLAIN, "diffusers"))
    assert_loaded(AutoencoderKL.from_pretrained(PUBLIC), weights_of(PLAIN))
    assert len(hub.fetched) == len(set(hub.fetched)) == 5


def test_a_token_opens_private_and_gated_models(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    for repo in (PRIVATE, GATED):
        publish(hub, repo)
    with pytest.raises(CheckpointError, match=r"no such model, or a private one .*log in with `hf auth login`"):
        AutoencoderKL.from_pretrained(PRIVATE)
    with pytest.raises(CheckpointError, match=rf"access is granted on request\. Ask for it at {hub.address}/{GATED}"):
        AutoencoderKL.from_pretrained(GATED)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    for repo in (PRIVATE, GATED):
        assert_loaded(AutoencoderKL.from_pretrained(repo), weights_of(PLAIN))


def test_other_answers(hub: Hub, pipeline: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CheckpointError, match=r"no such model, .*no folder or file someone/nothing here"):
        AutoencoderKL.from_pretrained("someone/nothing")
    with pytest.raises(CheckpointError, match="not the name of a model on the hub"):
        AutoencoderKL.from_pretrained("someone/..")
    hub.status = 403
    with pytest.raises(CheckpointError, match=r"the hub answered 403\. Log in"):
        AutoencoderKL.from_pretrained(PUBLIC)
    hub.status = 404
    with pytest.raises(CheckpointError, match="the hub answered 404"):
        AutoencoderKL.from_pretrained(PUBLIC)
    hub.status = 200

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", full)
    with pytest.raises(CheckpointError, match=r"no space left in .*cache\. Free some, or set HF_HOME"):
        AutoencoderKL.from_pretrained(PUBLIC)


def test_the_command_line(hub: Hub, pipeline: Path, tmp_path: Path) -> None:
    """With the environment variables of huggingface_hub, in a process of its own."""
    root = Path(__file__).resolve().parent.parent
    environment = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    environment |= {"HF_ENDPOINT": hub.address, "HF_HOME": str(tmp_path / "home"), "PYTHONPATH": str(root)}
    run = [sys.executable, "-m", "mlx_vae.convert", "--mlx-path", "out", "--hf-path"]
    done = subprocess.run([*run, PUBLIC], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert_loaded(AutoencoderKL.from_pretrained(tmp_path / "out"), weights_of(PLAIN))
    assert f"base_model: {PUBLIC}\n" in (tmp_path / "out" / "README.md").read_text()
    run[run.index("out")] = "other"
    done = subprocess.run([*run, GATED], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 2
    assert "access is granted on request" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "other").exists()


def test_upload(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    uploaded: dict[str, list[str]] = {}

    class Api:
        def create_repo(self, repo_id: str, exist_ok: bool) -> str:
            return f"https://hub/{repo_id}"

        def upload_folder(self, repo_id: str, folder_path: Path, commit_message: str) -> None:
            uploaded[repo_id] = sorted(path.name for path in folder_path.iterdir())

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    write_config(tmp_path / "config.json", PLAIN)
    path = write_safetensors(tmp_path / "vae.safetensors", checkpoint_of(PLAIN, "ldm"))
    convert(path, tmp_path / "out", upload_repo="someone/vae-mlx")
    assert uploaded == {"someone/vae-mlx": ["README.md", "config.json", "model.safetensors"]}
    assert capsys.readouterr().out.endswith("[INFO] Uploaded to https://hub/someone/vae-mlx\n")
    assert 'from_pretrained("someone/vae-mlx")' in (tmp_path / "out" / "README.md").read_text()
