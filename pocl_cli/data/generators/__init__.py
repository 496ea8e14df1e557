"""Data sets made by code from a seed: `dataset.generator` names one."""
