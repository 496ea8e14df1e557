"""The model card of a student."""

from __future__ import annotations

import html
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from pocl_cli.errors import printable
from pocl_cli.redaction import scrub


def model_card(
    config: Mapping[str, Any],
    stages: Sequence[Mapping[str, Any]],
    figures: Mapping[str, float],
    command: Sequence[str],
) -> str:
    """The README.md of a student's folder, in Hugging Face's format: how it was made, and its dev figures."""
    rows = "\n".join(
        f"| {row['stage']} | {row['num_rows']} | {row['steps']} | {row['temperature']:.4g} | {row['kd_ratio']:.4g} |"
        for row in stages
    )
    names = [_shown(config[section]["name"]) for section in ("student", "kd_method", "dataset", "curriculum")]
    numbers = "\n".join(f"* {name.replace('_', ' ')}: {value:.4f}" for name, value in figures.items())
    teacher = config["teacher"]["path"] or config["teacher"]["experiment"] or "none"
    return scrub(f"""\
---
library_name: transformers
tags: [knowledge-distillation, curriculum-learning, pocl]
---

# {names[0]} trained with {names[1]} on {names[2]}

Teacher: {_shown(teacher)}. Curriculum: {names[3]} (POCL, arXiv 2506.05695).

    {printable(shlex.join(command))}

| stage | rows | steps | temperature | kd_ratio |
|---|---|---|---|---|
{rows}

{numbers}
""")


def _shown(text: str) -> str:
    """A user's words on one line, where Markdown and HTML leave them alone."""
    return html.escape(printable(text), quote=False)
