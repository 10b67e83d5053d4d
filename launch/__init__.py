"""`laid-launch`: runs on this machine and on SLURM clusters, with restarts. Stands outside laid_ds and imports in."""
