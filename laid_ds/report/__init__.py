"""The report that people send around: one self-contained page about runs and evaluations, from their files alone."""
