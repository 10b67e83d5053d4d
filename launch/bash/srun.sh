# srun starts the ranks themselves, node by node: those that share batches are consecutive, and belong into one node.
# shellcheck shell=bash disable=SC2034 # used in end.sh

ranks=(@srun@ --distribution=block @python@ -u -m @module@ "${arguments[@]}")
