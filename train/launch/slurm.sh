#!/usr/bin/env bash
# A training stage on SLURM, one torchrun per node:
#     sbatch --nodes 2 train/launch/slurm.sh train.posttrain configs/7b/instruct.yaml [key=value ...]
# Ten minutes before the time limit every process gets SIGTERM: the run saves a checkpoint and the job goes back into the queue, where
# the same command resumes it. On SIGTERM (scancel --batch --signal=TERM) it saves and is not queued again. Either way it exits with 143.
# Where a process dies, torchrun starts all of them again and they resume, RESTARTS times (3).
#SBATCH --job-name=orthus
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@600
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=orthus-%j.log
set -euo pipefail
if [ "$#" -lt 2 ]; then
    echo "usage: sbatch [options] $0 MODULE CONFIG [key=value ...]" >&2
    exit 2
fi
cd "${SLURM_SUBMIT_DIR:-.}"
readonly TERMINATED=143
PROCESSES="${PROCESSES:-${SLURM_GPUS_ON_NODE:-1}}"  # per node
nodes="$(scontrol show hostnames "$SLURM_JOB_NODELIST")"
MASTER="${MASTER:-${nodes%%$'\n'*}}"
PORT="${PORT:-$((20000 + SLURM_JOB_ID % 20000))}"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-8}"
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=540  # torchrun would kill a run that saves for longer than half a minute

srun --kill-on-bad-exit=0 torchrun --nnodes "$SLURM_NNODES" --nproc-per-node "$PROCESSES" --max-restarts "${RESTARTS:-3}" --rdzv-backend c10d \
    --rdzv-id "$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}" --rdzv-endpoint "$MASTER:$PORT" -m "$@" &
RUN=$!

asked=""
stop() {
    echo "$1: saving" >&2
    asked="$1"
    scancel --signal=TERM "$SLURM_JOB_ID"  # the steps of the job, not this script
}
trap 'stop "time limit"' USR1
trap 'stop "asked to stop"' TERM

while kill -0 "$RUN" 2>/dev/null; do  # a signal ends `wait`, not the run
    wait "$RUN" || true
done
status=0
wait "$RUN" || status=$?
if [ -z "$asked" ] || [ "$status" -eq 0 ]; then
    exit "$status"
fi
if [ "$asked" = "time limit" ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$TERMINATED"  # torchrun itself ends with 1 when it was asked to stop
