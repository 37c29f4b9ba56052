#!/usr/bin/env bash
# Launches main.py on this node with torchrun; arguments are passed on.
#
#   bash run.sh                                        # all GPUs of this machine; without one, 2 processes on the CPU
#   GPUS_PER_NODE=1 bash run.sh                        # one process
#   NNODES=2 NODE_RANK=0 MASTER_ADDR=host bash run.sh  # the first of two nodes
#
# Environment: GPUS_PER_NODE (default: the GPUs that are there, or 2 processes on the CPU), NNODES
# (or WORLD_SIZE, as some schedulers set it; default 1), NODE_RANK (or RANK, or SLURM_NODEID; default
# 0), MASTER_ADDR (default 127.0.0.1), MASTER_PORT (default 16989; on a single node any free port),
# MAX_RESTARTS (default 0: how often torchrun starts all processes again after one of them failed).
#
# INT (Ctrl-C), TERM and USR1 make the run save and leave with exit code 0.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

counts=$(python -c 'import os, torch; print(torch.cuda.device_count(), os.cpu_count())')
read -r gpus cores <<<"$counts"
processes=${GPUS_PER_NODE:-$((gpus > 0 ? gpus : 2))}
nodes=${NNODES:-${WORLD_SIZE:-1}}
node_rank=${NODE_RANK:-${RANK:-${SLURM_NODEID:-0}}}

if ((gpus > 0)); then
  # As many hardware queues as MagiAttention wants to overlap communication with computation.
  export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-8}
fi
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores > processes ? cores / processes : 1))}

if ((nodes == 1)) && [[ -z ${MASTER_PORT:-} ]]; then
  rendezvous=(--standalone)
else
  rendezvous=(--nnodes "$nodes" --node-rank "$node_rank"
    --master-addr "${MASTER_ADDR:-127.0.0.1}" --master-port "${MASTER_PORT:-16989}")
fi

# torchrun answers a signal by ending its workers, within 30 seconds, and then fails itself. So these
# three go past it to the workers, which save and leave; torchrun ends when they have, with 0.
(
  trap '' INT TERM USR1
  exec torchrun "${rendezvous[@]}" --nproc-per-node "$processes" --max-restarts "${MAX_RESTARTS:-0}" \
    --signals-to-handle SIGHUP,SIGQUIT main.py "$@"
) &
launcher=$!
forward() {
  # shellcheck disable=SC2046  # one word for each worker
  kill -s "$1" $(pgrep -P "$launcher" || cat "/proc/$launcher/task/$launcher/children") || true
}
for signal in INT TERM USR1; do
  # shellcheck disable=SC2064  # the signal's name now, not later
  trap "forward $signal" "$signal"
done
while kill -0 "$launcher" 2>/dev/null; do # a signal interrupts `wait`
  wait "$launcher" || true
done
code=0
wait "$launcher" || code=$? # bash remembers it
exit "$code"
