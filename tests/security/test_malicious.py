"""Hostile files, names and overrides: nothing that they name is run, nothing outside `outputs` is written, nothing is
sent, and no secret is shown.

`TRIALS` is the table. Each row plants something in a folder of its own and does with it what a user would; the payload
is live, as the second test shows by reading it carelessly.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

from pocl_cli import cli
from pocl_cli.artifacts.encoding import json_text
from pocl_cli.artifacts.manifest import MANIFEST, ArtifactKey, Manifest
from pocl_cli.artifacts.store import Store
from pocl_cli.data.sources import load_dataset
from pocl_cli.models.load import load_model, load_tokenizer, read_config
from pocl_cli.steps import partition
from pocl_cli.steps.chain import Chain
from pocl_cli.steps.weights import loadable

from ..support import tally
from ..support.folders import memory_folder
from ..support.recipe import changed, compose, distilled, recipe, write_inputs
from ..support.sandbox import Outcome, Site, watched
from . import payloads
from .payloads import (
    EMPTY,
    GOOD_ROWS,
    SECRET,
    SSTI,
    TARGET,
    Case,
    Plant,
    all_of,
    archive,
    array,
    beside,
    built,
    claims_more,
    conf,
    data,
    header,
    index_of,
    legacy,
    metadata_unpickled,
    model,
    only,
    rendered,
    run_file,
    settings,
    shards,
    text_file,
    unpickled,
    unsafely_read,
)


@dataclass(frozen=True)
class Trial:
    """One row of the table.

    Attributes:
        name: what is tried.
        plant: makes the hostile thing.
        act: what a user does with it.
        exit_code: of that.
        part: words of its message, or of what it gives.
        live: reads it carelessly, which makes the canary; or looks at it.
        env: variables that are set.
    """

    name: str
    plant: Plant
    act: Callable[[Case], object]
    exit_code: int
    part: str
    live: Callable[[Case], object] | Seen
    env: Mapping[str, str] = field(default_factory=dict)


# ── what a user does ──────────────────────────────────────────────────────────────────────────────────────────────────


def load(**section: object) -> Callable[[Case], object]:
    """Loads `model` as the teacher: tokenizer, configuration and weights."""

    def act(case: Case) -> str:
        teacher = case.run.config.teacher.model_copy(update={"path": "model", **section})
        chain = Chain(changed(case.run, outputs=Path("outputs"), teacher=teacher))
        assert chain.teacher is not None
        load_tokenizer(chain.teacher)
        read_config(chain.teacher)
        source = loadable(chain, chain.teacher)
        load_model(source, device=torch.device("cpu"), dtype_override=None, dropout=None)
        return "loaded"

    return act


def rows(**section: object) -> Callable[[Case], object]:
    """Reads a data set."""

    def act(case: Case) -> str:
        config = case.run.config.dataset.model_copy(update=section)
        return f"{len(load_dataset(config).records)} rows"

    return act


def pocl(*words: str) -> Callable[[Case], object]:
    """Runs a command; ROOT and CANARY are paths of the site."""

    def act(case: Case) -> None:
        places = {"ROOT": str(case.site.root), "CANARY": str(case.site.canary)}
        for name, place in places.items():
            filled = [word.replace(name, place) for word in (filled if name != "ROOT" else words)]  # noqa: F821
        cli.main(filled)

    return act


def train(case: Case) -> object:
    """Trains a student on a teacher in `model`, with its tokenizer, and saves it."""
    teacher = case.run.config.teacher.model_copy(update={"path": "model"})
    student = case.run.config.student.model_copy(update={"tokenizer": "model"})
    artifact = distilled(changed(case.run, outputs=Path("outputs"), teacher=teacher, student=student))
    return f"saved {artifact.kind}"


def show_rows(case: Case) -> object:
    """Cuts the rows of `rows.jsonl` into subsets, and shows some of them."""
    dataset = case.run.config.dataset.model_copy(update={"path": "rows.jsonl", "dev_size": 0})
    partition.run(changed(case.run, outputs=Path("outputs"), dataset=dataset))
    return "shown"


# ── artifacts ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def artifact(case: Case) -> Path:
    """A student whose model is `model`, as if it had been made here."""
    if not case.model.exists():
        model(case)
    with Store(case.work / "outputs").open_work(ArtifactKey("students", "evil", {"seed": 1}, 1)) as work:
        shutil.copytree(case.model, work.path / "model")
        return work.commit(config={}, inputs={}, command=["pocl"], seed=1).path


def listing_outside(case: Case) -> None:
    """A manifest that lists a file outside, sealed anew."""
    path = artifact(case) / MANIFEST
    content = json.loads(path.read_text()) | {"sha256": None}
    content["files"]["../../../../outside/x"] = {"size": 1, "sha256": "0" * 64}
    path.write_text(json_text(Manifest.model_validate(content).sealed().model_dump(), indent=2) + "\n")


def linked(*parts: str) -> Plant:
    """A link at `outputs/PARTS` that leads to somebody else's folder."""

    def plant(case: Case) -> None:
        place = case.work.joinpath("outputs", *parts)
        place.parent.mkdir(parents=True, exist_ok=True)
        place.symlink_to(case.site.outside, target_is_directory=True)

    return plant


def linked_artifact(case: Case) -> None:
    """A student's name that is a link to a good student elsewhere."""
    folder = artifact(case)
    folder.rename(case.site.outside / folder.name)
    folder.symlink_to(case.site.outside / folder.name)


def link_in_artifact(case: Case) -> None:
    folder = artifact(case)
    (case.site.outside / "x").write_text("x")
    (folder / "model" / "more.json").symlink_to(case.site.outside / "x")


@dataclass(frozen=True)
class Seen:
    """A payload that only has to be looked at: `test` says whether it is live."""

    test: Callable[[Case], bool]


def leads_outside(path: str) -> Seen:
    """Whether somebody who follows `path` from the working folder ends outside of it."""
    return Seen(lambda case: not Path(os.path.realpath(case.work / path)).is_relative_to(case.work))


def holds(text: str) -> Seen:
    """What is planted are words: whether they are hostile ones is seen."""
    return Seen(lambda case: bool(text))


def secret_model(case: Case) -> None:
    """A model whose configuration is a link to somebody's secret."""
    (case.site.outside / "secret").write_text(SECRET)
    (model(case) / "config.json").unlink()
    (case.model / "config.json").symlink_to(case.site.outside / "secret")


ESCAPES = "\x1b]0;owned\x07\x1b[2J<script>alert(1)</script>\u202e\x9b31m"
HOSTILE_ROWS = "".join(
    json.dumps({"instruction": f"{ESCAPES} {i} {{{{ cycler }}}}", "output": str(i)}) + "\n" for i in range(8)
)
ALLOWED = {"allow_pickle": True}
FORMATS = "is of no known format"

MODELS = [
    *(
        Trial(f"weights only as {name}", only(name, write), load(), code, part, unpickled(f"model/{name}"))
        for name, write, code, part in [
            ("pytorch_model.bin", archive, 9, "pytorch_model.bin can run code"),
            ("model.bin", payloads.raw, 9, "model.bin can run code"),
            ("model.pt", archive, 9, "model.pt can run code"),
            ("consolidated.00.pth", legacy, 9, "consolidated.00.pth can run code"),
            ("model.ckpt", archive, 9, "model.ckpt can run code"),
            ("weights.pkl", payloads.raw, 9, "weights.pkl can run code"),
            ("model.pickle", payloads.raw, 9, "model.pickle can run code"),
            ("training_args.bin", payloads.raw, 9, "training_args.bin can run code"),
            ("model.npy", array, 4, "there are no weights"),
            ("model.joblib", payloads.raw, 4, "there are no weights"),
            ("tf_model.h5", payloads.raw, 4, "there are no weights"),
            ("flax_model.msgpack", payloads.raw, 4, "there are no weights"),
        ]
    ),
    *(
        Trial(f"{name} beside safetensors", beside(name, write), load(), 0, "loaded", unpickled(f"model/{name}"))
        for name, write in [
            ("pytorch_model.bin", archive),
            ("optimizer.pt", archive),
            ("training_args.bin", payloads.raw),
            ("rng_state.pth", legacy),
            ("tokenizer.pkl", payloads.raw),
            ("adapter_model.bin", archive),
            ("tf_model.h5", payloads.raw),
        ]
    ),
    Trial(
        "an adapter with pickled weights",
        all_of(beside("adapter_model.bin", archive), lambda c: (c.model / "adapter_config.json").write_text("{}")),
        load(),
        4,
        "adapter",
        unpickled("model/adapter_model.bin"),
    ),
    Trial(
        "pickled shards",
        shards(
            "pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin", index="pytorch_model.bin.index.json"
        ),
        load(),
        9,
        "can run code",
        unpickled("model/pytorch_model-00002-of-00002.bin"),
    ),
    Trial(
        "a safetensors index of pickled shards",
        shards("model-00001-of-00002.bin", "model-00002-of-00002.bin", index="model.safetensors.index.json"),
        load(),
        9,
        "only *.safetensors files are read",
        unpickled("model/model-00002-of-00002.bin"),
    ),
]
PICKLES_ALLOWED = [
    *(
        Trial(
            f"an allowed pickle, {kind}",
            only("pytorch_model.bin", write),
            load(**ALLOWED),
            9,
            part,
            unpickled("model/pytorch_model.bin"),
            env,
        )
        for kind, write, part, env in [
            ("an archive", archive, "holds more than tensors", {}),
            ("torch's older format", legacy, "holds more than tensors", {}),
            ("a bare pickle", payloads.raw, "holds more than tensors", {}),
            ("a packed archive", payloads.packed, "could unpack to any size", {}),
            ("torch told to trust it", archive, "holds more than tensors", {"TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "1"}),
        ]
    ),
    Trial(
        "an allowed pickle of another name",
        only("model.bin"),
        load(**ALLOWED),
        9,
        "can run code",
        unpickled("model/model.bin"),
    ),
    Trial(
        "allowed pickled shards, the second with code",
        shards(
            "pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin", index="pytorch_model.bin.index.json"
        ),
        load(**ALLOWED),
        9,
        "holds more than tensors in model/pytorch_model-00002-of-00002.bin",
        unpickled("model/pytorch_model-00002-of-00002.bin"),
    ),
    Trial(
        "an index of pickles that leads outside",
        index_of("../../outside/x.bin", "pytorch_model.bin.index.json"),
        load(**ALLOWED),
        9,
        "must lead to a place inside its folder",
        unpickled("../outside/x.bin"),
    ),
    Trial(
        "an index of pickles with another ending",
        index_of("x.pt", "pytorch_model.bin.index.json"),
        load(**ALLOWED),
        9,
        "only *.bin files are read",
        unpickled("model/x.pt"),
    ),
    Trial(
        "a student made here whose weights are pickled",
        all_of(only("pytorch_model.bin", archive), artifact),
        load(path="latest"),
        9,
        "pytorch_model.bin can run code",
        unpickled("model/pytorch_model.bin"),
    ),
]
SAFETENSORS = [
    *(
        Trial(f"safetensors {name}", header(length, **tensors), load(), 4, "cannot load the weights", Seen(claims_more))
        for name, length, tensors in [
            ("whose header is endless", 2**62, {}),
            ("whose header is longer than the file", 4096, {}),
            ("that end beyond the file", None, {"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 2**40]}}),
            ("with a huge shape", None, {"a": {"dtype": "F32", "shape": [2**31, 2**31], "data_offsets": [0, 64]}}),
        ]
    ),
    Trial(
        "an index that leads outside",
        index_of("../../outside/x.safetensors", "model.safetensors.index.json"),
        load(),
        9,
        "must lead to a place inside its folder",
        unpickled("../outside/x.safetensors"),
    ),
    Trial(
        "an index with an absolute path",
        index_of("ROOT/outside/x.safetensors", "model.safetensors.index.json"),
        load(),
        9,
        "must lead to a place inside its folder",
        unpickled("../outside/x.safetensors"),
    ),
    Trial(
        "an index with a NUL",
        index_of("x\0.safetensors", "model.safetensors.index.json", place=lambda case: case.model / "x"),
        load(),
        9,
        "must lead to a place inside its folder",
        unpickled("model/x"),
    ),
]
SETTINGS = [
    Trial(
        "auto_map in config.json",
        settings("config.json", "evil.py", auto_map={"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"}),
        load(),
        9,
        "auto_map is refused",
        run_file("model/evil.py"),
    ),
    Trial(
        "auto_map of another repository",
        settings("config.json", "evil.py", auto_map={"AutoModelForCausalLM": "owner/repo--evil.M"}),
        load(),
        9,
        "auto_map is refused",
        run_file("model/evil.py"),
    ),
    Trial(
        "auto_map deep in config.json",
        settings("config.json", "evil.py", text_config={"auto_map": {"AutoConfig": "evil.C"}}),
        load(),
        9,
        "auto_map is refused",
        run_file("model/evil.py"),
    ),
    Trial(
        "auto_map in tokenizer_config.json",
        settings("tokenizer_config.json", "evil.py", auto_map={"AutoTokenizer": ["evil.T", None]}),
        load(),
        9,
        "auto_map is refused",
        run_file("model/evil.py"),
    ),
    Trial(
        "trust_remote_code in config.json",
        settings("config.json", "modeling_llama.py", trust_remote_code=True),
        load(),
        0,
        "loaded",
        run_file("model/modeling_llama.py"),
    ),
    Trial(
        "custom_pipelines",
        settings(
            "config.json", "evil.py", custom_pipelines={"text-generation": {"impl": "evil.P", "pt": ["AutoModel"]}}
        ),
        load(),
        0,
        "loaded",
        run_file("model/evil.py"),
    ),
    Trial(
        "custom_generate",
        settings("generation_config.json", "custom_generate/generate.py", trust_remote_code=True),
        load(),
        0,
        "loaded",
        run_file("model/custom_generate/generate.py"),
    ),
    Trial(
        "a tokenizer's class beside it",
        settings("tokenizer_config.json", "tokenization_evil.py", tokenizer_class="EvilTokenizer"),
        load(),
        0,
        "loaded",
        run_file("model/tokenization_evil.py"),
    ),
    Trial(
        "a model type that is a path",
        settings("config.json", "evil.py", model_type="../../evil"),
        load(),
        4,
        "cannot load config.json",
        run_file("model/evil.py"),
    ),
    Trial(
        "an attention kernel of the hub",
        settings("config.json", attn_implementation="owner/kernel"),
        load(),
        9,
        "it names code to download",
        holds("owner/kernel"),
    ),
    Trial(
        "other weights than the folder's",
        settings("config.json", transformers_weights="../../outside/x.safetensors"),
        load(),
        9,
        "it names another weights file",
        leads_outside("model/../../outside"),
    ),
    Trial(
        "a configuration nested without end",
        all_of(model, lambda case: (case.model / "config.json").write_text('{"a":' * 100_000)),
        load(),
        4,
        "cannot read config.json",
        Seen(lambda case: len((case.model / "config.json").read_text()) > 10**5),
    ),
    Trial("a link to a secret", secret_model, load(), 4, "cannot read config.json", leads_outside("model/config.json")),
    Trial(
        "a chat template that reaches for globals",
        settings("tokenizer_config.json", chat_template=SSTI),
        train,
        0,
        "saved students",
        rendered,
    ),
    Trial(
        "a chat template in a file",
        all_of(
            model, lambda c: (c.model / "chat_template.jinja").write_text(SSTI.replace("CANARY", str(c.site.canary)))
        ),
        train,
        0,
        "saved students",
        rendered,
    ),
]
DATA = [
    *(
        Trial(f"rows in {name}", data(name, write), rows(path=name), 3, FORMATS, unpickled(name))
        for name, write in [
            ("rows.pkl", payloads.raw),
            ("rows.pt", archive),
            ("rows.npy", array),
            ("rows.joblib", payloads.raw),
        ]
    ),
    Trial(
        "answers in a pickle",
        all_of(data("answers.pkl", payloads.raw), text_file("rows.jsonl", GOOD_ROWS)),
        pocl("evaluate", "evaluation.predictions=answers.pkl", "evaluation.datasets=[./rows.jsonl]"),
        3,
        FORMATS,
        unpickled("answers.pkl"),
    ),
    Trial(
        "a folder with a data set script",
        all_of(text_file("set/set.py", "CODE"), text_file("set/train.jsonl", GOOD_ROWS)),
        rows(path="set"),
        0,
        "8 rows",
        run_file("set/set.py"),
    ),
    Trial(
        "a folder with a data set script alone",
        text_file("set/set.py", "CODE"),
        rows(path="set"),
        3,
        "no file of the split",
        run_file("set/set.py"),
    ),
    Trial(
        "a data set script as the path",
        text_file("set.py", "CODE"),
        rows(path="set.py"),
        3,
        FORMATS,
        run_file("set.py"),
    ),
    Trial(
        "parquet with a type that is a pickle",
        data("rows.parquet", payloads.extension_parquet),
        rows(path="rows.parquet"),
        0,
        "2 rows",
        metadata_unpickled("rows.parquet", b"ARROW:extension:metadata"),
    ),
    Trial(
        "parquet with a pickle for pandas",
        data("rows.parquet", payloads.pandas_parquet),
        rows(path="rows.parquet"),
        0,
        "1 rows",
        metadata_unpickled("rows.parquet", b"pandas"),
    ),
    Trial(
        "parquet with a column of pickles",
        data("rows.parquet", payloads.pickled_column),
        rows(path="rows.parquet"),
        3,
        "output",
        payloads.column_unpickled,
    ),
    Trial(
        "a saved data set with a type that is a pickle",
        payloads.saved_folder,
        rows(path="saved"),
        0,
        "2 rows",
        metadata_unpickled("saved/data-00000-of-00001.arrow", b"ARROW:extension:metadata"),
    ),
    Trial(
        "a saved data set that lists a file outside",
        all_of(
            payloads.outside_rows,
            text_file("saved/state.json", json.dumps({"_data_files": [{"filename": "../../outside/x.arrow"}]})),
        ),
        rows(path="saved"),
        9,
        "an index may only name files beside it",
        leads_outside("saved/../../outside/x.arrow"),
    ),
    Trial(
        "a saved data set whose split is outside",
        all_of(payloads.outside_rows, text_file("saved/dataset_dict.json", json.dumps({"splits": ["../../outside"]}))),
        rows(path="saved"),
        9,
        "an index may only name files beside it",
        leads_outside("saved/../../outside"),
    ),
    Trial(
        "data files that lead outside",
        all_of(payloads.outside_rows, text_file("set/train.jsonl", GOOD_ROWS)),
        rows(path="set", data_files="../../outside/rows.jsonl"),
        9,
        "leads out of set",
        leads_outside("set/../../outside/rows.jsonl"),
    ),
    Trial(
        "rows nested without end",
        text_file("rows.jsonl", '{"instruction":' * 100_000),
        rows(path="rows.jsonl"),
        3,
        "bad JSON",
        Seen(lambda case: (case.work / "rows.jsonl").stat().st_size > 10**6),
    ),
    *(
        Trial(
            f"a packed bomb in {name}",
            payloads.bomb(name, line=line),
            rows(path=name),
            9,
            "unpacks to more than",
            Seen(lambda case, name=name: (case.work / name).stat().st_size < 2**20),
        )
        for name, line in [("rows.jsonl.gz", True), ("rows.json.gz", False)]
    ),
    Trial(
        "terminal escapes, HTML and a template in rows",
        text_file("rows.jsonl", HOSTILE_ROWS),
        show_rows,
        0,
        "<script>",
        Seen(lambda case: "\x1b" in json.loads((case.work / "rows.jsonl").read_text().splitlines()[0])["instruction"]),
    ),
]
OVERRIDES = [
    *(
        Trial(f"the override {word[:48]}", EMPTY, pocl("distill", word), 9, "refused", built)
        for word in [
            f"+hydra.callbacks.x={TARGET}",
            f"hydra.launcher.x={TARGET}",
            "hydra.sweeper._target_=shutil.copyfile",
            "hydra.job_logging.handlers.x.class=shutil.copyfile",
            "hydra/job_logging=evil",
            "hydra.searchpath=[file://ROOT/outside]",
            "hydra.job.env_set.LD_PRELOAD=ROOT/evil.so",
            "hydra.mode=MULTIRUN",
        ]
    ),
    *(
        Trial(f"the override {word[:48]}", EMPTY, pocl("distill", word), 9, "refused key", built)
        for word in [
            f"+kd_method.x={TARGET}",
            "+train.dev_decoding._target_=shutil.copyfile",
            f"evaluation.datasets=[{TARGET}]",
        ]
    ),
    Trial(
        "a rerun from a pickle",
        data("job.pickle", payloads.raw),
        pocl("distill", "--experimental-rerun", "job.pickle"),
        9,
        "it reads a pickle",
        unpickled("job.pickle"),
    ),
]
EXPERIMENT = "# @package _global_\n"
FILES = [
    *(
        Trial(
            f"a recipe with {name}",
            conf("experiment/evil.yaml", EXPERIMENT + text),
            pocl("distill", "--config-dir=conf", "experiment=evil"),
            9,
            part,
            live,
        )
        for name, text, part, live in [
            ("_target_", f"kd_method: {TARGET}\n", "refused key kd_method._target_", built),
            ("a callback", f"hydra: {{callbacks: {{x: {TARGET}}}}}\n", "refused hydra.callbacks", built),
            ("a launcher", "hydra: {launcher: {_target_: shutil.copyfile}}\n", "refused hydra.launcher._target_",
             built),
            ("a library to preload", "hydra: {job: {env_set: {LD_PRELOAD: ROOT/evil.so}}}\n",
             "refused hydra.job.env_set", leads_outside("../evil.so")),
            ("a YAML tag that calls", "x: !!python/object/apply:shutil.copyfile [/dev/null, CANARY]\n",
             "refused YAML tag", unsafely_read("experiment/evil.yaml")),
            ("a YAML alias bomb", "a0: &a0 [x,x,x,x,x,x,x,x,x,x]\n" + "".join(
                f"a{i}: &a{i} [{','.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 9)),
             "refused YAML aliases", holds("*a7")),
        ]
    ),
    Trial(
        "a primary configuration with a search path",
        conf("evil.yaml", "defaults: [distill]\nhydra: {searchpath: ['file://ROOT/outside']}\n"),
        pocl("distill", "--config-dir=conf", "--config-name=evil"),
        9,
        "refused hydra.searchpath",
        leads_outside("../outside"),
    ),
]  # fmt: skip
NAMES = [
    Trial(
        "a test set named outside",
        text_file("rows.jsonl", GOOD_ROWS),
        pocl("evaluate", "experiment=demo", "evaluation.datasets=[{name: ../../../../../outside/x, path: rows.jsonl}]"),
        2,
        "a name",
        leads_outside("outputs/.work/0123456789ab/shards/../../../../../outside/x"),
    ),
    Trial(
        "a data set named outside",
        text_file("rows.jsonl", GOOD_ROWS),
        pocl("partition", "dataset=local", "dataset.name=/etc/x", "dataset.path=rows.jsonl"),
        2,
        "a name",
        Seen(lambda case: Path("outputs") / "/etc/x" == Path("/etc/x")),
    ),
    Trial(
        "a student named outside",
        EMPTY,
        lambda case: (
            Chain(
                changed(case.run, student=case.run.config.student.model_copy(update={"name": "../../../etc/x\n\0\x1b"}))
            ).student_key.folder_name
        ),
        0,
        "etc-x-fkl",
        leads_outside("../../../etc/x"),
    ),
    Trial("a model's path with a NUL", EMPTY, load(path="model\0"), 2, "is no path of a model", holds("\0")),
    Trial("a model's path with an escape", EMPTY, load(path="a\x1b[2J"), 2, "is no path of a model", holds("\x1b")),
    Trial("a data set's path with an escape", EMPTY, rows(path="a\x1b[2J.jsonl"), 3, "no file", holds("\x1b")),
    Trial(
        "a manifest that lists a file outside",
        listing_outside,
        load(path="latest"),
        9,
        "a name must lead to a place inside its folder",
        leads_outside("outputs/students/evil/../../../../outside/x"),
    ),
    Trial(
        "a link inside an artifact",
        link_in_artifact,
        load(path="latest"),
        9,
        "is a link or a special file",
        leads_outside("outputs/students/latest/model/more.json"),
    ),
    Trial(
        "an artifact that is a link",
        linked_artifact,
        load(path="latest"),
        9,
        "is a symbolic link",
        leads_outside("outputs/students/latest"),
    ),
    *(
        Trial(
            f"{'/'.join(parts)} is a link to elsewhere",
            all_of(text_file("rows.jsonl", GOOD_ROWS), linked(*parts)),
            show_rows,
            9,
            "is a symbolic link",
            leads_outside("/".join(("outputs", *parts))),
        )
        for parts in [("partitions",), (".work",)]
    ),
]
LEAKS = [
    Trial(
        "a token in a mistyped override", EMPTY, pocl("distill", f"+hub_token={SECRET}"), 2, "hub_token", holds(SECRET)
    ),
    Trial(
        "a password in a model's URL",
        EMPTY,
        load(path=f"https://me:{SECRET}@host/model"),
        4,
        "there is no folder",
        holds(SECRET),
    ),
    Trial(
        "a token of the environment in a path",
        EMPTY,
        pocl(
            "distill",
            "dataset=local",
            "dataset.path=${oc.env:HF_TOKEN}/x.jsonl",
            "student=tiny",
            "teacher=none",
            "kd_method=sft",
        ),
        3,
        "no file, folder or hub id",
        holds(SECRET),
        {"HF_TOKEN": SECRET},
    ),
    Trial(
        "a token of the environment in an unknown option",
        EMPTY,
        pocl("distill", f"kd_method={SECRET}"),
        2,
        "unknown kd_method",
        holds(SECRET),
        {"WANDB_API_KEY": SECRET},
    ),
]
TRIALS = [
    *(MODELS + PICKLES_ALLOWED + SAFETENSORS + SETTINGS),
    *(DATA + OVERRIDES + FILES + NAMES + LEAKS),
]


# ── the tests ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def inputs() -> Iterator[Path]:
    with memory_folder() as folder:
        write_inputs(folder)
        yield folder


@pytest.fixture(scope="module")
def base(inputs: Path) -> Case:
    """Good inputs and a composed run; the site comes with each trial."""
    run = compose(recipe(inputs, Path("outputs"), "train.evaluate_every=0", "train.max_steps=1", "curriculum=none"))
    return Case(Site(inputs), inputs, run)


@pytest.fixture
def case(base: Case) -> Iterator[Case]:
    with memory_folder() as folder:
        site = Site(folder)
        site.make()
        yield Case(site, base.inputs, base.run)


def planted(trial: Trial, case: Case) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(case.work)
        trial.plant(case)


every_trial = pytest.mark.parametrize("trial", TRIALS, ids=[trial.name for trial in TRIALS])


def check_harmless(outcome: Outcome, case: Case, before: dict[str, str]) -> None:
    """What holds after every trial."""
    assert not case.site.canary.exists()
    assert outcome.incidents == []
    assert outcome.num_packets in (0, None)
    assert case.site.listing() == before
    shown = outcome.stdout + outcome.stderr
    assert [c for c in shown if not c.isprintable() and c not in "\n\t"] == []
    assert "Traceback" not in shown
    assert SECRET not in shown
    kept = [path for path in (case.work / "outputs").rglob("*") if path.is_file() and not path.is_symlink()]
    assert [path for path in kept if SECRET.encode() in path.read_bytes() or SECRET in str(path)] == []


@every_trial
def test_command_when_something_hostile_is_given_then_nothing_runs_and_nothing_leaks(trial: Trial, case: Case) -> None:
    planted(trial, case)
    before = case.site.listing()
    outcome = watched(case.site, lambda: trial.act(case), trial.env)
    assert outcome.exit_code == trial.exit_code, outcome.stderr
    assert trial.part in outcome.stderr + str(outcome.value)
    if trial.exit_code:
        assert outcome.stderr.splitlines()[-1].startswith("pocl: error: ")
        assert outcome.stdout == ""
    with tally.trial("a hostile fixture runs nothing, sends nothing, and changes nothing outside outputs"):
        check_harmless(outcome, case, before)


@every_trial
def test_payload_when_it_is_read_carelessly_then_it_is_live(trial: Trial, case: Case) -> None:
    planted(trial, case)
    live = trial.live
    if isinstance(live, Seen):
        assert live.test(case)
        return
    outcome = watched(case.site, lambda: live(case), trial.env)
    assert case.site.canary.exists(), outcome.stderr
    assert outcome.incidents != []


def test_trials_when_counted_then_there_are_at_least_sixty_with_names_of_their_own() -> None:
    assert len({trial.name for trial in TRIALS}) == len(TRIALS) >= 60


def test_sandbox_when_the_system_allows_it_then_has_no_network(case: Case) -> None:
    outcome = watched(case.site, lambda: None)
    if outcome.num_packets is None:
        pytest.skip("this system lets no process leave its network (unshare): Python's own calls are watched instead")
    assert outcome.num_packets == 0


def test_sandbox_when_code_runs_then_sees_the_file_the_process_and_the_network(case: Case) -> None:
    def misbehave() -> None:
        (case.site.outside / "x").write_text("x")
        exec(payloads.code(case.site))
        os.system("true")

    incidents = watched(case.site, misbehave).incidents
    for part in (f"writes {case.site.outside}/x", f"writes {case.site.canary}", "socket.connect", "os.system"):
        assert any(part in one for one in incidents), incidents
