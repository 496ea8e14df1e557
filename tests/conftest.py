"""Every test runs on one thread, without a network, and untouched by the settings of the person who runs it."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator

import pytest

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
