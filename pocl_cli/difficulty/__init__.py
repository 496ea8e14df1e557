"""Difficulty measurers: the open family that says how hard each training row is for the student.

A member is a registered frozen dataclass with `needs: frozenset[str]` (a ClassVar, or a property where its fields
decide it): the columns of the student's `scores.parquet` that it reads (`cross_entropy`, `rouge_l`, …), and with
`teacher_` before the name those of the teacher's. `__call__(scores: Scores) -> np.ndarray` is the difficulty as
float64 `[N]`, row for row, higher = harder. It computes on whole columns,
`scores.column("cross_entropy")`: there may be ten million rows. Ordering and ties are `ranking`'s, so that no member
decides them.
"""
