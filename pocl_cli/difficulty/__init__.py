"""Difficulty measurers: the open family that says how hard each training row is for the student.

A member is a registered frozen dataclass with `needs: ClassVar[frozenset[str]]`, the columns of `scores.parquet` that
it reads (`cross_entropy`, `rouge_l`, …), and `__call__(scores: Scores) -> np.ndarray`: the difficulty as float64 `[N]`,
row for row, higher = harder. It computes on whole columns, `scores.column("cross_entropy")`: there may be ten million
rows. Ordering and ties are `ranking`'s, so that no member decides them.
"""
