"""Faults in trainings, and what is left compared with an undisturbed run: `python -m tests.faults --help`."""
