"""`laid-data`: build, check, repair, look at and convert data sets. `docs/data_format.md` states the format."""
