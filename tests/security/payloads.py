"""Files that do harm when they are read carelessly. Each can be shown to be live: read so, it makes the canary."""

from __future__ import annotations

import gzip
import io
import json
import pickle
import runpy
import shutil
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import yaml
from hydra.utils import instantiate
from omegaconf import OmegaConf
from safetensors.torch import load_file

from pocl_cli.run import Run

from ..support.sandbox import Site

SECRET = "hf_SecretSecretSecret1"


@dataclass(frozen=True)
class Case:
    """One trial's place, the good inputs, and a composed run to change."""

    site: Site
    inputs: Path
    run: Run

    @property
    def work(self) -> Path:
        return self.site.work

    @property
    def model(self) -> Path:
        return self.work / "model"


Plant = Callable[[Case], object]
EMPTY: Plant = lambda case: None  # noqa: E731


# ── pickles ───────────────────────────────────────────────────────────────────────────────────────────────────────────


class Runs:
    """An object whose pickle makes the canary and reaches for the network."""

    def __init__(self, site: Site) -> None:
        self.code = code(site)

    def __reduce__(self) -> tuple[Any, ...]:
        return exec, (self.code,)


def code(site: Site) -> str:
    return (
        f"open({str(site.canary)!r}, 'w').close()\n"
        "import socket\n"
        "try: socket.create_connection(('127.0.0.1', 9), timeout=0.1)\n"
        "except OSError: pass\n"
    )


def raw(path: Path, site: Site) -> None:
    path.write_bytes(pickle.dumps({"weight": Runs(site)}))


def archive(path: Path, site: Site) -> None:
    torch.save({"weight": torch.zeros(2), "more": Runs(site)}, path)


def legacy(path: Path, site: Site) -> None:
    torch.save({"weight": torch.zeros(2), "more": Runs(site)}, path, _use_new_zipfile_serialization=False)


def array(path: Path, site: Site) -> None:
    with open(path, "wb") as handle:
        np.save(handle, np.array([Runs(site)], dtype=object), allow_pickle=True)


def packed(path: Path, site: Site) -> None:
    """An archive of torch's whose entries are packed."""
    archive(path, site)
    with zipfile.ZipFile(path) as source:
        entries = {name: source.read(name) for name in source.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as target:
        for name, data in entries.items():
            target.writestr(name, data)


def unpickled(path: str) -> Plant:
    """What a careless reader does with the file `path` of the working folder."""

    def read(case: Case) -> None:
        place = case.work / path
        if place.read_bytes()[:6] == b"\x93NUMPY":
            np.load(place, allow_pickle=True)
        else:
            # By content: torch takes a file's ending for its format.
            torch.load(io.BytesIO(place.read_bytes()), weights_only=False)

    return read


# ── models ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def model(case: Case) -> Path:
    """A good model in `model`."""
    shutil.copytree(case.inputs / "teacher", case.model)
    return case.model


def only(name: str, write: Callable[[Path, Site], None] = raw) -> Plant:
    """A model whose weights exist as `name` only, which is a pickle with code."""

    def plant(case: Case) -> None:
        folder = model(case)
        (folder / "model.safetensors").unlink()
        write(folder / name, case.site)

    return plant


def beside(name: str, write: Callable[[Path, Site], None] = raw) -> Plant:
    """A good model with `name`, a pickle with code, beside its safetensors."""
    return lambda case: write(model(case) / name, case.site)


def shards(good: str, bad: str, *, index: str, write: Callable[[Path, Site], None] = archive) -> Plant:
    """A model of two pickled shards, whose second one has code."""

    def plant(case: Case) -> None:
        folder = model(case)
        tensors = load_file(folder / "model.safetensors")
        (folder / "model.safetensors").unlink()
        torch.save(tensors, folder / good)
        write(folder / bad, case.site)
        weight_map = {**dict.fromkeys(tensors, good), "more": bad}
        (folder / index).write_text(json.dumps({"weight_map": weight_map}))

    return plant


def index_of(name: str, index: str, place: Callable[[Case], Path] | None = None) -> Plant:
    """A model whose index names `name`; what lies there is a pickle with code."""

    def plant(case: Case) -> None:
        folder = model(case)
        (folder / "model.safetensors").unlink()
        named = name.replace("ROOT", str(case.site.root))
        archive(place(case) if place else folder / named, case.site)
        (folder / index).write_text(json.dumps({"weight_map": {"lm_head.weight": named}}))

    return plant


def settings(file: str, code_file: str | None = None, **values: Any) -> Plant:
    """A good model with further keys in one of its JSON files, and perhaps a Python file with code beside it."""

    def plant(case: Case) -> None:
        path = model(case) / file
        content = json.loads(path.read_text()) if path.exists() else {}
        text = json.dumps({**content, **values}).replace("CANARY", str(case.site.canary))
        path.write_text(text)
        if code_file is not None:
            (case.model / code_file).parent.mkdir(exist_ok=True)
            (case.model / code_file).write_text(code(case.site))

    return plant


def run_file(path: str) -> Plant:
    """What loading with trust_remote_code comes to."""

    def run(case: Case) -> None:
        runpy.run_path(str(case.work / path))

    return run


SSTI = "{{ cycler.__init__.__globals__.__builtins__.open('CANARY', 'w') }}"


def rendered(case: Case) -> None:
    """What a template without a sandbox does."""
    jinja2.Template(SSTI.replace("CANARY", str(case.site.canary))).render()


def header(length: int | None = None, **tensors: Any) -> Plant:
    """A model whose weights have a header that lies."""

    def plant(case: Case) -> None:
        path = model(case) / "model.safetensors"
        text = json.dumps(tensors).encode()
        path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + b"\0" * 64)

    return plant


def claims_more(case: Case) -> bool:
    """Whether a reader that trusts the header would go past the file's end."""
    data = (case.model / "model.safetensors").read_bytes()
    length = int.from_bytes(data[:8], "little")
    if 8 + length > len(data):
        return True
    ends = [entry["data_offsets"][1] for entry in json.loads(data[8 : 8 + length]).values()]
    shapes = [
        int(np.prod([float(size) for size in entry["shape"]])) for entry in json.loads(data[8 : 8 + length]).values()
    ]
    return max(ends) > len(data) - 8 - length or max(shapes) * 4 > len(data)


# ── configuration ─────────────────────────────────────────────────────────────────────────────────────────────────────

# Hydra's own list of what it does not build does not hold this one: it makes the canary by copying a file.
TARGET = "{_target_: shutil.copyfile, src: /dev/null, dst: CANARY}"


def built(case: Case) -> None:
    """What `hydra.utils.instantiate` does with TARGET."""
    instantiate(OmegaConf.create(TARGET.replace("CANARY", str(case.site.canary))))


def conf(name: str, text: str) -> Plant:
    """A file in the user's own configuration folder `conf`."""

    def plant(case: Case) -> None:
        path = case.work / "conf" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text.replace("CANARY", str(case.site.canary)).replace("ROOT", str(case.site.root)))

    return plant


def unsafely_read(name: str) -> Plant:
    """What YAML without restriction does with a file of `conf`."""
    return lambda case: yaml.unsafe_load((case.work / "conf" / name).read_text()) and None


# ── data ──────────────────────────────────────────────────────────────────────────────────────────────────────────────

GOOD_ROWS = "".join(json.dumps({"instruction": f"Say {i}", "output": str(i)}) + "\n" for i in range(8))


def data(name: str, write: Callable[[Path, Site], None]) -> Plant:
    return lambda case: write(case.work / name, case.site)


def text_file(name: str, text: str) -> Plant:
    def plant(case: Case) -> None:
        path = case.work / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text.replace("CODE", code(case.site)).replace("ROOT", str(case.site.root)), encoding="utf-8")

    return plant


def all_of(*plants: Plant) -> Plant:
    def plant(case: Case) -> None:
        for one in plants:
            one(case)

    return plant


def extension_table(site: Site) -> pa.Table:
    """Good rows, with a field whose type is a pickle (CVE-2023-47248)."""
    evil = pickle.dumps(Runs(site))
    metadata = {b"ARROW:extension:name": b"arrow.py_extension_type", b"ARROW:extension:metadata": evil}
    fields = [pa.field("instruction", pa.string()), pa.field("output", pa.string(), metadata=metadata)]
    return pa.table({"instruction": ["a", "b"], "output": ["c", "d"]}, schema=pa.schema(fields))


def extension_parquet(path: Path, site: Site) -> None:
    pq.write_table(extension_table(site), path)


def pandas_parquet(path: Path, site: Site) -> None:
    """Good rows whose metadata for pandas holds a pickle."""
    table = pa.table({"instruction": ["a"], "output": ["b"]})
    pq.write_table(table.replace_schema_metadata({b"pandas": pickle.dumps(Runs(site))}), path)


def pickled_column(path: Path, site: Site) -> None:
    pq.write_table(pa.table({"instruction": ["a"], "output": [pickle.dumps(Runs(site))]}), path)


def saved_folder(case: Case) -> None:
    """A save_to_disk folder whose Arrow file has a type that is a pickle."""
    folder = case.work / "saved"
    folder.mkdir()
    table = extension_table(case.site)
    with (
        pa.OSFile(str(folder / "data-00000-of-00001.arrow"), "wb") as sink,
        pa.ipc.new_stream(sink, table.schema) as to,
    ):
        to.write_table(table)
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": "data-00000-of-00001.arrow"}]}))


def metadata_unpickled(name: str, key: bytes) -> Plant:
    """What a reader does that trusts pickles in a schema's metadata."""

    def read(case: Case) -> None:
        path = case.work / name
        if path.suffix == ".arrow":
            with pa.memory_map(str(path)) as source, pa.ipc.open_stream(source) as stream:
                schema = stream.schema
        else:
            schema = pq.read_schema(path)
        found = [schema.metadata or {}, *(field.metadata or {} for field in schema)]
        for metadata in found:
            if key in metadata:
                pickle.loads(metadata[key])

    return read


def column_unpickled(case: Case) -> None:
    pickle.loads(pq.read_table(case.work / "rows.parquet")["output"][0].as_py())


def bomb(name: str, *, line: bool) -> Plant:
    """A few hundred KiB that unpack to 300 MiB."""

    def plant(case: Case) -> None:
        # Packed files may follow each other: 300 times the same one is made at once.
        first, last = (b"", b"\n") if line else (b"[", b"]")
        parts = [first + b'{"instruction": "', *[b"a" * 2**20] * 300, b'", "output": "x"}' + last]
        packed = {part: gzip.compress(part) for part in set(parts)}
        (case.work / name).write_bytes(b"".join(packed[part] for part in parts))

    return plant


def outside_rows(case: Case) -> None:
    """Good rows that are somebody else's."""
    (case.site.outside / "rows.jsonl").write_text(GOOD_ROWS)
    with pa.OSFile(str(case.site.outside / "x.arrow"), "wb") as sink:
        table = pa.table({"instruction": ["a"], "output": [SECRET]})
        with pa.ipc.new_stream(sink, table.schema) as to:
            to.write_table(table)
