"""The fair comparison: arms as runs, whether they match, how far their answers differ, and the tables of it."""
