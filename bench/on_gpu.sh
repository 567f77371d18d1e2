#!/usr/bin/env bash
# Runs one stage of the checks and measurements that need a GPU, sized for an H100 or H200: 4 minutes for `check`, 8 for each
# of the others. No stage needs a network. Results are written as it goes, so that an interrupted stage keeps them, and
# `training` goes on where it ended: what is in its files is skipped.
#
#   bench/on_gpu.sh check     build, CUDA tests, sanitizers, registers, host time of a measurement and of a step
#   bench/on_gpu.sh kernels   the kernels and the host tier, their peers and a device copy, with a profile
#   bench/on_gpu.sh training [CASE ...]    dropping against an expert's baseline and others (bench/bench_training_gpu.py),
#                                          a file for each case, within the case's own time; cases paper-DATASET-NETWORK
#                                          are of the paper's experiments (bench/bench_paper.py)
#   ... --device cpu --toy    a rehearsal without a GPU and nvcc; steps that need them are reported as skipped
#   ... --no-build            use the installed package
#
# Results go to $OUT (bench/results/gpu-STAGE): a log for each step, JSON, and steps.jsonl with exit codes and seconds.
# $TESTS_PASSED is the number of tests that passed before `kernels`, $LEARNDROP_COMMIT the commit if the tree has no history.
# $SEEDS are the random seeds of `training`, "0" if not set; $LEARNDROP_DATA and $LEARNDROP_WEIGHTS are the image sets and
# weights, which bench/pack_gpu.sh packs and joins. $LIMIT are the stage's seconds.
# $PYTHON is the interpreter, whose environment has torch, pytest and the build requirements of pyproject.toml.
set -uo pipefail
cd "$(dirname "$0")/.."
stage=${1:-}
case $stage in
  check) most_seconds=240; shift ;;
  kernels | training) most_seconds=480; shift ;;
  *) echo "on_gpu.sh: stage must be check, kernels or training, got '$stage'" >&2; exit 2 ;;
esac
device=cuda toy= build=1 names=() paper=()
while [ $# -gt 0 ]; do
  case $1 in
    --device) device=${2:?on_gpu.sh: --device wants cuda or cpu}; shift 2 ;;
    --toy) toy=1; shift ;;
    --no-build) build=; shift ;;
    -*) echo "on_gpu.sh: unknown option $1" >&2; exit 2 ;;
    paper-*) paper+=("${1#paper-}"); shift ;;
    *) names+=("$1"); shift ;;
  esac
done
if [ "$device" = cpu ] && [ -z "$toy" ]; then echo "on_gpu.sh: --device cpu is for a rehearsal: add --toy" >&2; exit 2; fi
python=${PYTHON:-python}
OUT=${OUT:-bench/results/gpu-$stage}
mkdir -p "$OUT"
OUT=$(realpath "$OUT")
limit=${LIMIT:-$most_seconds} failed=0
: > "$OUT/steps.jsonl"

note() { # step, exit code or reason, seconds
  printf '{"step": "%s", "outcome": "%s", "seconds": %d}\n' "$1" "$2" "$3" >> "$OUT/steps.jsonl"
}
skip() { # step, reason
  echo "== $1: skipped, $2"
  note "$1" "skipped: $2" 0
}
step() { # step, most seconds, command
  local name=$1 most=$2 begin=$SECONDS left=$((limit - SECONDS)) code=0
  shift 2
  if [ "$left" -lt 5 ]; then skip "$name" "the stage's $limit seconds are over"; failed=1; return 1; fi
  echo "== $name ($SECONDS s)"
  timeout -k 5 $((most < left ? most : left)) "$@" > "$OUT/$name.log" 2>&1 || code=$?
  note "$name" "$code" $((SECONDS - begin))
  tail -n 3 "$OUT/$name.log" | sed 's/^/   /'
  if [ "$code" -ne 0 ]; then echo "   FAILED with $code: $OUT/$name.log"; failed=1; fi
  return "$code"
}
gpu() { # as step, where there is a GPU
  if [ "$device" = cpu ]; then skip "$1" "it needs a GPU"; else step "$@"; fi
}
# Older versions of pytest-benchmark warn of workers, and of benchmarks that were skipped.
tests=("$python" -m pytest -q -p no:cacheprovider --durations=10 --benchmark-disable)
profile=("$python" -m pytest -q -p no:cacheprovider -n 0 -W default bench/bench_row_ops.py --benchmark-disable -k "learndrop and 2048")

if [ -z "$build" ]; then
  skip build "--no-build"
else
  # For Hopper: other architectures take as many seconds each.
  if [ "$device" = cpu ]; then compiles=(LEARNDROP_CUDA=0); else compiles=(LEARNDROP_CUDA=1); fi
  if [ "$device" != cpu ]; then
    export PATH=$PATH:/usr/local/cuda/bin
    compiles+=("CMAKE_CUDA_ARCHITECTURES=${CMAKE_CUDA_ARCHITECTURES:-90}")
  fi
  step build 240 env "${compiles[@]}" "$python" -m pip install --no-build-isolation --no-deps -e .
fi
if ! "$python" -c "import learndrop_ext" 2> "$OUT/import.log"; then
  echo "== $stage: FAILED, the package cannot be imported: $OUT/import.log"
  exit 1
fi
[ "$device" = cpu ] || export LEARNDROP_REQUIRE_CUDA=1

case $stage in
  check)
    gpu cuda-tests 240 "${tests[@]}" -v -n 4 -m cuda --junitxml "$OUT/cuda_tests.xml"
    if command -v compute-sanitizer > /dev/null; then
      for tool in memcheck racecheck; do
        gpu "$tool" 120 compute-sanitizer --tool "$tool" --error-exitcode 9 "${tests[@]}" -n 0 -m cuda \
          tests/ops/test_rows_cuda.py -k "(bits_of_the_cpu and float32 and uint8) or quiet_nan"
      done
    else
      skip memcheck "there is no compute-sanitizer"
      skip racecheck "there is no compute-sanitizer"
    fi
    if PATH=$PATH:/usr/local/cuda/bin command -v nvcc > /dev/null; then
      step registers 60 env PATH="$PATH:/usr/local/cuda/bin" "$python" bench/resource_usage.py sm_90
    else
      skip registers "there is no nvcc"
    fi
    step host-time 60 "$python" bench/host_time.py --device "$device" --out "$OUT/host_time.json"
    step step-on-rows 120 "$python" bench/bench_overhead.py --step-on-rows --device "$device" \
      --epochs "$([ -n "$toy" ] && echo 1 || echo 4)" ${toy:+--steps 3 --batches 4}
    ;;
  kernels)
    suites=("$python" -m pytest -q -p no:cacheprovider -n 0 -W default --benchmark-only --benchmark-save-data)
    if [ -n "$toy" ]; then
      export LEARNDROP_BENCH_ROUNDS=2 LEARNDROP_BENCH_FILE_MB=4
      step row-ops 120 "${suites[@]}" bench/bench_row_ops.py -k "1024" "--benchmark-json=$OUT/row_ops.json"
      step delta-norms 120 "${suites[@]}" bench/bench_delta_norms.py -k "ResNet-18 and norms" \
        "--benchmark-json=$OUT/delta_norms.json"
    else
      step delta-norms 150 "${suites[@]}" bench/bench_delta_norms.py -k "not compile" \
        "--benchmark-json=$OUT/delta_norms.json"
      step row-ops 200 "${suites[@]}" bench/bench_row_ops.py "--benchmark-json=$OUT/row_ops.json"
    fi
    gpu host-rows 100 "${suites[@]}" bench/bench_host_rows.py "--benchmark-json=$OUT/host_rows.json"
    step records 60 "$python" bench/run.py --suites kernels --tests-passed "${TESTS_PASSED:-0}" --out "$OUT" \
      --name kernels --benchmarks "$OUT"/{delta_norms,row_ops}.json $([ "$device" = cpu ] || echo "$OUT/host_rows.json")
    [ -n "$toy" ] || gpu compiled-recipe 100 "${suites[@]}" bench/bench_delta_norms.py -k compile \
      "--benchmark-json=$OUT/compiled_recipe.json"
    if command -v ncu > /dev/null; then
      gpu ncu 120 ncu --csv --log-file "$OUT/ncu.csv" --kernel-name regex:"gather|append" --launch-count 40 \
        --metrics gpu__time_duration.sum,dram__throughput.avg.pct_of_peak_sustained_elapsed,dram__bytes.sum.per_second \
        "${profile[@]}"
    else
      skip ncu "there is no ncu"
    fi
    ;;
  training)
    if [ ${#names[@]} -gt 0 ] || [ ${#paper[@]} -eq 0 ]; then
      step training $((limit)) "$python" bench/bench_training_gpu.py --out "$OUT" --device "$device" \
        --seconds $((limit - SECONDS - 15)) --seeds ${SEEDS:-0} \
        ${toy:+--toy} ${names[@]:+--cases "${names[@]}"}
    fi
    if [ ${#paper[@]} -gt 0 ]; then
      read -ra seeds <<< "${SEEDS:-0}"
      step paper $((limit)) "$python" bench/bench_paper.py --out "$OUT" --name paper --device "$device" --parts paper \
        --cases "${paper[@]}" --seeds ${#seeds[@]} --seconds $((limit - SECONDS - 120)) \
        --tests-passed "${TESTS_PASSED:-0}" ${LEARNDROP_DATA:+--data-root "$LEARNDROP_DATA"} ${toy:+--toy}
    fi
    ;;
esac
echo "== $stage: $([ "$failed" -eq 0 ] && echo passed || echo FAILED), $SECONDS s, $OUT"
exit "$failed"
