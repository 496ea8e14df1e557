"""What users get wrong: the exit code, and one line that says what, where, why and what to do. No traceback, ever.

`MISTAKES` is the table; each row is a command, what was done before it, and the decisive words of its last line.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

from pocl_cli.steps.chain import Chain
from pocl_cli.steps.result import obtain

from ..support.command import Finished, run_pocl
from ..support.folders import memory_folder, mounted
from ..support.recipe import compose, recipe, write_inputs

Setup = Callable[[Path], object]


@dataclass(frozen=True)
class Mistake:
    """One row: after `before` in a fresh folder with good rows and models, `pocl WORDS…` ends like this."""

    name: str
    words: tuple[str, ...]
    exit_code: int
    parts: tuple[str, ...]
    before: Setup = field(default=lambda folder: None)


def small(*changes: str) -> tuple[str, ...]:
    """Overrides of a chain on relative paths that would train for a second."""
    words = [*recipe(Path(), Path("outputs")), "train.evaluate_every=0", "train.max_steps=3"]
    return (*words, *changes)


def rows(text: str, name: str = "bad.jsonl") -> Setup:
    return lambda folder: (folder / name).write_text(text, encoding="utf-8")


def good_lines(num: int) -> str:
    return "".join(json.dumps({"instruction": f"Say {i}", "output": str(i)}) + "\n" for i in range(num))


def other_tokenizer(folder: Path) -> None:
    """A teacher whose tokenizer gives two tokens each other's numbers."""
    shutil.copytree(folder / "teacher", folder / "other")
    path = folder / "other" / "tokenizer.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    vocabulary = content["model"]["vocab"]
    one, two = [token for token, number in vocabulary.items() if number in (100, 101)]
    vocabulary[one], vocabulary[two] = vocabulary[two], vocabulary[one]
    path.write_text(json.dumps(content), encoding="utf-8")


def pickle_only(folder: Path) -> None:
    shutil.copytree(folder / "teacher", folder / "pickled")
    (folder / "pickled" / "model.safetensors").rename(folder / "pickled" / "pytorch_model.bin")


def with_code(folder: Path) -> None:
    shutil.copytree(folder / "teacher", folder / "coded")
    path = folder / "coded" / "config.json"
    config = json.loads(path.read_text(encoding="utf-8")) | {"auto_map": {"AutoModelForCausalLM": "evil.Model"}}
    path.write_text(json.dumps(config), encoding="utf-8")


def without_weights(folder: Path) -> None:
    shutil.copytree(folder / "teacher", folder / "hollow")
    (folder / "hollow" / "model.safetensors").unlink()


def damaged_partition(folder: Path) -> None:
    done = run_pocl("partition", *small(), cwd=folder)
    (folder / done.stdout.strip() / "partition.parquet").write_bytes(b"short")


DATA = ("dataset.path=bad.jsonl", "dataset.fields.instruction=null")
MISTAKES = [
    # ── the command line ──
    Mistake("mistyped command", ("dsitll",), 2, ("unknown command 'dsitll'", "did you mean 'pocl distill'?")),
    Mistake("mistyped group", ("distill", "kd_mehtod=rkl"), 2, ("unknown key 'kd_mehtod'", "'kd_method'?")),
    Mistake("mistyped option", ("distill", "kd_method=rlk"), 2, ("unknown kd_method 'rlk'", "kd_method=rkl?")),
    Mistake("mistyped key", ("distill", "train.lrr=1"), 2, ("unknown key 'train.lrr'", "did you mean 'train.lr'?")),
    Mistake("key of another method", ("distill", "kd_method.alpha=0.1"), 2, ("'kd_method.alpha'", "sfkl and srkl")),
    Mistake("mistyped recipe", ("distill", "experiment=paper/gpt2_fkl_pcol"), 2, ("experiment=paper/gpt2_fkl_pocl?",)),
    Mistake("mistyped flag", ("distill", "--mutlirun"), 2, ("unknown flag '--mutlirun'", "did you mean --multirun?")),
    Mistake("dashes", ("distill", "--train.lr=0.1"), 2, ("an override has no dashes: train.lr=0.1",)),
    Mistake("no '='", ("distill", "kd_method", "rkl"), 2, ("cannot read the override 'rkl'", "write rkl=VALUE")),
    Mistake("a sweep without -m", ("distill", "kd_method=fkl,rkl"), 2, ("several values", "run it with -m")),
    Mistake("unquoted path", ("score", "dataset.path=my (1).jsonl"), 2, ("'dataset.path=\"my (1).jsonl\"'",)),
    Mistake("a path as an option", ("score", "teacher=./m"), 2, ("unknown teacher './m'", "teacher.path=./m")),
    Mistake("no such --config-dir", ("distill", "--config-dir", "nope"), 2, ("no configuration folder", "nope")),
    # ── values ──
    Mistake("wrong type", ("distill", "train.lr=fast"), 2, ("bad value train.lr='fast'", "set train.lr to a number")),
    Mistake("out of range", ("distill", "curriculum.kd_ratio.end=1.5"), 2, ("end=1.5", "a number of at most 1")),
    Mistake("wrong word", ("distill", "train.checkpoint_policy=bets"), 2, ("train.checkpoint_policy=best?",)),
    Mistake("unknown device", ("distill", "hardware.device=gpu"), 2, ("devices are auto, cpu, mps, cuda and cuda:N",)),
    Mistake("too few epochs", ("distill", "curriculum.epochs_per_stage=[1,2]"), 2, ("2 numbers for 4 stages",)),
    Mistake("distillation without teacher", ("distill", "teacher=none"), 2, ("needs a teacher", "kd_method=sft")),
    Mistake("a plan of another step", ("score", "plan=true"), 2, ("only distill and compare", "distill plan=true")),
    Mistake("mistyped test set", ("evaluate", "evaluation.datasets=[doly_eval]"), 2, ("did you mean 'dolly_eval'?",)),
    Mistake("no row is left", ("score", "dataset.limit=10", "dataset.dev_size=10"), 2, ("takes all of", "dev_size=0")),
    Mistake("code in an override", ("distill", "+kd_method._target_=os.system"), 9, ("kd_method._target_",)),
    Mistake("a logger in an override", ("distill", "hydra.job_logging.x=1"), 9, ("refused hydra.job_logging.x",)),
    # ── data ──
    Mistake("no such file", ("score", *small("dataset.path=nope.jsonl")), 3, ("nope.jsonl",)),
    Mistake("empty file", ("score", *small(*DATA)), 3, ("bad.jsonl", "no usable row"), rows("")),
    Mistake("only blank lines", ("score", *small(*DATA)), 3, ("bad.jsonl", "no usable row"), rows("\n\n  \n")),
    Mistake("bad line 17", ("score", *small(*DATA)), 3, ("bad.jsonl:17",), rows(good_lines(16) + '{"instr\n')),
    Mistake(
        "missing field", ("score", *small(*DATA)), 3, ("bad.jsonl", "output"), rows('{"instruction": "x"}\n')
    ),
    Mistake(
        "mistyped field", ("score", *small("dataset.fields.output=anwser")), 3, ("anwser", "dataset.fields.output")
    ),
    Mistake("more dev rows than rows", ("score", *small("dataset.dev_size=30")), 3, ("30 dev rows", "dev_size")),
    Mistake("more stages than rows", ("partition", *small("curriculum.stages=25")), 2, ("25", "24 or less")),
    Mistake("data set offline", ("score", *small("dataset.path=owner/rows")), 5, ("owner/rows", "dataset.path")),
    Mistake(
        "answers for other rows",
        ("evaluate", "evaluation.predictions=bad.jsonl", "evaluation.datasets=[rows.jsonl]"),
        3,
        ("2 predictions for 30 usable rows", "bad.jsonl"),
        rows('{"text": "x"}\n' * 2),
    ),
    Mistake(
        "answers without text",
        ("evaluate", "evaluation.predictions=bad.jsonl", "evaluation.datasets=[rows.jsonl]"),
        3,
        ("bad.jsonl:2", 'give "text" or "prediction"'),
        rows('{"text": "x"}\n{"answer": "y"}\n'),
    ),
    # ── models ──
    Mistake("model offline", ("score", *small("teacher.path=owner/name")), 5, ("owner/name", "local folder")),
    Mistake("no such model folder", ("score", *small("teacher.path=./nope")), 4, ("'./nope'", "owner/name")),
    Mistake("no such student id", ("score", *small("teacher.path=abcdef012345")), 4, ("abcdef012345",)),
    Mistake("no weights", ("score", *small("teacher.path=hollow")), 4, ("hollow",), without_weights),
    Mistake("only a pickle", ("score", *small("teacher.path=pickled")), 9, ("pytorch_model.bin",), pickle_only),
    Mistake("code beside a model", ("score", *small("teacher.path=coded")), 9, ("coded", "auto_map"), with_code),
    Mistake("another tokenizer", ("score", *small("teacher.path=other")), 2, ("tokenizer", "100"), other_tokenizer),
    Mistake("short context", ("score", *small("dataset.max_tokens=100")), 2, ("100", "64", "dataset.max_tokens")),
    Mistake("too many layers", ("score", *small("student.architecture=null", "student.tokenizer=null",
        "student.path=teacher", "student.layers=7")), 2, ("student.layers", "7")),
    # ── the chain ──
    Mistake("distill first", ("distill", *small("upstream=require")), 4, ("run: pocl partition experiment=demo",)),
    Mistake("evaluate first", ("evaluate", *small("upstream=require")), 4, ("run: pocl distill experiment=demo",)),
    Mistake("damaged artifact", ("distill", *small()), 4, ("partition.parquet", "delete it: rm -r"), damaged_partition),
    Mistake("rate too high", ("distill", *small("train.lr=1e30", "train.lr_end=1")), 7, ("stage 0, step", "train.lr")),
    Mistake(
        "no tracker package",
        ("distill", *small("tracker=trackio")),
        2,
        ("tracker=trackio needs a package", "pip install 'pocl-cli[trackio]'"),
    ),
    # ── the machine ──
    Mistake(
        "outputs is a file", ("distill", *small()), 5, ("outputs", "paths.outputs"), rows("in the way", "outputs")
    ),
]  # fmt: skip


@pytest.fixture(scope="module")
def inputs() -> Iterator[Path]:
    with memory_folder() as folder:
        write_inputs(folder)
        yield folder


@pytest.fixture
def folder(inputs: Path, tmp_path: Path) -> Path:
    """A fresh folder with rows and a teacher."""
    shutil.copy(inputs / "rows.jsonl", tmp_path)
    (tmp_path / "teacher").symlink_to(inputs / "teacher")
    return tmp_path


def check(done: Finished, exit_code: int, parts: tuple[str, ...]) -> None:
    assert done.exit_code == exit_code, done.stderr
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith("pocl: error: ")
    assert " — " in last
    assert all(part in last for part in parts), last


@pytest.mark.parametrize("mistake", MISTAKES, ids=[mistake.name for mistake in MISTAKES])
def test_command_when_a_user_errs_then_the_last_line_says_what_and_what_to_do(mistake: Mistake, folder: Path) -> None:
    mistake.before(folder)
    check(run_pocl(*mistake.words, cwd=folder), mistake.exit_code, mistake.parts)


def test_mistakes_when_counted_then_there_are_at_least_thirty_with_names_of_their_own() -> None:
    assert len({mistake.name for mistake in MISTAKES}) == len(MISTAKES) >= 30


def test_command_when_thirty_things_are_wrong_then_all_are_told_before_torch_is_imported(folder: Path) -> None:
    keys = [f"train.wrong_{number}=1" for number in range(10)]
    options = ["kd_method=a", "curriculum=b", "dataset=c", "teacher=d", "student=e", "difficulty=f", "tracker=g"]
    values = [
        "train.lr=x",
        "train.seed=1.5",
        "train.grad_clip=0",
        "score.teacher=maybe",
        "upstream=no",
        "plan.num_rows=0",
    ]
    others = ["+a=1", "b=1", "train.log_every=[1", "c", "~d", "+upstream=auto", "evaluation.seeds.9=1"]
    done = run_pocl("distill", *keys, *options, *values, *others, cwd=folder)
    assert (done.exit_code, done.stdout, len(done.errors)) == (2, "", 30)
    assert done.stderr.splitlines() == done.errors


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_command_when_the_device_is_not_there_then_the_line_says_so(folder: Path) -> None:
    check(run_pocl("distill", *small("hardware.device=cuda"), cwd=folder), 2, ("'cuda'", "hardware.device=cpu"))


@pytest.mark.parametrize(("by", "code", "moment"), [(signal.SIGINT, 130, "stage 0:"), (signal.SIGTERM, 143, "Stages")])
def test_command_when_it_is_interrupted_then_the_same_command_goes_on(
    folder: Path, by: signal.Signals, code: int, moment: str
) -> None:
    words = small("train.max_steps=12", "train.evaluate_every=1")
    check(
        run_pocl("distill", *words, cwd=folder, interrupt_at=lambda stderr: moment in stderr, interrupt_by=by),
        code,
        ("interrupted", by.name, "the same command goes on"),
    )
    again = run_pocl("distill", *words, cwd=folder)
    assert again.exit_code == 0, again.stderr


def test_command_when_another_process_has_the_run_then_it_says_who(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    chain = Chain(compose(small()))
    obtain(chain.run, "partition", chain.partition_key, chain.store)
    with chain.store.open_work(chain.student_key):
        check(run_pocl("distill", *small(), cwd=folder), 6, (str(os.getpid()),))


# ── disks ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("size_kb", "why"),
    [(4, "No space left on device"), (40, "not enough disk space"), (240, "No space left on device")],
)
def test_command_when_the_disk_is_full_then_it_says_so_and_goes_on_when_there_is_room(
    folder: Path, size_kb: int, why: str
) -> None:
    with mounted(folder / "outputs", "-o", f"size={size_kb}k") as place:
        check(run_pocl("distill", *small(), cwd=folder), 5, (why, "free some space"))
        subprocess.run(["mount", "-o", "remount,size=20m", str(place)], check=True)
        again = run_pocl("distill", *small(), cwd=folder)
        assert again.exit_code == 0, again.stderr


def test_command_when_the_disk_is_read_only_then_it_says_so(folder: Path) -> None:
    with mounted(folder / "outputs", "-o", "ro"):
        check(run_pocl("score", *small(), cwd=folder), 5, ("Read-only file system", "paths.outputs"))
