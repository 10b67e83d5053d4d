"""Tensor mathematics of the floor below everything: it knows torch, and neither models, files nor processes."""
