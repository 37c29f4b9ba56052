#!/usr/bin/env bash
# Shows on one node of eight GPUs what two cannot:
#
#   bash tests/eight_gpus.sh OUTPUT                # all parts, in this order
#   bash tests/eight_gpus.sh OUTPUT layouts kill   # some of them
#
#   layouts  each dp x cp, and replicas, with each backend: equal losses and gradient norms
#   kill     a run that ends with SIGKILL resumes on another layout; unlike the run that it is compared
#            with, it offloads activations, and uses magi_attention where that is installed
#   speed    tokens/s and memory at the largest cp, and of FSDP without cp, on two GPUs and on all
#   large    llama-8b with rows of 131,072 tokens, beside --plan
#
# It needs requirements-dev.txt. Environment: PROCESSES (default: the GPUs that are there). `layouts`
# and `kill` also run on a CPU, with PROCESSES=2, 4 or 8. OUTPUT gets the runs' folders and
# results.jsonl. The exit code is 1 if a comparison fails.
set -uo pipefail

if [[ -z ${1:-} ]]; then
  echo "usage: bash tests/eight_gpus.sh OUTPUT [layouts] [kill] [speed] [large]" >&2
  exit 2
fi
output=$(realpath -m "$1")
shift
cd "$(dirname "${BASH_SOURCE[0]}")/.."
parts=("${@:-layouts kill speed large}")
gpus=$(python -c 'import torch; print(torch.cuda.device_count())') || exit 2
n=${PROCESSES:-$gpus}
if [[ ! $n =~ ^(2|4|8)$ ]]; then
  echo "error: PROCESSES=$n must be 2, 4 or 8; it is the number of GPUs unless it is set" >&2
  exit 2
fi
backends=(native)
if ((gpus)) && python -c 'import magi_attention' 2>/dev/null; then backends+=(magi_attention); fi
mkdir -p "$output" || exit 2
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
failed=0

say() { echo "== $(date +%T) $*"; }
launch() { # PROCESSES SCRIPT ARGUMENTS...
  torchrun --standalone --nproc-per-node "$@"
}

# A model of few layers, whose checkpoint is small. Each run trains on the same eight rows per step. A
# row has documents of unequal lengths, so that balance needs cuts through documents.
small=(data_config.batch_size=8 data_config.seqlen=2048 train_config.compile=false
  train_config.checkpoint_interval=0 model_config.overrides.num_hidden_layers=2
  model_config.overrides.vocab_size=4096)
if ((gpus)); then small+=(data_config.seqlen=32768); fi

run() { # NAME SCRIPT ARGUMENTS...: its output goes to OUTPUT/NAME.log
  launch "$n" "${@:2}" >"$output/$1.log" 2>&1 && return
  say "$1 failed: see $output/$1.log"
  tail -n 3 "$output/$1.log"
  failed=1
  return 1
}

layouts() {
  rm -rf "$output/layouts"
  run layouts tests/layouts_worker.py "$output/layouts" "$(IFS=,; echo "${backends[*]}")" \
    "${small[@]}" && python tests/compare_runs.py "$output"/layouts/* || failed=1
}

kill_and_resume() {
  rm -rf "$output/whole" "$output/killed"
  local steps=("${small[@]}" train_config.train_iters=6
    parallel_config.context_parallel_backend=native train_config.activation_checkpointing=selective)
  local at_cp_n=(parallel_config.context_parallel_size="$n" train_config.output_dir="$output")
  run whole main.py "${steps[@]}" "${at_cp_n[@]}/whole" || return
  steps+=(train_config.checkpoint_interval=1 train_config.keep_last=0
    train_config.activation_offload=true parallel_config.context_parallel_backend="${backends[-1]}")
  run killed-first main.py "${steps[@]}" "${at_cp_n[@]}/killed" >/dev/null &
  until [[ -e $output/killed/step-00000003 ]] || ! kill -0 $!; do sleep 0.1; done
  local launcher
  launcher=$(pgrep -P $!) && kill -KILL "$launcher" $(pgrep -P "$launcher") # and its processes
  wait
  if [[ ! -e $output/killed/step-00000003 || -e $output/killed/step-00000006 ]]; then
    say "no run was killed between steps 3 and 6: see $output/killed-first.log"
    failed=1
    return
  fi
  say "killed with $(cd "$output/killed" && echo step-*)"
  run killed main.py "${steps[@]}" parallel_config.context_parallel_size=$((n >= 4 ? 2 : 1)) \
    train_config.output_dir="$output/killed" || return
  grep "^resume" "$output/killed.log"
  python tests/compare_runs.py "$output/whole" "$output/killed" || failed=1
}

speed() {
  local results=(benchmark.py --results "$output/results.jsonl" --steps 3)
  local cases=(128k-full 128k-selective 1m-documents-full 64k-stdlib)
  for backend in "${backends[@]}"; do
    launch "$n" "${results[@]}" "${cases[@]}" parallel_config.context_parallel_size="$n" \
      parallel_config.context_parallel_backend="$backend" 2>&1 | grep '^| [0-9]\|rror' || failed=1
  done
  for processes in 2 "$n"; do # a row for each GPU
    say "FSDP alone, $processes GPUs"
    launch "$processes" "${results[@]}" 8k data_config.batch_size="$processes" \
      parallel_config.context_parallel_size=1 2>&1 | grep '^| [0-9]\|rror' || failed=1
  done
}

large() {
  local keys=(model_config.preset=llama-8b model_config.overrides.num_hidden_layers=32
    parallel_config.context_parallel_size="$n" parallel_config.context_parallel_backend=native)
  for case in 128k-full 128k-selective; do
    launch "$n" benchmark.py --results "$output/results.jsonl" --steps 2 --warmup 1 $case \
      "${keys[@]}" 2>&1 | grep '^expected\|^| [0-9]\|rror' || failed=1
  done
}

for part in ${parts[*]}; do
  say "$part, $n processes, $gpus GPUs"
  case $part in
    layouts) layouts ;;
    kill) kill_and_resume ;;
    speed | large)
      if ((gpus < n)); then
        say "$part needs $n GPUs"
        failed=1
      else $part; fi
      ;;
    *)
      echo "error: unknown part '$part'; choose layouts, kill, speed or large" >&2
      exit 2
      ;;
  esac
done
say "$( ((failed)) && echo failed || echo done)"
exit $failed
