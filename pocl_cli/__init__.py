"""Curriculum knowledge distillation of language models: the command `pocl` and the package behind it."""

__version__ = "0.1.0"
