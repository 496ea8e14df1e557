"""How often a run sees each row: the same stages, with every row seen equally often by the end.

In growing stages the easy rows are seen most often. Balanced, order and exposure can be told apart.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pocl_cli.errors import ConfigError


def balanced(rows_per_stage: Sequence[Sequence[str]], epochs: Sequence[int]) -> list[tuple[int, ...]]:
    """How often each stage sees each of its rows, in their order, so that all rows are seen equally often in the end.

    Every stage makes as many draws as without (epochs × rows). It gives them to its rows in proportion to how often
    each has still to be seen. Where draws and rows do not divide, the rows that come first are seen once more.

    Raises:
        ConfigError: a stage makes more draws than its rows may have.
    """
    place: dict[str, int] = {}
    for record_ids in rows_per_stage:
        for record_id in record_ids:
            place.setdefault(record_id, len(place))
    draws = [number * len(record_ids) for number, record_ids in zip(epochs, rows_per_stage, strict=True)]
    each, more = divmod(sum(draws), max(len(place), 1))
    left = np.full(len(place), each, dtype=np.int64)
    left[:more] += 1
    times = []
    for stage, (record_ids, wanted) in enumerate(zip(rows_per_stage, draws, strict=True)):
        members = np.fromiter((place[record_id] for record_id in record_ids), dtype=np.int64, count=len(record_ids))
        available = int(left[members].sum())
        if wanted > available:
            raise ConfigError(
                f"stage {stage} sees its rows too often to be balanced",
                where="curriculum.exposure=balanced",
                why=(
                    f"it makes {wanted} draws, and its {len(record_ids)} rows may be seen {available} times more; over"
                    f" the run, each is seen {sum(draws) / len(place):.4g} times"
                ),
                fix="set fewer epochs for it (curriculum.epochs_per_stage), or curriculum.exposure=epochs",
            )
        whole, rest = np.divmod(left[members] * wanted, max(available, 1))
        whole[np.argsort(-rest, kind="stable")[: wanted - int(whole.sum())]] += 1
        left[members] -= whole
        times.append(tuple(whole.tolist()))
    return times
