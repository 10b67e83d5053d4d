"""One script per claim; each prints what it measured and appends it to results.csv."""
