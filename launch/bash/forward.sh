# Runs the launcher of this node and makes the stop file of a signal, since launchers do not pass it on.
# shellcheck shell=bash

request() {
  touch "$LAID_STOP"
}
trap request TERM USR1 USR2
(trap "" TERM USR1 USR2; start "$@") & # where a signal reaches all processes of a task, it does not end the launcher; the ranks listen anew
launcher=$!
while :; do
  wait "$launcher"; status=$?
  kill -0 "$launcher" 2> /dev/null || exit "$status"
done
