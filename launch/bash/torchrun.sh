# Becomes torchrun, which starts the ranks of this node.
# shellcheck shell=bash

start() {
  exec @python@ -m torch.distributed.run --nnodes=@nodes@ --nproc-per-node=@ranks_per_node@ --rdzv-backend=c10d --rdzv-id="$LAID_JOB" \
    --rdzv-endpoint="$MASTER_ADDR:$MASTER_PORT" --max-restarts=0 --shutdown-timeout=@shutdown_seconds@ \
    --signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1,SIGUSR2 --module @module@ "$@"
}
