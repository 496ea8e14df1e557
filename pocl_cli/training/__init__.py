"""Training: the objective, the loop and what they need."""
