# shellcheck shell=bash
# What the job scripts share. Source it; it defines functions and changes nothing else.

log() { printf '[%(%F %T)T job %s attempt %s] %s\n' -1 "$SLURM_JOB_ID" "${SLURM_RESTART_COUNT:-0}" "$*"; }

fail() {
  log "error: $*" >&2
  exit 1
}

# Host names of the allocation, one per line.
job_nodes() { scontrol show hostnames "$SLURM_JOB_NODELIST"; }

# A port of this job's own: jobs on shared nodes, and quick requeues, do not collide.
job_port() { echo $((20000 + SLURM_JOB_ID % 20000)); }

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

# wait_for_files PID SECONDS FILE...: until all files exist; fails when the process ends first, or time is up.
wait_for_files() {
  local pid="$1" deadline=$((SECONDS + $2)) file
  shift 2
  for file in "$@"; do
    until [[ -e "$file" ]]; do
      kill -0 "$pid" 2>/dev/null || fail "the step that should write $file has ended"
      ((SECONDS < deadline)) || fail "no $file in time"
      sleep 2
    done
  done
}
