#!/usr/bin/env bash
# All that only a GPU can show, in stages with time limits, for a machine that is there for minutes:
#
#   bench/gpu.sh [--dry] OUT 1      the figures, then all tests that need a GPU
#   bench/gpu.sh [--dry] OUT 2      failed tests again, sanitizers, ncu, a training step, torch.compile
#   bench/gpu.sh [--dry] OUT STAGE… single stages, by name
#   bench/gpu.sh --list             the stages and their limits in seconds
#
# OUT gets 8 files at most: figures.jsonl, with a line for each figure as soon as it is known, the
# table of goals in results.txt, and logs. What fails, or takes longer than it may, is noted, and the
# stages after it run all the same. Needs torch, Triton, transformers, pytest, pytest-xdist and
# hypothesis, and either what `make gpu-prebuild` made or a CUDA toolkit; installs
# nothing. --dry rehearses on a CPU, with tiny sizes. STATE is where the second call finds what the
# first one knew.
set -uo pipefail
cd "$(dirname "$0")/.."

dry=
[ "${1:-}" = --dry ] && dry=1 && shift
python=${PYTHON:-python3}
export DEVICE=${DEVICE:-cuda} PYTHONUNBUFFERED=1
[ -z "$dry" ] || DEVICE=cpu
export PYTHONPATH=$PWD:$PWD/bench${PYTHONPATH:+:$PYTHONPATH}
state=${STATE:-$PWD/runs/gpu-state}

# Name, seconds, command. The last stage of a call gets what the others left of its time.
budget_1=400
stages_1() {
  stage packages 5 $python -m gpu.machine
  stage objects 10 objects
  stage ceilings 30 $python -m gpu.ceilings
  stage smoke 50 $python -m gpu.smoke
  stage step 45 $python -m gpu.step
  stage gram 25 $python -m gpu.gram
  stage projection 25 $python -m gpu.projection
  stage squared_grad 30 $python -m gpu.squared_grad
  stage fisher 45 $python -m gpu.fisher
  stage tests 135 run_tests "$out/tests.txt" --tb=line
}
budget_2=330
stages_2() {
  stage failed_tests 60 run_tests "$out/failed-tests.txt" --lf --lfnf=none --tb=short
  stage training 50 $python -m gpu.training
  stage memcheck 70 $python -m gpu.sanitize "$out/sanitizer.txt" memcheck ""
  stage racecheck 30 $python -m gpu.sanitize "$out/sanitizer.txt" racecheck quadratic
  stage synccheck 30 $python -m gpu.sanitize "$out/sanitizer.txt" synccheck quadratic
  stage ncu 40 profile
  stage compiled 50 $python -m gpu.step compiled
}

# --- stages that are more than a module -----------------------------------------------------------

# The extension: what is there if it is newer than its sources, or prebuilt of the same, or built now.
objects() {
  if ! stale && usable; then
    echo "The objects in cl_optim/ are used."
  elif [ "$(cut -d " " -f 1 prebuilt/made-of.txt 2>/dev/null)" = "$SOURCES" ] &&
    cp prebuilt/_C*.so cl_optim/ && usable; then
    echo "The objects of prebuilt/ are used."
  else
    build
  fi
}
stale() { # whether a source is newer than an object, or there is none
  local object
  object=$(ls -t cl_optim/_C*.so 2>/dev/null | tail -n 1)
  [ -z "$dry" ] && { [ -z "$object" ] || [ -n "$(find setup.py csrc -newer "$object")" ]; }
}
usable() { # whether they load, and are of this GPU's architecture
  $python - <<'END'
import os, sys, torch
from cl_optim.ops import library
kind = "cuda" if os.environ["DEVICE"] == "cuda" else "cpu"
if not library.available(kind):
    sys.exit(library.explain(kind))
built = library.backends()[kind].info
print(built)
if kind == "cuda":
    here = "".join(map(str, torch.cuda.get_device_capability()))
    if here not in built["architectures"].split(","):
        sys.exit(f"They were compiled for {built['architectures']}, and this GPU has {here}.")
END
}
build() {
  echo "The objects are built here."
  local arch command
  command="$python setup.py build_ext --inplace"
  if [ -n "$dry" ]; then
    echo "Not here: $command"
    return
  fi
  arch=$($python -c 'import torch; print(*torch.cuda.get_device_capability(), sep="")')
  CL_OPTIM_REQUIRE=cpu,cuda CL_OPTIM_CUDA=1 CL_OPTIM_CUDA_ARCHS=$arch $command
}
run_tests() { # OUTPUT, pytest's arguments; in time to say what is known
  mkdir -p "$state/pytest"
  $python -m gpu.tests $((SECONDS_LEFT - 15)) "$1" "$state/pytest" "${@:2}"
}
profile() {
  local command=(ncu --clock-control none -k "regex:^(ewc_adamw|pairs_kernel|accumulate_kernel)"
    --section SpeedOfLight --section MemoryWorkloadAnalysis --section LaunchStats
    --section Occupancy --section WarpStateStats)
  if [ -n "$dry" ]; then
    echo "Not here: ${command[*]}"
    command=()
  fi
  "${command[@]}" $python -m gpu.profile >"$out/ncu.txt" 2>&1
  local status=$?
  tail -n 5 "$out/ncu.txt"
  return $status
}

# --- how stages run -------------------------------------------------------------------------------

# Run a stage unless single ones were asked for and it is none of them.
stage() {
  local name=$1 limit=$2 left status start
  shift 2
  if [ -n "$list" ]; then
    echo "$name $limit"
    return
  fi
  [ -z "$only" ] || [[ " $only " = *" $name "* ]] || return
  left=$((deadline - $(date +%s)))
  # The build takes its time from the last stages, which take what others left.
  case $name in objects) limit=150 ;; tests | compiled) [ -n "$only" ] || limit=$left ;; esac
  [ "$limit" -lt "$left" ] || limit=$left
  case " ${BREAK:-} " in # to test what becomes of the others
    *" $name=fail "*) set -- false ;;
    *" $name=hang "*) limit=1 && set -- sleep 1000 ;;
  esac
  echo "=== $name, at most $limit s"
  start=$(date +%s)
  if [ "$limit" -le 0 ]; then
    status="no time was left"
  else
    SECONDS_LEFT=$limit timeout -k 5 "$limit" bash -c '"$@"' stage "$@"
    status=$?
  fi
  case $status in 0) status=ok ;; 124) status="over its time" ;; 137) status=killed ;; esac
  echo "STAGE $name: $status, $(($(date +%s) - start)) s" | tee -a "$state/stages.txt"
  note
}
note() { # after each stage, since a time limit may end this script as well
  cp "$FIGURES" "$state/figures.jsonl"
  $python -m gpu.report "$FIGURES" --stages "$state/stages.txt" >"$out/results.txt"
}
finish() {
  note
  cat "$out/results.txt"
}

list_stages() { # name and seconds
  local call budget list=1 out=
  for call in 1 2; do
    budget=budget_$call
    echo "call $call ${!budget}"
    stages_$call
  done
}
list=
if [ "${1:-}" = --list ]; then
  list_stages
  exit
fi
out=${1:?usage: bench/gpu.sh [--dry] OUT 1|2|STAGE…}
shift
call=${1:-1}
only=
case $call in 1 | 2) ;; *) only=$* && call=stages ;; esac
known=$(list_stages)
for name in $only; do
  grep -qx "$name [0-9]*" <<<"$known" || {
    echo "There is no stage $name: bench/gpu.sh --list names them." >&2
    exit 2
  }
done
mkdir -p "$out" "$state"
out=$(cd "$out" && pwd)
[ "$call" != 1 ] || rm -rf "${state:?}"/*
export FIGURES=$out/figures.jsonl PYTHON=$python state out dry python
SOURCES=$(bench/gpu/sources.sh)
export SOURCES
export -f objects stale usable build run_tests profile
cat "$state/figures.jsonl" >"$FIGURES" 2>/dev/null # what an earlier call has found
trap finish EXIT
trap 'exit 143' TERM INT
{
  case $call in
    stages)
      deadline=$(($(date +%s) + 600))
      stages_1
      stages_2
      ;;
    *)
      budget=budget_$call
      deadline=$(($(date +%s) + ${!budget}))
      stages_"$call"
      ;;
  esac
} > >(tee "$out/call-$call.log") 2>&1
exit 0 # what failed is in the table
