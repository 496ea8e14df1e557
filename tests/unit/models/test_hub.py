"""A small hub on the loopback device: reached, refusing, silent and absent, with and without a cache."""

from __future__ import annotations

import hashlib
import json
import logging
import re
import socket
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch

from pocl_cli.artifacts.store import Store
from pocl_cli.errors import ArtifactError, ConfigError, PoclError, ResourceError, SecurityError
from pocl_cli.models import hub
from pocl_cli.models.load import load_model, load_tokenizer
from pocl_cli.models.source import ModelSource, resolve_teacher
from pocl_cli.schema import TeacherConfig

COMMITS = {"main": "a" * 40, "v1": "b" * 40}
NAME = "owner/tiny"


class Hub(ThreadingHTTPServer):
    """Serves the files of one folder as `owner/tiny`, the same at every revision, and notes requests."""

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder, self.requests = folder, []


class Handler(BaseHTTPRequestHandler):
    server: Hub

    def do_GET(self) -> None:
        self.server.requests.append(self.path)
        path = self.path.partition("?")[0]
        names = sorted(file.name for file in self.server.folder.iterdir())
        if found := re.fullmatch(rf"/api/models/{NAME}(?:/revision/(\w+))?", path):
            commit = self._commit(found[1] or "main")
            self._json({"id": NAME, "sha": commit, "siblings": [{"rfilename": name} for name in names]}, commit)
        elif found := re.fullmatch(rf"/api/models/{NAME}/tree/(\w+)", path):
            entries = [
                {"type": "file", "path": name, "size": self._size(name), "oid": self._hash(name)} for name in names
            ]
            self._json(entries, self._commit(found[1]))
        elif found := re.fullmatch(rf"/{NAME}/resolve/(\w+)/([\w.-]+)", path):
            self._file(found[2], self._commit(found[1]))
        else:
            self._json({"error": "Repository not found"}, None, "RepoNotFound")

    do_HEAD = do_GET  # noqa: N815

    def _commit(self, revision: str) -> str | None:
        return revision if revision in COMMITS.values() else COMMITS.get(revision)

    def _size(self, name: str) -> int:
        return (self.server.folder / name).stat().st_size

    def _hash(self, name: str) -> str:
        return hashlib.sha1((self.server.folder / name).read_bytes()).hexdigest()

    def _json(self, content: object, commit: str | None, error: str = "RevisionNotFound") -> None:
        self._send(json.dumps(content).encode(), commit, {} if commit else {"X-Error-Code": error})

    def _file(self, name: str, commit: str | None) -> None:
        exists = (self.server.folder / name).exists()
        if not exists:
            self._send(b"", None, {"X-Error-Code": "EntryNotFound"})
            return
        headers = {"ETag": f'"{self._hash(name)}"', "X-Repo-Commit": str(commit)}
        self._send((self.server.folder / name).read_bytes(), commit, headers)

    def _send(self, data: bytes, commit: str | None, headers: dict[str, str]) -> None:
        self.send_response(200 if commit else 404)
        for name, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        pass


def point_to(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """What HF_ENDPOINT does, for a library that has been imported before."""
    endpoint = f"http://127.0.0.1:{port}"
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", endpoint)
    template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)


@pytest.fixture
def server(model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    server = Hub(model_folder)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    point_to(server.server_port, monkeypatch)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    yield server
    server.shutdown()
    server.server_close()


def resolve(path: str = NAME, revision: str | None = None, *, allow_pickle: bool = False) -> ModelSource:
    config = TeacherConfig(
        name="t",
        path=path,
        experiment=None,
        overrides=(),
        revision=revision,
        dtype="auto",
        allow_pickle=allow_pickle,
        store=False,
    )
    return resolve_teacher(config, Store(Path("outputs-that-are-not-there")))


def load(source: ModelSource) -> torch.Tensor:
    loaded = load_model(source, device=torch.device("cpu"), dtype_override=None, dropout=None)
    return loaded.model.get_input_embeddings().weight


def go_offline(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if how == "switched off":
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    else:
        point_to(9, monkeypatch)


@pytest.mark.parametrize(("revision", "commit"), [(None, "a" * 40), ("v1", "b" * 40), ("b" * 40, "b" * 40)])
def test_resolve_of_a_hub_id_is_identified_by_its_commit(server: Hub, revision: str | None, commit: str) -> None:
    source = resolve(revision=revision)
    assert source.identity == {"hub": NAME, "commit": commit, "dtype": "auto"}
    assert source.tokenizer_identity == {"hub": NAME, "commit": commit}
    assert source.label == "tiny"
    assert sum(NAME in path for path in server.requests) == 1


def test_load_model_of_a_hub_id_fetches_its_weights_and_nothing_else(server: Hub, tmp_path: Path) -> None:
    for name in ("pytorch_model.bin", "modeling_llama.py", "README.md"):
        (server.folder / name).write_text("x")
    weight = load(resolve())
    assert weight.shape == (load_tokenizer(resolve()).vocab_size, 32)
    fetched = {path.name for path in (tmp_path / "cache").rglob("snapshots/*/*")}
    assert fetched == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }


def test_load_tokenizer_of_a_hub_id_fetches_no_weights(server: Hub, tmp_path: Path) -> None:
    assert load_tokenizer(resolve()).eos_token == "<|end|>"
    assert not list((tmp_path / "cache").rglob("*.safetensors"))


@pytest.mark.parametrize("revision", [None, "v1"])
@pytest.mark.parametrize("how", ["switched off", "unreachable"])
def test_resolve_when_the_hub_is_gone_uses_the_cache_and_says_so(
    server: Hub, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, how: str, revision: str | None
) -> None:
    online = load(resolve(revision=revision))
    expected = resolve(revision=revision).identity
    go_offline(how, monkeypatch)
    with caplog.at_level(logging.WARNING, "pocl"):
        source = resolve(revision=revision)
    assert source.identity == expected
    assert "from the local cache" in caplog.text
    assert torch.equal(load(source), online)


@pytest.mark.parametrize("how", ["switched off", "unreachable"])
def test_resolve_when_the_hub_is_gone_and_nothing_is_cached_names_the_model_and_the_way_out(
    server: Hub, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    go_offline(how, monkeypatch)
    started = time.monotonic()
    with pytest.raises(ResourceError) as caught:
        resolve()
    assert time.monotonic() - started < 5
    for part in (NAME, "hf download", "HF_HOME", "local folder"):
        assert part in str(caught.value)


def test_load_model_when_its_files_are_here_then_does_not_ask_the_hub_for_an_adapter(server: Hub) -> None:
    pytest.importorskip("peft", reason="without it nobody looks for adapters")
    load(resolve())

    assert server.requests
    assert not [path for path in server.requests if "adapter" in path]


def test_load_model_when_only_the_tokenizer_is_cached_and_the_hub_is_gone_is_refused(
    server: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    load_tokenizer(resolve())
    go_offline("switched off", monkeypatch)
    with pytest.raises(ResourceError, match="cannot get the model"):
        load(resolve())


def test_resolve_when_the_hub_never_answers_gives_up_in_time(server: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "ANSWER_SECONDS", 1.0)
    monkeypatch.setattr(hub, "REQUEST_SECONDS", 30.0)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        point_to(silent.getsockname()[1], monkeypatch)
        started = time.monotonic()
        with pytest.raises(ResourceError, match="did not answer within 1 seconds"):
            resolve()
    assert time.monotonic() - started < 4


def test_time_limits_together_stay_below_ten_seconds() -> None:
    assert max(hub.REQUEST_SECONDS, hub.ANSWER_SECONDS) < 10


@pytest.mark.parametrize(
    ("path", "revision", "error", "message"),
    [
        ("owner/other", None, ResourceError, "no folder and no hub model 'owner/other'"),
        (NAME, "v2", ResourceError, "has no revision 'v2'"),
        ("owner/../tiny", None, ArtifactError, "there is no folder"),
        ("owner--x", None, ConfigError, "neither a folder nor a hub id"),
        ("own er", None, ConfigError, "neither a folder nor a hub id"),
    ],
)
def test_resolve_of_what_the_hub_does_not_have_is_refused(
    server: Hub, path: str, revision: str | None, error: type[PoclError], message: str
) -> None:
    with pytest.raises(error) as caught:
        resolve(path, revision)
    assert message in str(caught.value)


def test_resolve_of_a_hub_model_with_pickles_only_is_refused_before_anything_is_fetched(
    server: Hub, tmp_path: Path
) -> None:
    (server.folder / "model.safetensors").rename(server.folder / "pytorch_model.bin")
    with pytest.raises(SecurityError, match="pickled"):
        resolve()
    assert not (tmp_path / "cache").exists()


def test_load_model_of_a_hub_id_in_shards_fetches_each(server: Hub, model_folder: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    (model_folder / "model.safetensors").rename(tmp_path / "whole.safetensors")
    (tmp_path / "again").mkdir()
    (tmp_path / "whole.safetensors").rename(tmp_path / "again" / "model.safetensors")
    (tmp_path / "again" / "config.json").write_bytes((model_folder / "config.json").read_bytes())
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    model.save_pretrained(model_folder, max_shard_size="40KB")
    assert len(list(model_folder.glob("model-*.safetensors"))) > 1
    assert torch.equal(load(resolve()), model.get_input_embeddings().weight)


@pytest.mark.parametrize("online", [True, False])
def test_load_model_of_a_hub_id_with_pickles_only_where_they_are_allowed_fetches_and_knows_them(
    server: Hub, tmp_path: Path, online: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    (server.folder / "model.safetensors").rename(server.folder / "pytorch_model.bin")
    (server.folder / "optimizer.pt").write_bytes(b"cos\nsystem\n")
    source = resolve(allow_pickle=True)
    assert source.pickled
    assert isinstance(source.weights, hub.HubCommit)
    folder = hub.fetch(source.weights, weights=True)
    assert (folder / "pytorch_model.bin").exists()
    assert not (folder / "optimizer.pt").exists()
    if not online:
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        again = resolve(allow_pickle=True)
        assert (again.pickled, again.identity) == (True, source.identity)
        assert isinstance(again.weights, hub.HubCommit)
        assert hub.fetch(again.weights, weights=True) == folder
