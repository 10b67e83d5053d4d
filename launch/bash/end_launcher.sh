# Runs the launcher of this node, of an evaluation. A warning becomes the stop file; SIGTERM, which srun sends when another node has failed, does not.
# shellcheck shell=bash

request() {
  touch "$LAID_STOP"
}
end() {
  kill "$launcher"
}
trap request USR1 USR2
trap end TERM
(trap "" USR1 USR2; start "$@") &
launcher=$!
while :; do
  wait "$launcher"; status=$?
  kill -0 "$launcher" 2> /dev/null || exit "$status"
done
