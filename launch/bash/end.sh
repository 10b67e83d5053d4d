# How every job ends: the ranks are started and waited for, and files say how they ended.
# shellcheck shell=bash disable=SC2154 # of begin.sh

say "attempt $attempt on $SLURM_JOB_NODELIST, ${before:-from the beginning}"
record running
"${ranks[@]}" &
step=$!
while :; do # `wait` returns at each signal, too
  wait "$step"
  status=$?
  kill -0 "$step" 2> /dev/null || break
done
[ ! -f "$run/done.json" ] || finish "done" 0 "done"
if [ -f "$run/requeue.json" ]; then
  rm -f "$launch/crashes"
  again "saved and stopped $(cat "$run/requeue.json")"
fi
crashed "$status"
