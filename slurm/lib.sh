# shellcheck shell=bash
# What the job scripts share. Source it: it defines functions and sets one variable.

# `python -m` must not take a module of ours from the submit folder, where a user's own parallel.py or rollout/ may lie.
export PYTHONSAFEPATH=1

log() { printf '[%(%F %T)T job %s attempt %s] %s\n' -1 "$SLURM_JOB_ID" "${SLURM_RESTART_COUNT:-0}" "$*"; }

fail() {
  log "error: $*" >&2
  exit 1
}

# Host names of the allocation, one per line.
job_nodes() { scontrol show hostnames "$SLURM_JOB_NODELIST"; }

# GPUs of a node: GPUS_PER_NODE, else what Slurm counts, else (where it gives whole nodes without counting) what the first node shows.
gpus_per_node() {
  local count="${GPUS_PER_NODE:-${SLURM_GPUS_ON_NODE:-}}"
  [[ -n $count ]] || count="$(srun --nodes=1 --ntasks=1 nvidia-smi -L | grep -c '^GPU ')" ||
    fail "GPUS_PER_NODE: not set, Slurm counts no GPUs here (SLURM_GPUS_ON_NODE), and nvidia-smi shows none; expected the GPUs of a node"
  echo "$count"
}

# A port of this job's own, below the ephemeral range: jobs on shared nodes, and quick requeues, do not collide.
job_port() { echo $((20000 + SLURM_JOB_ID % 10000)); }

# join , a b c  ->  a,b,c
join() {
  local IFS="$1"
  shift
  echo "$*"
}

# Write a new secret to a file that only this user can read.
new_key() {
  (umask 077 && head -c 32 /dev/urandom | base64 | tr -d '\n=' >"$1")
}

# Options of srun that put a step into a container (pyxis), one per line; nothing unless CONTAINER_IMAGE is set.
# This folder, with the environments in it, is seen under its own path; the image holds the Python that they were made with (Dockerfile).
container_options() {
  [[ -n ${CONTAINER_IMAGE:-} ]] || return 0
  printf '%s\n' "--container-image=$CONTAINER_IMAGE" "--container-mounts=$PWD:$PWD${CONTAINER_MOUNTS:+,$CONTAINER_MOUNTS}" \
    "--container-workdir=$PWD" --no-container-mount-home
}

# ours PROGRAM ARGUMENT...: one short command of .venv for the batch script itself, which so needs no Python of the node: in the container
# if there is one, else here and now (a step would cost time).
ours() {
  local program="$1" options
  shift
  mapfile -t options < <(container_options)
  if ((${#options[@]})); then
    srun --nodes=1 --ntasks=1 --overlap "${options[@]}" ".venv/bin/$program" "$@"
  else
    ".venv/bin/$program" "$@"
  fi
}

# step LOG "n0 n1 ..." COMMAND...: one task on each of these nodes, output in RUN_DIR/logs/LOG-ATTEMPT-NODE.log; a task that fails ends all.
# gloo and NCCL listen on the interface that leads to the job's other nodes.
step() {
  local name="$1" nodes options peers
  read -ra nodes <<<"$2"
  shift 2
  mapfile -t options < <(container_options)
  mapfile -t peers < <(job_nodes)
  # exec, so that the process in the background is srun itself, and can be waited for and ended
  exec srun --nodes="${#nodes[@]}" --ntasks="${#nodes[@]}" --nodelist="$(join , "${nodes[@]}")" --kill-on-bad-exit=1 \
    --output="$RUN_DIR/logs/$name-${SLURM_RESTART_COUNT:-0}-%N.log" "${options[@]}" \
    .venv/bin/python -m megatron_minpro.cluster.interfaces "$(join , "${peers[@]}")" "$@"
}

# What a step of that name said was wrong, in this attempt.
step_error() {
  local logs="$RUN_DIR/logs/$1-${SLURM_RESTART_COUNT:-0}-"
  grep --no-filename --max-count=1 '^minpro: error: ' "$logs"*.log | head -n 1 || echo "$1 failed, see $logs*"
}

all_exist() {
  local file
  for file in "$@"; do [[ -e $file ]] || return 1; done
}

# ended STEP EXIT_CODE [REASON]: the attempt is over. Asks what follows and does it; returns only when the run is complete.
# megatron_minpro/run/after_attempt.py decides; RUN_DIR/attempts.jsonl keeps what was decided and why.
ended() {
  local answer why="${3:-exit code $2}"
  answer="$(ours python -m megatron_minpro.run.after_attempt "$RUN_DIR" "$SLURM_JOB_ID" "$1" "$2" "$MAX_REQUEUES" ${3:+"$3"})" ||
    fail "$why; not requeued: nothing could say whether another start would help"
  case "$answer" in
    complete*) ;;
    requeue*) requeue "${answer#* }" ;;
    *) fail "${answer#* }" ;;
  esac
}

# Put this job back into the queue, unless that was done MAX_REQUEUES times already.
requeue() {
  ((${SLURM_RESTART_COUNT:-0} < MAX_REQUEUES)) || fail "$1; not requeued: that was done $MAX_REQUEUES times (MAX_REQUEUES)"
  log "$1; requeued"
  # Slurm refuses where it requeues the job itself already (preemption, a dead node), which it then does whatever this exit code is.
  scontrol requeue "$SLURM_JOB_ID" || fail "Slurm does not requeue it (JobRequeue=0, --no-requeue?), unless it does so by itself; submit it again"
  exit 0
}
