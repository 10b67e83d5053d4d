"""What knows a foreign file format: one entry becomes one sample (`read_entry`), and a benchmark's answers become its scores (`score`)."""
