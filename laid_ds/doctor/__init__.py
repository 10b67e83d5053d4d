"""`laid doctor`: whether this machine, its software and its cards do what the rest of laid_ds builds on, looked at where they stand."""
