"""Arms x seeds as one file: run in parallel, kept as one line each, written up as a page."""
