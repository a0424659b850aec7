#!/usr/bin/env bash
# Everything there is to check and measure of level amx, on a machine with AMX, unattended:
#
#   PYTHON=.venv/bin/python bench/amx_check.sh OUT
#
# The tests of that level on real tiles; the tables of docs/benchmarks.md for this machine; and whether dense
# products are ours or torch's: csrc/cpu/isa/fast_dense.h is written by what was measured, for a commit, if all
# tests passed. Kernels have to be built (make setup). OUT gets summary.txt, a log of each part, and the tables.
#
# Exits with 0 when every part passed, 1 when one failed, 2 on a wrong call, 3 without AMX.
# PYTHON    the interpreter (python3), which has torch
# REHEARSE  1: go through all parts at this machine's best level with small shapes, to see that they work;
#           what would be recorded goes into OUT
# AMX_CHECK_SECONDS  how long any part may take (3600)
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
# A cap would hide the level, and an earlier record would hide what is measured.
unset PEFT_KERNELS_CPU_ISA
export PEFT_KERNELS_AMX_DENSE=1
SUMMARY=$OUT/summary.txt
: > "$SUMMARY"
FAILED=0

say() { echo "$*" | tee -a "$SUMMARY"; }

# part NAME COMMAND...: run it, all it says into NAME.log, its end shown here where it failed.
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

# ---- Is there AMX? ---------------------------------------------------------------------------------------

# The best level; fails with the reason why there is none that will do.
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
[ "$REHEARSE" = 1 ] && say "a rehearsal at level $LEVEL: nothing here was run on tiles"
export PYTHON

# ---- Are the results right? ------------------------------------------------------------------------------

part environment bash -c 'grep -m 1 "model name" /proc/cpuinfo; uname -a; nproc; "$PYTHON" -m torch.utils.collect_env'
TESTS=tests
[ "$REHEARSE" = 1 ] && TESTS=tests/ops/cpu/test_cpu_plan.py
part tests "$PYTHON" -m pytest -q -p no:cacheprovider $TESTS -k "cpu-$LEVEL or test_cpu_plan"
RIGHT=$?

# ---- Whose are dense products, and how fast is it all? ---------------------------------------------------

RECORD=csrc/cpu/isa/fast_dense.h ONLY='^(forward|q?lora|quantize|dequantize|step|decode)-' CHOICE=
[ "$REHEARSE" = 1 ] && RECORD=$OUT/fast_dense.h ONLY='^overhead-64x64' CHOICE=--quick
if [ "$RIGHT" -ne 0 ]; then
  say "dense: skipped, products that are wrong are not chosen for their speed"
elif part dense "$PYTHON" bench/ops/dense_choice.py --level "$LEVEL" --record "$RECORD" $CHOICE; then
  say "dense: $(grep 'geometric mean' "$OUT/dense.log"), recorded in $RECORD: make setup, and commit"
fi
# The tables are of what will be built.
PEFT_KERNELS_AMX_DENSE=$(grep -c 'kAmxHasFastDense = true' "$RECORD" 2> /dev/null)
part tables "$PYTHON" bench/run.py --only "$ONLY" --output "$OUT/tables"
echo
cat "$SUMMARY"
exit $FAILED
