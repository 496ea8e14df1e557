"""How every script begins and ends: a mistake is one line and an exit code, as with `pocl`."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from pocl_cli.errors import PoclError


def run(main: Callable[[Sequence[str]], int]) -> NoReturn:
    """Runs `main` on the arguments of the command line and exits with its code, or with that of the mistake."""
    try:
        sys.exit(main(sys.argv[1:]))
    except PoclError as error:
        print(f"pocl: error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
