"""Training schedulers: the open family that turns the subsets of a partition into the stages of a training run.

A member is a registered frozen dataclass, usually a `StagedScheduler`, with `stages: int` (how many subsets the
partition is cut into), `needs_partition: ClassVar[bool]` (False: any order of the rows will do) and
`__call__(subsets: Sequence[Subset]) -> list[Stage]`, a pure function.
"""
