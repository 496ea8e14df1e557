"""What a step gives back to the command line and to the step that needed it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pocl_cli.errors import ArtifactError
from pocl_cli.log import get_logger

if TYPE_CHECKING:
    from pocl_cli.artifacts.manifest import Artifact, ArtifactKey
    from pocl_cli.artifacts.store import Store
    from pocl_cli.run import Run


@dataclass(frozen=True)
class StepResult:
    """The artifact that now exists; `made` is False where it was there before. `figures` go into a sweep's table."""

    artifact: Artifact
    made: bool
    figures: dict[str, Any] = field(default_factory=dict)


def obtain(run: Run, step: str, key: ArtifactKey, store: Store) -> Artifact:
    """The artifact that another step makes: found, made first with `upstream=auto`, or an error that names its command.

    Raises:
        ArtifactError: it does not exist, and `upstream=require`.
    """
    found = store.find(key)
    if found is not None:
        return found
    if run.config.upstream == "auto":
        get_logger().info("%s %s does not exist yet: making it first (pocl %s)", key.kind, key.id, step)
        from pocl_cli.steps.dispatch import run_step

        result = run_step(run.for_step(step))
        assert result is not None, "a step that is not planned gives a result"
        # The result of `score` is the student's scores; it makes the teacher's too.
        made = store.find(key)
        assert made is not None, f"{step} made {result.artifact.id}, not {key.id}"
        return made
    raise ArtifactError(
        f"no {key.kind} artifact {key.id}",
        where=str(store.outputs),
        why=f"pocl {run.step} needs it" if run.step != step else "nothing has made it yet",
        fix=f"run: {run.command_for(step)}   (or add upstream=auto)",
    )
