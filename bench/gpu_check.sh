#!/usr/bin/env bash
# Everything there is to check and measure on a machine with a GPU, unattended, in under nine minutes and
# without a network: bench/gpu_check.sh OUT. What cannot be run is named with its reason, the rest goes on.
#
# OUT gets a log for each part, summary.txt, and the tables and JSON lines of bench/gpu.py.
# Exits with 0 when every part that ran passed, 1 when one failed, 2 on a wrong call, 3 without a GPU.
# Without nvcc there, build elsewhere (TORCH_CUDA_ARCH_LIST=9.0 python setup.py build_ext --inplace, the same
# Python and torch) and bring peft_kernels/_C_cuda*.so along.
# PYTHON    the interpreter (python3), which has torch
# REHEARSE  1: go through all parts on the CPU with small shapes, to see that they work
set -u
OUT=${1:-}
[ -n "$OUT" ] || { echo "usage: bench/gpu_check.sh OUT" >&2; exit 2; }
mkdir -p "$OUT" && OUT=$(cd "$OUT" && pwd) || exit 2
PYTHON=${PYTHON:-python3}
case $PYTHON in
  /*) ;;
  */*) PYTHON=$PWD/$PYTHON ;;
esac
cd "$(dirname "$0")/.." || exit 2
REHEARSE=${REHEARSE:-0}
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1
SUMMARY=$OUT/summary.txt
: > "$SUMMARY"
FAILED=0
DEADLINE=525

say() { echo "$*" | tee -a "$SUMMARY"; }

left() { echo $((DEADLINE - SECONDS)); }

# part NAME SECONDS COMMAND...: run it within that time, all it says into OUT/NAME.log, its end shown here.
part() {
  local name=$1 limit=$2 started=$SECONDS status
  shift 2
  [ "$limit" -le "$(left)" ] || limit=$(left)
  [ "$limit" -ge 15 ] || { skip "$name" "the other parts took $SECONDS s"; return; }
  timeout --kill-after=10 "$limit" "$@" > "$OUT/$name.log" 2>&1 < /dev/null
  status=$?
  if [ $status -eq 0 ]; then
    say "$name: passed ($((SECONDS - started)) s)"
  else
    FAILED=1
    [ $status -eq 124 ] || [ $status -eq 137 ] && status="$status, out of time"
    say "$name: FAILED (status $status, $((SECONDS - started)) s), the end of $OUT/$name.log:"
    tail -n 25 "$OUT/$name.log" | tee -a "$SUMMARY"
  fi
}

skip() { say "$1: skipped, $2"; }

has() { "$PYTHON" -c "import sys, importlib.util as util; sys.exit(util.find_spec('$1') is None)" 2> /dev/null; }

# tool NAME: where a program of the CUDA toolkit is, from the path, the toolkit or a Python package.
tool() {
  command -v "$1" && return
  local site
  site=$("$PYTHON" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])' 2> /dev/null)
  find -L "${CUDA_HOME:-/usr/local/cuda}" "$site/nvidia" -name "$1" -type f -perm -u+x 2> /dev/null | head -n 1
}

# ---- Is there a GPU? -------------------------------------------------------------------------------------

if [ "$REHEARSE" = 1 ]; then
  say "a rehearsal on the CPU: nothing here was run on a GPU"
  BACKEND=cpu
else
  BACKEND=cuda
  if ! reason=$("$PYTHON" -c '
import sys
try:
    import torch
except ImportError as error:
    sys.exit(f"torch cannot be imported: {error}")
if torch.version.cuda is None:
    sys.exit(f"torch {torch.__version__} is a build without CUDA")
if not torch.cuda.is_available():
    sys.exit(f"torch {torch.__version__} (CUDA {torch.version.cuda}) sees no NVIDIA GPU")
torch.zeros(1, device="cuda").add_(1).item()
' 2>&1); then
    say "gpu_check: there is no usable GPU here: $(echo "$reason" | tail -n 1)"
    exit 3
  fi
fi

# ---- What machine is this? -------------------------------------------------------------------------------

environment() {
  nvidia-smi || echo "no nvidia-smi"
  nvidia-smi -q -d CLOCK,POWER,TEMPERATURE,PERFORMANCE 2> /dev/null
  uname -a
  nproc
  free -g
  "$PYTHON" -m torch.utils.collect_env
  "$PYTHON" -m pip list 2> /dev/null || echo "no pip"
  for name in nvcc nvdisasm compute-sanitizer ninja g++; do
    echo "$name: $(tool $name || true)"
  done
}
export PYTHON CUDA_HOME="${CUDA_HOME:-/usr/local/cuda}"
export -f environment tool
part environment 30 bash -c environment

# ---- Build -----------------------------------------------------------------------------------------------

NVCC=$(tool nvcc)
# What is there already, cross-compiled elsewhere perhaps, is used as it is where nothing can be compiled.
backend() { "$PYTHON" -c "import sys, peft_kernels.backends as b; sys.exit(b.BACKENDS['$1'].probe())" 2>&1; }
if [ "$REHEARSE" = 1 ]; then
  skip build "a rehearsal"
elif [ -z "$NVCC" ]; then
  skip build "there is no nvcc"
elif ! has setuptools || ! has ninja || ! has pybind11; then
  skip build "$PYTHON lacks setuptools, ninja or pybind11"
else
  CAPABILITY=$("$PYTHON" -c 'import torch; print("%d.%d" % torch.cuda.get_device_capability())')
  part build 150 env PEFT_KERNELS_CUDA=1 PEFT_KERNELS_CPU=0 TORCH_CUDA_ARCH_LIST="$CAPABILITY" \
    MAX_JOBS="$(nproc)" CUDA_HOME="$(dirname "$(dirname "$(readlink -f "$NVCC")")")" \
    "$PYTHON" setup.py build_ext --inplace
fi
if ! reason=$(backend $BACKEND); then
  FAILED=1
  say "back end $BACKEND: NOT USABLE, so nothing more is run: $(echo "$reason" | tail -n 1)"
  exit 1
fi

# ---- Are the results right? ------------------------------------------------------------------------------

part check 40 "$PYTHON" bench/gpu.py --backend $BACKEND --check --output "$OUT/check"
if ! has pytest || ! has hypothesis; then
  skip tests "$PYTHON lacks pytest or hypothesis"
elif [ "$REHEARSE" = 1 ]; then
  part tests 60 "$PYTHON" -m pytest -q -p no:cacheprovider tests/test_nf4_format.py
else
  WORKERS=$(has xdist && echo "-n 4 --dist loadfile")
  part tests 100 "$PYTHON" -m pytest -q -p no:cacheprovider $WORKERS --maxfail 40 -k $BACKEND
  if backend triton > /dev/null; then
    part tests-triton 60 "$PYTHON" -m pytest -q -p no:cacheprovider $WORKERS --maxfail 40 -k triton
  fi
fi

# ---- How fast are they? ----------------------------------------------------------------------------------

for name in bitsandbytes peft; do
  has $name || skip "contender $name" "it is not installed"
done
QUICK=$([ "$REHEARSE" = 1 ] && echo "--min-time 0 --repeats 1 --only 72x64")
part bench 200 "$PYTHON" bench/gpu.py --backend $BACKEND --seconds 160 --output "$OUT/bench" $QUICK
cat "$OUT/bench/table.txt" 2> /dev/null

# Of our kernels alone where the tool can choose: torch's are many. Without torch's cache of memory every
# tensor is an allocation of its own, at whose end the tool sees an access.
SANITIZER=$(tool compute-sanitizer)
if [ -z "$SANITIZER" ]; then
  skip sanitizer "there is no compute-sanitizer"
else
  CHOOSE=
  "$SANITIZER" --help 2> /dev/null | grep -q -- --kernel-regex && CHOOSE="--kernel-regex kns=peft_kernels"
  for name in memcheck racecheck; do
    part $name 75 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 "$SANITIZER" --tool $name $CHOOSE --error-exitcode 9 \
      --print-limit 20 "$PYTHON" bench/gpu.py --backend $BACKEND --check --only 192 --output "$OUT/$name"
  done
fi

part bench-eager 60 "$PYTHON" bench/gpu.py --backend $BACKEND --eager --seconds 40 \
  --only '^(forward|qlora)-.*-m(1|2048)-' --output "$OUT/bench-eager" $QUICK

echo
cat "$SUMMARY"
exit $FAILED
