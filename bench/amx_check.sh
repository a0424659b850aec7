#!/usr/bin/env bash
# Runs all checks and measurements of ISA amx on a machine with AMX, unattended:
#
#   PYTHON=.venv/bin/python bench/amx_check.sh OUT
#
# The tests of that ISA on real tiles; the tables of docs/benchmarks.md for this machine; and whether dense GEMMs are
# ours or torch's: csrc/cpu/isa/fast_dense.h is written from the measurement, to be committed, if all tests passed.
# Kernels must be built (make setup-all). OUT gets summary.txt, a log of each part, and the tables.
#
# Exits with 0 when every part passed, 1 when one failed, 2 on a wrong call, 3 without AMX.
# PYTHON    an interpreter with torch (python3)
# REHEARSE  1: run all parts with this machine's best ISA and small shapes, as a smoke test; the record goes to OUT
# AMX_CHECK_SECONDS  time limit of each part (3600)
set -u
OUT=${1:-}
case $OUT in "" | -*) echo "usage: bench/amx_check.sh OUT" >&2; exit 2 ;; esac
[ $# -eq 1 ] || { echo "usage: bench/amx_check.sh OUT" >&2; exit 2; }
mkdir -p "$OUT" && OUT=$(cd "$OUT" && pwd) || exit 2
PYTHON=${PYTHON:-python3}
case $PYTHON in
  /*) ;;
  */*) PYTHON=$PWD/$PYTHON ;;
esac
cd "$(dirname "$0")/.." || exit 2
REHEARSE=${REHEARSE:-0}
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1
# A limit would hide the ISA, and an earlier record the measurement.
unset PEFT_KERNELS_CPU_ISA
export PEFT_KERNELS_AMX_DENSE=1
SUMMARY=$OUT/summary.txt
: > "$SUMMARY"
FAILED=0

say() { echo "$*" | tee -a "$SUMMARY"; }

# part NAME COMMAND...: runs the command with its output in NAME.log, whose end is shown on failure.
part() {
  local name=$1 started=$SECONDS status
  shift
  timeout -s INT --kill-after=10 "${AMX_CHECK_SECONDS:-3600}" "$@" > "$OUT/$name.log" 2>&1 < /dev/null
  status=$?
  if [ $status -eq 0 ]; then
    say "$name: passed ($((SECONDS - started)) s)"
  else
    FAILED=1
    say "$name: FAILED (status $status, $((SECONDS - started)) s), the end of $name.log:"
    tail -n 25 "$OUT/$name.log" | tee -a "$SUMMARY"
  fi
  [ $status -eq 0 ]
}

# ---- AMX -------------------------------------------------------------------------------------------------

# Prints the best ISA; fails with a reason if it is not AMX.
best_level() {
  "$PYTHON" -c '
import sys
try:
    from peft_kernels.core.backends import cpu
except ImportError as error:
    sys.exit(f"peft_kernels cannot be imported: {error}")
reason = cpu.BACKEND.probe()
if reason is not None:
    sys.exit(f"back end cpu: {reason}")
best = cpu.BACKEND.extension.isa_levels()[-1]
refused = cpu.BACKEND.extension.refused_isa_reason()
if best != "amx" and sys.argv[1] != "1":
    sys.exit(refused or f"the best level of this processor is {best}")
print(best)
' "$REHEARSE"
}
if ! LEVEL=$(best_level 2> "$OUT/reason"); then
  say "amx_check: there is no usable AMX here: $(tail -n 1 "$OUT/reason")"
  rm -f "$OUT/reason"
  exit 3
fi
rm -f "$OUT/reason"
LEVEL=$(echo "$LEVEL" | tail -n 1)
[ "$REHEARSE" = 1 ] && say "a rehearsal at level $LEVEL: nothing ran on tiles"
export PYTHON

# ---- Tests -----------------------------------------------------------------------------------------------

part environment bash -c 'grep -m 1 "model name" /proc/cpuinfo; uname -a; nproc; "$PYTHON" -m torch.utils.collect_env'
TESTS=tests
[ "$REHEARSE" = 1 ] && TESTS=tests/ops/cpu/test_cpu_plan.py
part tests "$PYTHON" -m pytest -q -p no:cacheprovider $TESTS -k "cpu-$LEVEL or test_cpu_plan"
RIGHT=$?

# ---- Dense GEMMs and times -------------------------------------------------------------------------------

RECORD=csrc/cpu/isa/fast_dense.h ONLY='^(forward|q?lora|quantize|dequantize|step|decode)-' CHOICE=
[ "$REHEARSE" = 1 ] && RECORD=$OUT/fast_dense.h ONLY='^overhead-64x64' CHOICE=--quick
if [ "$RIGHT" -ne 0 ]; then
  say "dense: skipped, as tests failed"
elif part dense "$PYTHON" bench/ops/dense_choice.py --level "$LEVEL" --record "$RECORD" $CHOICE; then
  say "dense: $(grep 'geometric mean' "$OUT/dense.log"), recorded in $RECORD: make setup, and commit"
fi
# The tables use the recorded choice.
PEFT_KERNELS_AMX_DENSE=$(grep -c 'kAmxHasFastDense = true' "$RECORD" 2> /dev/null)
part tables "$PYTHON" bench/run.py --only "$ONLY" --output "$OUT/tables"
echo
cat "$SUMMARY"
exit $FAILED
