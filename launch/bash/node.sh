# Where each node has a launcher: what the launchers need. hostfile.sh may follow, then on_node.sh.
# shellcheck shell=bash disable=SC2154 # of begin.sh

# On each node: the launcher starts the ranks. A signal to the task becomes a file, since launchers would not pass it on.
export LAID_STOP=$run/stop LAID_JOB=$job.$attempt
