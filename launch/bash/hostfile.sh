# The nodes, as DeepSpeed's launcher wants to be told them.
# shellcheck shell=bash disable=SC2154 # of begin.sh

export LAID_HOSTFILE=$launch/hostfile-$job
scontrol show hostnames "$SLURM_JOB_NODELIST" | sed 's/$/ slots=@ranks_per_node@/' > "$LAID_HOSTFILE"
