# srun starts the launcher of each node: torchrun.sh or deepspeed.sh, with forward.sh or end_launcher.sh.
# shellcheck shell=bash disable=SC2034 # used in end.sh

# shellcheck disable=SC2016 # the variables are those of each node
on_node=@start@
ranks=(@srun@ bash -c "$on_node" on_node "${arguments[@]}")
