# srun starts the ranks themselves.
# shellcheck shell=bash disable=SC2034 # used in end.sh

ranks=(@srun@ @python@ -u -m @module@ "${arguments[@]}")
