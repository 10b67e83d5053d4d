"""laid_ds: give a small vision-language model the long window of a large one."""

__version__ = "0.1.0"
