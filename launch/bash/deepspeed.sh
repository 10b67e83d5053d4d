# Becomes DeepSpeed's launcher, which starts the ranks of this node.
# shellcheck shell=bash

start() {
  exec @python@ -m deepspeed.launcher.runner --hostfile="$LAID_HOSTFILE" --no_ssh --node_rank="$SLURM_NODEID" --master_addr="$MASTER_ADDR" \
    --master_port="$MASTER_PORT" --no_local_rank --module @module@ "$@"
}
