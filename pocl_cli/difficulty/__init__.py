"""Difficulty measurers: the open family that says how hard each training row is for the student.

A member is a registered frozen dataclass with `needs: ClassVar[frozenset[str]]`, the measured columns of ScoredRecord
that it reads (`cross_entropy`, `rouge_l`), and `__call__(rows: Sequence[ScoredRecord]) -> np.ndarray`: the difficulty
as float64 `[N]`, row for row, higher = harder. Ordering and ties are `ranking`'s, so that no member decides them.
"""
