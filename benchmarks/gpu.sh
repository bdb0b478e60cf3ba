#!/usr/bin/env bash
# On a machine with a GPU, in under nine minutes: its tests, and every benchmark whose answer depends on the device.
#
#   bash benchmarks/gpu.sh [OUT]     log and results go to OUT (gpu-out); results also to benchmarks/results
#   QUICK=1 bash benchmarks/gpu.sh   small sizes; also runs without a GPU
#   SKIP="tests compact_speed"       leaves these out
#
# PYTHON (python3) must have hessjax's dependencies and `pytest pytest-xdist beartype scikit-learn`.
set -uo pipefail
cd "$(dirname "$0")/.."
OUT=$(mkdir -p "${1:-gpu-out}" && cd "${1:-gpu-out}" && pwd)
PYTHON=${PYTHON:-python3} SKIP=${SKIP:-}
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 MPLBACKEND=Agg
# Several test processes share the device; and what one run has compiled, the next need not.
export JAX_COMPILATION_CACHE_DIR="${JAX_COMPILATION_CACHE_DIR:-$OUT/programs}"
failed=()

# part NAME SECONDS COMMAND...: one part, within its time, into its own log.
part() {
  local name=$1 limit=$2; shift 2
  case " $SKIP " in *" $name "*) return ;; esac
  local begin=$SECONDS
  if timeout "$limit" "$@" >"$OUT/$name.log" 2>&1; then state=ok; else state="failed ($?)"; failed+=("$name"); fi
  printf '%-24s %-12s %4s s\n' "$name" "$state" "$((SECONDS - begin))" | tee -a "$OUT/summary.txt"
  [ "$state" = ok ] || tail -n "${TAIL:-12}" "$OUT/$name.log"
}

: >"$OUT/summary.txt"
"$PYTHON" - <<'PY' | tee -a "$OUT/summary.txt"
import jax, platform
print("jax", jax.__version__, "python", platform.python_version(), *jax.devices())
PY

part accelerator 150 env XLA_PYTHON_CLIENT_PREALLOCATE=false "$PYTHON" -m pytest -p no:benchmark -n "${WORKERS:-4}" --dist load tests/devices/test_accelerator.py
part tests 240 env XLA_PYTHON_CLIENT_PREALLOCATE=false "$PYTHON" -m pytest -p no:benchmark -n "${WORKERS:-4}" --dist load -m smoke tests
for script in product_cost estimator_cost pruning_cost inverse_fisher_cost density_memory compact_speed; do
  part "$script" 120 "$PYTHON" "benchmarks/$script.py" ${QUICK:+--quick}
done

mkdir -p "$OUT/results" && find benchmarks/results -newer "$OUT/accelerator.log" -name '*.json' -exec cp {} "$OUT/results/" \; 2>/dev/null
echo "${#failed[@]} failed: ${failed[*]:-none}" | tee -a "$OUT/summary.txt"
exit $((${#failed[@]} > 0))
