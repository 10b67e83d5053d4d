#!/bin/bash
#SBATCH --job-name="demo laid"
#SBATCH --chdir=/project
#SBATCH --output=/project/runs/demo/laid/launch/logs/job.log
#SBATCH --open-mode=append
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --signal=B:USR1@180
#SBATCH --dependency=singleton
#SBATCH --requeue

run=/project/runs/demo/laid
arguments=(/project/runs/demo/laid/launch/recipe.toml)
signal=USR1 max_restarts=0 max_crashes=2

# What follows is the same for every job.
launch=$run/launch
attempt=${SLURM_RESTART_COUNT:-0}
job=$SLURM_JOB_ID
[ -z "${SLURM_ARRAY_JOB_ID:-}" ] || job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID
mkdir -p "$launch/logs"

say() { printf '[%(%F %T)T] laid-launch: %s\n' -1 "$*"; }

record() { # STATUS: what `laid-launch status` tells when SLURM has forgotten the job
  printf '{"job": "%s", "attempt": %d, "status": "%s", "nodes": "%s", "time": "%(%FT%T%z)T"}\n' \
    "$job" "$attempt" "$1" "$SLURM_JOB_NODELIST" -1 > "$launch/state.json.partial"
  mv "$launch/state.json.partial" "$launch/state.json"
}

finish() { # STATUS EXIT WORDS
  trap '' TERM "$signal"
  rm -f "$run/stop"
  record "$1"
  say "${*:3}"
  exit "$2"
}

again() { # WORDS: start this job again, unless that was done often enough or somebody cancelled it
  local answer
  case $(scontrol --oneliner show job "$job") in *JobState=CANCELLED*) finish cancelled 1 "$*; cancelled" ;; esac
  [ "$attempt" -lt "$max_restarts" ] || finish stopped 0 "$*; not started again after $attempt restarts"
  trap '' TERM "$signal"
  record requeued
  say "$*; asking SLURM to start it again"
  answer=$(scontrol requeue "$job" 2>&1) && exit 0
  case $answer in *pending*) finish requeued 0 "$*; SLURM has done so itself" ;; esac # after the failure of a node
  finish stopped 0 "$*; SLURM does not: $answer"
}

newest() { cat "$run/checkpoints/latest" 2> /dev/null; }

crashed() { # EXIT: without a marker
  local crashes=0
  [ "$(newest)" != "$before" ] || crashes=$(cat "$launch/crashes" 2> /dev/null || echo 0)
  crashes=$((crashes + 1))
  echo "$crashes" > "$launch/crashes"
  [ "$crashes" -le "$max_crashes" ] || finish failed 1 "failed (exit $1), $crashes times without a newer checkpoint; see $launch/logs"
  again "failed (exit $1), without a newer checkpoint $crashes of $max_crashes times"
}

# shellcheck disable=SC2317 # called by traps
ask() { # WHY: the ranks finish their step, save and leave
  say "$1: the ranks are asked to save and stop"
  touch "$run/stop"
  [ -z "$step" ] || kill -s "$signal" "$step" 2> /dev/null
}

[ ! -f "$run/done.json" ] || finish "done" 0 "already done"
[ "$attempt" -le "$max_restarts" ] || finish stopped 1 "restarted $attempt times, $max_restarts are allowed"
rm -f "$run/requeue.json" "$run/stop"
before=$(newest)
step=
trap 'ask $signal' "$signal"
trap 'ask TERM' TERM

# Names that do not resolve, or another network: export MASTER_ADDR in the setup lines.
MASTER_ADDR=${MASTER_ADDR:-$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)}
MASTER_PORT=$((10000 + (31 * SLURM_JOB_ID + attempt) % 20000))
LAID_RANK_LOGS=$launch/logs
export MASTER_ADDR MASTER_PORT LAID_RANK_LOGS
[ -z "${SLURM_CPUS_PER_TASK:-}" ] || export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK

ranks=(srun --kill-on-bad-exit=1 --wait=60 --container-image=me/laid:1 '--container-mounts=/project:/project,/data:/data' --container-workdir=/project --distribution=block /venv/bin/python -u -m laid_ds.train "${arguments[@]}")

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
