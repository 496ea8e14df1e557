"""KD methods: per-token divergences between teacher and student, one file a member. Only mathematics."""
