"""Rules that hold for the whole package: what no module may call, who alone writes files, what importing costs."""

from __future__ import annotations

import ast
import importlib.metadata
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import pocl_cli

PACKAGE = Path(pocl_cli.__file__).parent
PROJECT = PACKAGE.parent

CODE_CARRYING_FORMATS = {"pickle", "_pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
WRITING_CALLS = {"write_text", "write_bytes", "save_file", "write_table", "to_parquet", "savez", "tofile"}
# Each of these writes something that is not an artifact, or is the one place that writes them.
MAY_WRITE = {
    "artifacts/durable.py": "the only writer of durable files",
    "artifacts/lock.py": "lock files, which stay empty",
    "cli.py": "nothing, to /dev/null, where nobody reads stdout",
    "log.py": "the run's log",
}
# The one module that reads a checkpoint which exists as a pickle only, and what it is forgiven.
READS_PICKLES = "models/pickled.py"
FORGIVEN = ["imports a format that carries code", "calls torch.load, which runs code that a file names"]
RUNS_CODE = {
    *("eval", "exec", "torch.load", "np.load", "numpy.load", "yaml.load", "yaml.unsafe_load", "yaml.full_load"),
    *("pd.read_pickle", "pandas.read_pickle", "torch.jit.load", "runpy.run_path", "runpy.run_module", "os.system"),
}
# An internal bug ends in `cli` as one line and exit 70; `training.signals` raises again all but what a signal caused.
CATCH_ALL_ONCE = {"cli.py", "training/signals.py"}
CATCHES_ALL = "catches every exception"


def called_name(call: ast.Call) -> str:
    """The dotted name that is called: "open", "torch.load", "?.write_text" where the owner is an expression."""
    parts: list[str] = []
    node: ast.expr = call.func
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    parts.append(node.id if isinstance(node, ast.Name) else "?")
    return ".".join(reversed(parts))


def is_literal(node: ast.expr, value: object) -> bool:
    return isinstance(node, ast.Constant) and node.value is value


def opens_for_writing(call: ast.Call) -> bool:
    """Whether an `open` has a writing mode or flag; a mode of the built-in one that is no literal counts as one."""
    owner, _, name = called_name(call).rpartition(".")
    if owner == "os" and name == "open":
        flags = {
            node.attr for argument in call.args[1:] for node in ast.walk(argument) if isinstance(node, ast.Attribute)
        }
        return bool(flags & {"O_WRONLY", "O_RDWR", "O_CREAT", "O_APPEND"})
    if name == "NamedTemporaryFile":
        return True
    if name not in {"open", "fdopen"}:
        return False
    # `path.open(mode)` has its mode first, `open(path, mode)` and `os.fdopen(number, mode)` have it second.
    position = 1 if owner in {"", "os", "io", "gzip"} else 0
    modes = [keyword.value for keyword in call.keywords if keyword.arg == "mode"] or call.args[position : position + 1]
    return any(
        bool(set("wax+") & set(str(mode.value))) if isinstance(mode, ast.Constant) else position == 1 for mode in modes
    )


def faults(source: str) -> Iterator[str]:
    """What no module of the package may do."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            module = node.module or "" if isinstance(node, ast.ImportFrom) else ""
            names = [module, *(alias.name for alias in node.names)] if module else [alias.name for alias in node.names]
            if {name.partition(".")[0] for name in names} & CODE_CARRYING_FORMATS:
                yield f"{node.lineno}: imports a format that carries code"
        if isinstance(node, ast.Call):
            name = called_name(node)
            if name in RUNS_CODE or name.endswith("instantiate"):
                yield f"{node.lineno}: calls {name}, which runs code that a file names"
            for keyword in node.keywords:
                if keyword.arg in {"trust_remote_code", "shell"} and not is_literal(keyword.value, False):
                    yield f"{node.lineno}: sets {keyword.arg}"
        if isinstance(node, ast.ExceptHandler):
            caught = node.type.elts if isinstance(node.type, ast.Tuple) else [node.type]
            if any(kind is None or (isinstance(kind, ast.Name) and kind.id == "Exception") for kind in caught):
                yield f"{node.lineno}: {CATCHES_ALL}"


def writes(source: str) -> Iterator[str]:
    """Where a file is opened for writing or written to, other than through `durable`."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call):
            owner, _, name = called_name(node).rpartition(".")
            if opens_for_writing(node) or (name in WRITING_CALLS and owner != "durable") or name == "FileHandler":
                yield f"{node.lineno}: {owner}.{name}"


MODULES = sorted(str(path.relative_to(PACKAGE)) for path in PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("module", MODULES)
def test_module_when_it_is_read_then_it_neither_runs_a_files_code_nor_hides_errors(module: str) -> None:
    found = list(faults((PACKAGE / module).read_text(encoding="utf-8")))
    if module in CATCH_ALL_ONCE:
        assert len([fault for fault in found if CATCHES_ALL in fault]) == 1
        found = [fault for fault in found if CATCHES_ALL not in fault]
    if module == READS_PICKLES:
        assert [fault.partition(": ")[2] for fault in found] == FORGIVEN
        found = []
    assert found == []


def test_module_that_reads_pickles_when_it_is_read_then_loads_weights_only() -> None:
    tree = ast.parse((PACKAGE / READS_PICKLES).read_text(encoding="utf-8"))
    (call,) = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and called_name(node) == "torch.load"]
    assert is_literal({keyword.arg: keyword.value for keyword in call.keywords}["weights_only"], True)
    (line,) = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module == "pickle"]
    assert [alias.name for alias in line.names] == ["UnpicklingError"]


@pytest.mark.parametrize("module", [module for module in MODULES if module not in MAY_WRITE])
def test_module_when_it_is_read_then_it_leaves_writing_to_the_durable_module(module: str) -> None:
    assert list(writes((PACKAGE / module).read_text(encoding="utf-8"))) == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from joblib import load",
        "torch.load(path)",
        "torch.load(path, weights_only=True)",
        "yaml.load(text, Loader=yaml.Loader)",
        "AutoModel.from_pretrained(name, trust_remote_code=True)",
        "AutoModel.from_pretrained(name, trust_remote_code=chosen)",
        "subprocess.run(line, shell=True)",
        "eval('1')",
        "hydra.utils.instantiate(cfg)",
        "instantiate(cfg)",
        "try:\n    x()\nexcept Exception:\n    pass",
        "try:\n    x()\nexcept:\n    pass",
        "try:\n    x()\nexcept (OSError, Exception):\n    pass",
    ],
)
def test_faults_when_a_rule_is_broken_then_it_is_found(source: str) -> None:
    assert len(list(faults(source))) == 1


@pytest.mark.parametrize(
    "source",
    ["model.eval()", "import json", "safetensors.torch.load_file(path)", "load(x, trust_remote_code=False)"],
)
def test_faults_when_a_call_only_looks_alike_then_it_passes(source: str) -> None:
    assert list(faults(source)) == []


@pytest.mark.parametrize(
    "source",
    [
        "open(path, 'w')",
        "open(path, mode='ab')",
        "open(path, mode)",
        "path.open('x')",
        "os.open(path, os.O_WRONLY | os.O_CREAT)",
        "os.fdopen(number, 'wb')",
        "path.write_text('x')",
        "pq.write_table(table, path)",
    ],
)
def test_writes_when_a_file_is_written_then_it_is_found(source: str) -> None:
    assert len(list(writes(source))) == 1


@pytest.mark.parametrize(
    "source",
    [
        "open(path)",
        "path.open('rb')",
        "os.open(path, os.O_RDONLY)",
        "durable.write_text(path, 'x')",
        "tracker.open(folder)",
    ],
)
def test_writes_when_a_file_is_only_read_then_it_passes(source: str) -> None:
    assert list(writes(source)) == []


def test_version_when_it_is_stated_in_two_places_then_they_agree() -> None:
    text = (PROJECT / "pyproject.toml").read_text(encoding="utf-8")
    (stated,) = re.findall(r'^version = "(.+)"$', text, flags=re.MULTILINE)
    assert pocl_cli.__version__ == stated
    assert importlib.metadata.version("pocl-cli") == stated


def test_configuration_modules_when_all_families_are_discovered_then_torch_is_not_imported() -> None:
    code = (
        "import sys; from pocl_cli import registry\n"
        "for family in vars(registry).values():\n"
        "    if isinstance(family, registry.Registry): family.names()\n"
        "heavy = {'torch', 'transformers', 'datasets'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
