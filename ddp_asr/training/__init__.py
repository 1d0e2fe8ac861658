"""One training: the loop, what a step does, and what an attempt prepares."""
