"""A real tokenizer made in memory, configurations, and a small hub on the loopback interface."""

from __future__ import annotations

import http.server
import json
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from pocl_cli.schema import DatasetConfig

COMMIT = "0123456789abcdef0123456789abcdef01234567"
CORPUS = [
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.",
    "Below is an instruction that describes a task, paired with an input that provides further context.",
    "### Instruction:\n### Input:\n### Response:\n",
    "Name the first animal of the list and say where it lives. The quick brown fox jumps over the lazy dog.",
]


@pytest.fixture
def make_config() -> Callable[..., DatasetConfig]:
    """A valid `dataset` section without limits on the rows; keywords replace its keys."""

    def make(**changes: Any) -> DatasetConfig:
        fields = {"instruction": None, "input": None, "output": None, "category": None, **changes.pop("fields", {})}
        values: dict[str, Any] = {
            "name": "rows",
            "path": None,
            "split": None,
            "data_files": None,
            "revision": None,
            "generator": None,
            "num_rows": None,
            "format": "instruction",
            "fields": fields,
            "limit": None,
            "dev_size": 0,
            "seed": 10,
            "max_tokens": 512,
            "max_prompt_tokens": 256,
            "long_prompts": "cut",
            "long_documents": "cut",
        }
        return DatasetConfig.model_validate(values | changes)

    return make


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer like GPT-2's, whose EOS token has a name that may stand in a row's text."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>", "<|pad|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>", pad_token="<|pad|>")


@pytest.fixture
def shared_data() -> Path:
    """The folder of real rows beside the project; skips where it is absent."""
    folder = Path(os.environ.get("POCL_SHARED", Path(__file__).parents[3].parent / "shared")) / "data"
    if not folder.is_dir():
        pytest.skip(f"no real rows: {folder} is absent (set POCL_SHARED)")
    return folder


class Hub(http.server.ThreadingHTTPServer):
    """Answers like the Hugging Face hub for one data repository, org/rows."""

    def __init__(self, files: dict[str, bytes]) -> None:
        super().__init__(("127.0.0.1", 0), _HubHandler)
        self.files = files
        self.requests: list[str] = []
        self.is_silent = False
        self.released = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _HubHandler(http.server.BaseHTTPRequestHandler):
    server: Hub

    def do_HEAD(self) -> None:
        self._answer(has_body=False)

    def do_GET(self) -> None:
        self._answer(has_body=True)

    def _answer(self, has_body: bool) -> None:
        path = self.path.split("?")[0].replace("/resolve/main/", f"/resolve/{COMMIT}/")
        self.server.requests.append(path)
        if self.server.is_silent:
            self.server.released.wait(60)
            return
        resolved = f"/datasets/org/rows/resolve/{COMMIT}/"
        if path in ("/api/datasets/org/rows", "/api/datasets/org/rows/revision/main"):
            listing = [{"rfilename": name} for name in self.server.files]
            body, headers = json.dumps({"id": "org/rows", "sha": COMMIT, "siblings": listing}).encode(), {}
        elif path.startswith(resolved) and path.removeprefix(resolved) in self.server.files:
            body = self.server.files[path.removeprefix(resolved)]
            headers = {"ETag": f'"{len(body)}"', "X-Repo-Commit": COMMIT}
        else:
            self.send_response(404)
            self.send_header("X-Error-Code", "RepoNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        self.send_response(200)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if has_body:
            self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing on stderr."""


@pytest.fixture
def hub() -> Iterator[Hub]:
    """A running hub without files; a test fills `hub.files`."""
    server = Hub({})
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    yield server
    server.released.set()
    server.shutdown()
    server.server_close()
    thread.join()
