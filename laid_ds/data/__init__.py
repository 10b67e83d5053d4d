"""Samples on disk, their order, and the stream of micro-batches. `docs/data_format.md` states the format."""
