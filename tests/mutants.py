"""Spoils the code of commits, locks, resuming and guards, a small change at a time: some test must notice each.

usage: python tests/mutants.py [WORD …]      only the mutants whose file or reason holds one of the words
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
NEEDED = ("pocl_cli", "conf", "tests", "benchmarks", "pyproject.toml", "README.md")


@dataclass(frozen=True)
class Mutant:
    """What would be wrong, the text of a file of the package that becomes another, and the tests that must fail."""

    wrong: str
    file: str
    old: str
    new: str
    tests: str
    which: str = ""  # pytest -k


DURABLE, STORE, LOCK = (f"tests/unit/artifacts/test_{name}.py" for name in ("durable", "store", "lock"))
CHECKPOINT, JOURNAL, LOOP, SAMPLER = (
    f"tests/unit/training/test_{name}.py" for name in ("checkpoint", "journal", "loop", "sampler")
)
CRASHES, RESUME = "tests/unit/artifacts/test_commit_crashes.py", "tests/integration/test_resume.py"

MUTANTS = (
    # ── commits ───────────────────────────────────────────────────────────────────────────────────────────────────
    Mutant(
        "an artifact appears before its files are on the disk",
        "artifacts/work.py",
        "        durable.fsync_tree(staged)\n",
        "",
        CRASHES,
        "flushed",
    ),
    Mutant(
        "a file is renamed into place before it is on the disk",
        "artifacts/durable.py",
        '                os.fsync(handle.fileno())\n            faults.reached("rename", path)',
        '            faults.reached("rename", path)',
        DURABLE,
        "flushes",
    ),
    Mutant(
        "an artifact replaces another",
        "artifacts/durable.py",
        "        rename_without_replacing(source, target)\n",
        "        os.replace(source, target)\n",
        DURABLE,
        "replaces_nothing",
    ),
    Mutant(
        "a commit moves the work instead of linking it",
        "artifacts/durable.py",
        "os.link(source, target, follow_symlinks=False)",
        "os.rename(source, target)",
        CRASHES,
        "before_the_rename",
    ),
    Mutant(
        "checkpoints are shipped with the student",
        "artifacts/work.py",
        "{WORK_FILE, *exclude}",
        "{WORK_FILE}",
        STORE,
        "shipped_files_only",
    ),
    Mutant(
        "a changed manifest is believed",
        "artifacts/manifest.py",
        "    _check_seal(folder)\n",
        "",
        STORE,
        "truncated",
    ),
    Mutant(
        "a file's content is not compared",
        "artifacts/manifest.py",
        "if rehash and hashing",
        "if False and hashing",
        STORE,
        "flipped",
    ),
    Mutant(
        "the clean-up takes unfinished work for finished",
        "artifacts/store.py",
        "if content is not None and self._is_finished(content):",
        "if content is not None:",
        LOCK,
        "killed",
    ),
    # ── locks ─────────────────────────────────────────────────────────────────────────────────────────────────────
    Mutant(
        "two processes hold one lock",
        "artifacts/lock.py",
        "kind: int = fcntl.LOCK_EX",
        "kind: int = fcntl.LOCK_SH",
        LOCK,
        "live_process or race",
    ),
    Mutant(
        "a lock file that lost its name still counts",
        "artifacts/lock.py",
        "            if _is_same_file(descriptor, path):",
        "            if descriptor:",
        LOCK,
        "takes_over",
    ),
    Mutant(
        "a forked child takes its parent's lock away",
        "artifacts/lock.py",
        "            if os.getpid() == owner:\n                _withdraw",
        "            if True:\n                _withdraw",
        LOCK,
        "forked_child",
    ),
    # ── resuming ──────────────────────────────────────────────────────────────────────────────────────────────────
    Mutant(
        "a damaged checkpoint is read",
        "training/checkpoint.py",
        "        _check_digest(confined(path, name), digest)\n",
        "        pass\n",
        CHECKPOINT,
        "damaged",
    ),
    Mutant(
        "only one checkpoint is kept",
        "training/checkpoint.py",
        "KEPT = 2",
        "KEPT = 1",
        CHECKPOINT,
        "two_newest",
    ),
    Mutant(
        "a run goes on under other conditions",
        "training/checkpoint.py",
        "    if before != now:",
        "    if False:",
        CHECKPOINT,
        "other_conditions",
    ),
    Mutant(
        "the optimizer starts afresh in the middle of a stage",
        "training/loop.py",
        "if resumed_from and (state.stage_step or _keeps_optimizer(job, state.stage)):",
        "if False:",
        RESUME,
        "again_and_again",
    ),
    Mutant(
        "dropout goes on from where the process is",
        "training/loop.py",
        '                torch.manual_seed(derive_seed(settings.seed, "dropout", state.step, *processes.stream))\n',
        "",
        RESUME,
        "again_and_again",
    ),
    Mutant(
        "dropout is the same in every step",
        "training/loop.py",
        'derive_seed(settings.seed, "dropout", state.step, *processes.stream)',
        'derive_seed(settings.seed, "dropout", 0, *processes.stream)',
        LOOP,
        "dropout",
    ),
    Mutant(
        "lines after the checkpoint stay",
        "training/journal.py",
        '        durable.truncate(folder / "metrics.jsonl", state.metrics_bytes)\n',
        "",
        JOURNAL,
        "resumed",
    ),
    Mutant(
        "rows consumed after the checkpoint stay",
        "training/journal.py",
        "if int(part.stem) > state.step:",
        "if False:",
        JOURNAL,
        "resumed",
    ),
    Mutant(
        "every epoch has the same order",
        "training/sampler.py",
        "self.stage.index, epoch)",
        "self.stage.index)",
        SAMPLER,
        "order_when_seed",
    ),
    # ── guards ────────────────────────────────────────────────────────────────────────────────────────────────────
    Mutant(
        "a step that is not finite reaches the weights",
        "training/finite.py",
        "        self.found.copy_(torch.maximum(self.found, first.to(self.found)))\n",
        "",
        LOOP,
        "finite",
    ),
    Mutant(
        "a step that is not finite is not told of",
        "training/finite.py",
        "        if stage_step < 0:",
        "        if True:",
        LOOP,
        "finite",
    ),
    Mutant(
        "a signal waits for the end of a dev evaluation",
        "training/signals.py",
        "        if self._at_once:\n            raise",
        "        if False:\n            raise",
        LOOP,
        "inside",
    ),
    Mutant(
        "a signal is raised in the middle of an import",
        "interrupts.py",
        "    if not _imports(frame):",
        "    if True:",
        "tests/unit/test_interrupts.py",
        "import",
    ),
)


def main(words: list[str]) -> int:
    """The exit code: 1 where a mutant survives."""
    chosen = [one for one in MUTANTS if not words or any(word in f"{one.file} {one.wrong}" for word in words)]
    with tempfile.TemporaryDirectory(prefix="pocl-mutants-") as name:
        copy = Path(name)
        for part in NEEDED:
            (shutil.copytree if (ROOT / part).is_dir() else shutil.copy)(ROOT / part, copy / part)
        survived = [one for one in chosen if _survives(one, copy)]
    print(f"{len(chosen) - len(survived)} of {len(chosen)} mutants are noticed")
    return 1 if survived else 0


def _survives(mutant: Mutant, copy: Path) -> bool:
    path = copy / "pocl_cli" / mutant.file
    text = path.read_text(encoding="utf-8")
    if text.count(mutant.old) != 1:
        raise SystemExit(f"{mutant.file} holds this text {text.count(mutant.old)} times, not once: {mutant.old!r}")
    if not _passes(mutant, copy):
        raise SystemExit(f"the tests of {mutant.wrong!r} fail without it, or there are none: {mutant.tests}")
    path.write_text(text.replace(mutant.old, mutant.new), encoding="utf-8")
    passes = _passes(mutant, copy)
    path.write_text(text, encoding="utf-8")
    print(f"{'SURVIVES' if passes else 'noticed '}  {mutant.file}: {mutant.wrong}", flush=True)
    return passes


def _passes(mutant: Mutant, copy: Path) -> bool:
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", mutant.tests, "-k", mutant.which]
    done = subprocess.run(
        command, cwd=copy, env={**os.environ, "PYTHONPATH": str(copy)}, capture_output=True, text=True, timeout=300
    )
    if done.returncode not in (0, 1):
        raise SystemExit(f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout}{done.stderr}")
    return done.returncode == 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
