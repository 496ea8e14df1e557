"""Every test runs on one thread, without a network, and untouched by the settings of the person who runs it."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator

import pytest

from .support import tally

# Before torch and transformers are imported: both read these once.
os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
for _name in ("POCL_DEBUG", "POCL_OUTPUTS", "POCL_CONFIG_PATH"):
    os.environ.pop(_name, None)


@pytest.fixture(autouse=True)
def _fresh_logger() -> Iterator[None]:
    """Undoes what a command run inside a test does to the logger, so that `caplog` sees the next test's records."""
    yield
    logger = logging.getLogger("pocl")
    for handler in list(logger.handlers):
        logger.removeHandler(handler)
        handler.close()
    logger.propagate = True


@pytest.fixture(autouse=True)
def _tallied(request: pytest.FixtureRequest) -> None:
    tally.properties = request.node.user_properties


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Shows how many trials there were of each kind, in all tests together."""
    reports = [one for several in terminalreporter.stats.values() for one in several]
    lines = tally.summary(one.user_properties for one in reports if getattr(one, "when", None) == "call")
    if lines:
        terminalreporter.section("faults")
        for line in lines:
            terminalreporter.write_line(line)
