#!/usr/bin/env bash
# Launches main.py on this node with torchrun; arguments are passed on.
#
#   bash run.sh                                        # all GPUs of this machine; without one, 2 processes on the CPU
#   GPUS_PER_NODE=1 bash run.sh                        # one process
#   NNODES=2 NODE_RANK=0 MASTER_ADDR=host bash run.sh  # the first of two nodes
#
# Environment: GPUS_PER_NODE (default: the GPUs that are there, or 2 processes on the CPU), NNODES
# (or WORLD_SIZE, as some schedulers set it; default 1), NODE_RANK (or RANK, or SLURM_NODEID; default
# 0; ignored on a single node), MASTER_ADDR (default 127.0.0.1), MASTER_PORT (default 16989; on a single node any free port),
# MAX_RESTARTS (default 0: how often torchrun starts all processes again after one of them failed).
#
# INT (Ctrl-C), TERM, USR1 and HUP make the run save and end with exit code 0. nohup works as usual.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

setting() { # DEFAULT LEAST MOST NAME...: prints the first of these variables that is set
  local default=$1 least=$2 most=$3 name value
  shift 3
  for name in "$@"; do
    value=${!name:-}
    [[ -n $value ]] || continue
    if ! [[ $value =~ ^(0|[1-9][0-9]{0,8})$ ]] || ((value < least || value > most)); then
      echo "error: $name='$value' must be an integer from $least to $most" >&2
      return 2
    fi
    echo "$value"
    return
  done
  echo "$default"
}
setting "" 1 9999 GPUS_PER_NODE >/dev/null # support/launch.py reads it
nodes=$(setting 1 1 99999 NNODES WORLD_SIZE)
node_rank=$(setting 0 0 $((nodes > 1 ? nodes - 1 : 99999)) NODE_RANK RANK SLURM_NODEID)
port=$(setting "" 1 65535 MASTER_PORT)
max_restarts=$(setting 0 0 999999 MAX_RESTARTS)

((nodes > 1)) || node_rank=0
if ((nodes == 1)) && [[ -z $port ]]; then
  rendezvous=(--standalone)
else
  address=${MASTER_ADDR:-127.0.0.1} port=${port:-16989}
  rendezvous=(--nnodes "$nodes" --node-rank "$node_rank" --master-addr "$address" --master-port "$port")
fi

# torchrun answers a signal by ending its workers, within 30 seconds, and then fails itself. So these
# go past it to the workers, which save and end; torchrun ends when they have, with 0.
forward() {
  local workers launcher=${!:-} # bash sets $! with the `&`
  [[ -n $launcher ]] || { echo "stopped before the processes were started"; exit 0; }
  workers=$(pgrep -P "$launcher" || cat "/proc/$launcher/task/$launcher/children") || true
  if [[ -n $workers ]]; then
    # shellcheck disable=SC2086  # one word for each worker
    kill -s "$1" $workers || true
  else # torchrun starts, or waits for other nodes
    stopped=1
    kill -s TERM "$launcher" || true
  fi
}
for signal in INT TERM USR1 HUP; do
  # shellcheck disable=SC2064  # the signal's name now, not later
  trap "forward $signal" "$signal"
done
# Without stdin: whatever asks the terminal in this process group would be stopped.
set -m # a process group of its own: the terminal's Ctrl-C does not reach torchrun
python -m support.launch "${rendezvous[@]}" --max-restarts "$max_restarts" \
  --signals-to-handle SIGTERM,SIGINT,SIGQUIT main.py "$@" </dev/null &
launcher=$!
set +m
if ((nodes > 1)); then
  echo "node $node_rank of $nodes: waits for the others at $address:$port"
fi
while kill -0 "$launcher" 2>/dev/null; do # a signal interrupts `wait`
  wait "$launcher" || true
done
code=0
wait "$launcher" || code=$? # bash remembers it
if [[ -n ${stopped:-} ]] && ((code == 143)); then # by that TERM, not by an error
  echo "stopped before the processes were started"
  code=0
fi
exit "$code"
