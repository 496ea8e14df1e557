"""How generated answers are measured."""
