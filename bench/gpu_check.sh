#!/usr/bin/env bash
# Runs all checks and measurements on a machine with a GPU, unattended and without a network:
#
#   bench/gpu_check.sh --part tests OUT    # in nine minutes: primitives, tests, sanitizers
#   bench/gpu_check.sh --part speed OUT    # in nine minutes: times against cuBLAS, torch and bitsandbytes
#   bench/gpu_check.sh OUT                 # both, one after the other
#
# The self-test of every kernel comes first in either. Parts that cannot run are skipped with a reason. OUT, a folder for one run, gets summary.txt and results.tar.gz
# (below 16 MB) with logs, tables and JSON lines. Both are rewritten after every part, so that an interrupted run
# keeps its results. crossovers.json is for PEFT_KERNELS_CROSSOVERS (docs/gpu.md).
#
# Exits with 0 when every part that ran passed, 1 when one failed, 2 on a wrong call, 3 without a GPU.
# --carry FOLDER  from tools/carry.py: FOLDER/python is added to Python's path (bitsandbytes),
#                 FOLDER/peft_kernels is the default of PEFT_KERNELS_PREBUILT
# PEFT_KERNELS_PREBUILT  a folder with the CUDA libraries of a wheel, or with the _C_cuda*.so of a build by this
#                        Python, used if nothing can be compiled
# GPU_CHECK_SECONDS  time limit of either run (530), divided among its parts
# PYTHON    an interpreter with torch (python3)
# REHEARSE  1: run all parts on the CPU with small shapes, as a smoke test
set -u
usage() { echo "usage: bench/gpu_check.sh [--part tests|speed] [--carry FOLDER] OUT" >&2; exit 2; }
PARTS="tests speed" CARRY=
while [ $# -gt 1 ]; do
  case $1 in
    --part) [ "$2" = tests ] || [ "$2" = speed ] || usage; PARTS=$2 ;;
    --carry) CARRY=$(cd "$2" 2> /dev/null && pwd) || { echo "--carry: no folder $2" >&2; exit 2; } ;;
    *) usage ;;
  esac
  shift 2
done
OUT=${1:-}
case $OUT in "" | -*) usage ;; esac
mkdir -p "$OUT" && OUT=$(cd "$OUT" && pwd) || exit 2
PYTHON=${PYTHON:-python3}
case $PYTHON in
  /*) ;;
  */*) PYTHON=$PWD/$PYTHON ;;
esac
PREBUILT=${PEFT_KERNELS_PREBUILT:-${CARRY:+$CARRY/peft_kernels}}
[ -z "$PREBUILT" ] || PREBUILT=$(cd "$PREBUILT" 2> /dev/null && pwd) || PREBUILT=
cd "$(dirname "$0")/.." || exit 2
REHEARSE=${REHEARSE:-0}
export PYTHONPATH=$PWD${CARRY:+:$CARRY/python}${PYTHONPATH:+:$PYTHONPATH} HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1
WORK=$(mktemp -d) || exit 2
trap 'rm -rf "$WORK"' EXIT
RESULTS=$WORK/results
mkdir "$RESULTS"
SUMMARY=$OUT/summary.txt
: > "$SUMMARY"
FAILED=0

wants() { [[ " $PARTS " == *" $1 "* ]]; }

say() { echo "$*" | tee -a "$SUMMARY"; }

skip() { say "$1: skipped, $2"; }

has() { "$PYTHON" -c "import sys, importlib.util as u; sys.exit(u.find_spec('$1') is None)" &> /dev/null; }

# Archives all results. The middle of long files is cut out, more of it if the archive is too large.
ARCHIVE_BYTES=15000000
bundle() {
  local keep file
  for keep in 4000000 400000 40000; do
    rm -rf "$WORK/bundle"
    mkdir "$WORK/bundle"
    cp "$SUMMARY" "$WORK/bundle"
    (cd "$RESULTS" && find . -type f) | while read -r file; do
      mkdir -p "$WORK/bundle/$(dirname "$file")"
      if [ "$(stat -c %s "$RESULTS/$file")" -le $keep ]; then
        cp "$RESULTS/$file" "$WORK/bundle/$file"
      else
        {
          head -c $((keep / 2)) "$RESULTS/$file"
          printf '\n[... the middle is left out ...]\n'
          tail -c $((keep / 2)) "$RESULTS/$file"
        } > "$WORK/bundle/$file"
      fi
    done
    tar -C "$WORK/bundle" -czf "$WORK/results.tar.gz" .
    [ "$(stat -c %s "$WORK/results.tar.gz")" -gt $ARCHIVE_BYTES ] || break
  done
  # Moved into place, so that a reader always finds a complete archive.
  cp "$WORK/results.tar.gz" "$OUT/.results.tar.gz" && mv "$OUT/.results.tar.gz" "$OUT/results.tar.gz"
}

# A shell started in the background ignores SIGINT, and so would Python.
LISTEN=
env --default-signal=INT true 2> /dev/null && LISTEN="env --default-signal=INT"

# part NAME SHARE COMMAND...: runs the command with its output in NAME.log, whose end is shown on failure. SHARE is
# in seconds of $WHOLE; a part may also use what earlier parts left, and {seconds} in the command becomes a little
# less. Then it is interrupted as by Ctrl-C, after which pytest and bench/gpu/run.py report what they have.
WHOLE=530
TOTAL=${GPU_CHECK_SECONDS:-$WHOLE}
SCHEDULE=20 # for Python calls between the parts
part() {
  local name=$1 limit started=$SECONDS status
  SCHEDULE=$((SCHEDULE + $2))
  limit=$((SCHEDULE * TOTAL / WHOLE - SECONDS))
  shift 2
  [ "$limit" -ge 3 ] || { skip "$name" "the parts before it took $SECONDS s"; return 1; }
  $LISTEN timeout -s INT --kill-after=8 "$limit" "${@//\{seconds\}/$((limit * 9 / 10))}" \
    > "$RESULTS/$name.log" 2>&1 < /dev/null
  status=$?
  if [ $status -eq 0 ]; then
    say "$name: passed ($((SECONDS - started)) of $limit s)"
  else
    FAILED=1
    [ $status -eq 124 ] || [ $status -eq 137 ] && status="$status, out of time"
    say "$name: FAILED (status $status, $((SECONDS - started)) of $limit s), the end of $name.log:"
    tail -n "${LINES_SHOWN:-25}" "$RESULTS/$name.log" | tee -a "$SUMMARY"
  fi
  bundle
  [ "$status" = 0 ]
}

# tool NAME: path of a program of the CUDA toolkit, from PATH, the toolkit or a Python package.
tool() {
  command -v "$1" && return
  local site
  site=$("$PYTHON" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])' 2> /dev/null)
  find -L "${CUDA_HOME:-/usr/local/cuda}" "$site/nvidia" -name "$1" -type f -perm -u+x 2> /dev/null |
    head -n 1
}

# ---- GPU -------------------------------------------------------------------------------------------------

VENDOR=nvidia
if [ "$REHEARSE" = 1 ]; then
  say "a rehearsal on the CPU: nothing ran on a GPU"
elif VENDOR=$("$PYTHON" -c '
import sys
try:
    import torch
except ImportError as error:
    sys.exit(f"torch cannot be imported: {error}")
if torch.version.cuda is None and torch.version.hip is None:
    sys.exit(f"torch {torch.__version__} is a build without CUDA or ROCm")
if not torch.cuda.is_available():
    sys.exit(f"torch {torch.__version__} (CUDA {torch.version.cuda}) sees no GPU")
torch.zeros(1, device="cuda").add_(1).item()
print("amd" if torch.version.hip else "nvidia")
' 2> "$WORK/reason"); then
  VENDOR=$(echo "$VENDOR" | tail -n 1)
else
  say "gpu_check: there is no usable GPU here: $(tail -n 1 "$WORK/reason")"
  exit 3
fi

# ---- Machine ---------------------------------------------------------------------------------------------

environment() {
  nvidia-smi || rocm-smi || echo "neither nvidia-smi nor rocm-smi"
  nvidia-smi -q -d CLOCK,POWER,TEMPERATURE,PERFORMANCE 2> /dev/null
  uname -a
  nproc
  free -g
  "$PYTHON" -m torch.utils.collect_env
  "$PYTHON" -m pip list 2> /dev/null || echo "no pip"
  for name in nvcc nvdisasm compute-sanitizer ncu ninja g++; do
    echo "$name: $(tool $name || true)"
  done
}
export PYTHON CUDA_HOME="${CUDA_HOME:-/usr/local/cuda}"
export -f environment tool
# torch looks for ninja on PATH only, where it is not if the environment is not activated.
SCRIPTS=$("$PYTHON" -c 'import sysconfig; print(sysconfig.get_path("scripts"))' 2> /dev/null | tail -n 1)
export PATH=$PATH${SCRIPTS:+:$SCRIPTS}
part environment 15 bash -c environment

# ---- Build -----------------------------------------------------------------------------------------------

# Prints why nothing can be compiled here, or nothing.
obstacle() {
  [ "$REHEARSE" = 1 ] && { echo "a rehearsal"; return; }
  [ "$VENDOR" = nvidia ] || { echo "an AMD card, which back end triton serves"; return; }
  [ -n "$NVCC" ] || { echo "there is no nvcc"; return; }
  has setuptools || { echo "$PYTHON lacks setuptools"; return; }
  [ -n "$(command -v ninja)" ] || { echo "there is no ninja on the path or in ${SCRIPTS:-?}"; return; }
  [ -n "$(command -v "${CXX:-g++}")" ] || echo "there is no C++ compiler ${CXX:-g++}"
}
NVCC=$(tool nvcc)
NVCC_HOME=$(dirname "$(dirname "$(readlink -f "${NVCC:-/}")")")
backend() { "$PYTHON" -c "import sys, peft_kernels.core.backends as b; sys.exit(b.BACKENDS['$1'].probe())" 2>&1; }
REASON=$(obstacle)
BUILT=0
if [ -n "$REASON" ]; then
  skip build "$REASON"
else
  CAPABILITY=$("$PYTHON" -c 'import torch; print("%d.%d" % torch.cuda.get_device_capability())')
  part build 120 env PEFT_KERNELS_CUDA=1 PEFT_KERNELS_CPU=0 TORCH_CUDA_ARCH_LIST="$CAPABILITY" \
    MAX_JOBS="$(nproc)" CUDA_HOME="$NVCC_HOME" "$PYTHON" setup.py build_ext --inplace && BUILT=1
fi
if [ $BUILT = 0 ] && [ -n "$PREBUILT" ] && [ "$REHEARSE" != 1 ] && [ "$VENDOR" = nvidia ]; then
  cp "$PREBUILT"/*_cuda*.so peft_kernels/ && say "prebuilt: $(cd "$PREBUILT" && echo *_cuda*.so)"
fi
USABLE=
for name in $([ "$REHEARSE" = 1 ] && echo cpu || echo cuda triton); do
  if reason=$(backend $name); then
    USABLE="$USABLE $name"
  elif [ "$VENDOR" = nvidia ] || [ $name != cuda ]; then
    FAILED=1
    say "back end $name: NOT USABLE: $(echo "$reason" | tail -n 1)"
  fi
done
read -r BACKEND _ <<< "$USABLE"
if [ -z "$BACKEND" ]; then
  say "no back end of ours can be used; nothing else runs"
  bundle
  exit 1
fi
usable() { [[ " $USABLE " == *" $1 "* ]]; }

# ---- Self-test -------------------------------------------------------------------------------------------

# What it finds is remembered for the parts below, as for a user: they do without a kernel that is wrong.
export XDG_CACHE_HOME=$WORK/cache
LINES_SHOWN=0 part self-test 30 "$PYTHON" -m peft_kernels doctor --seconds "{seconds}"
say "$(cat "$RESULTS/self-test.log" 2> /dev/null)"

# ---- Tests -----------------------------------------------------------------------------------------------

SANITIZER=$(tool compute-sanitizer)
# Only our kernels, if the tool supports a filter. Without torch's caching allocator every tensor is an allocation of
# its own, so that the tool sees accesses beyond its end.
CHOOSE=
[ -n "$SANITIZER" ] && "$SANITIZER" --help 2> /dev/null | grep -q -- --kernel-regex &&
  CHOOSE="--kernel-regex kns=peft_kernels"
# sanitize NAME SHARE TOOL COMMAND...
sanitize() {
  local name=$1 limit=$2 tool=$3
  shift 3
  if [ -z "$SANITIZER" ]; then
    skip "$name" "there is no compute-sanitizer"
  else
    part "$name" "$limit" env PYTORCH_NO_CUDA_MEMORY_CACHING=1 "$SANITIZER" --tool "$tool" $CHOOSE \
      --error-exitcode 9 --print-limit 20 "$@"
  fi
}

PYTEST=("$PYTHON" -m pytest -q -p no:cacheprovider --continue-on-collection-errors)
# examined NAME SHARE PYTEST_ARGUMENTS...: if a test fails, runs the first failing one again under memcheck, as it
# often explains the others.
examined() {
  local name=$1 limit=$2 failed
  shift 2
  part "$name" "$limit" "${PYTEST[@]}" "$@" && return
  failed=$(sed -n -E 's/^(FAILED|ERROR) (tests[^ ]*::.*)$/\2/p' "$RESULTS/$name.log" 2> /dev/null |
    head -n 1 | sed 's/ - .*//')
  [ -z "$failed" ] || sanitize "memcheck-$name" 20 memcheck "${PYTEST[@]}" "$failed"
}

if wants tests; then
  if [ "$REHEARSE" = 1 ] || [ "$VENDOR" != nvidia ] || [ -z "$NVCC" ]; then
    skip primitives "$REASON"
  else
    # These need only nvcc and the card; if they fail, no other result is meaningful.
    part primitives 40 bash -c 'bash tests/gpu/card/build.sh "$0" "$1" -arch=native && "$1"' \
      "$NVCC" "$WORK/primitives"
  fi
  if ! has pytest || ! has hypothesis; then
    skip tests "$PYTHON lacks pytest or hypothesis"
  elif [ "$REHEARSE" = 1 ]; then
    examined tests-cpu 60 tests/ops/nf4/test_nf4_format.py
    examined tests-on-card 60 tests/gpu/test_on_card.py -k cpu-m5
  else
    WORKERS=$(has xdist && echo "-n 6 --dist loadfile")
    for name in $USABLE; do
      examined tests-$name 70 $WORKERS --maxfail 40 --ignore tests/gpu/test_on_card.py -k $name
    done
    examined tests-on-card 45 $WORKERS --maxfail 40 tests/gpu/test_on_card.py
  fi
fi

# ---- Times -----------------------------------------------------------------------------------------------

if wants speed; then
  for name in bitsandbytes peft; do
    has $name || skip "contender $name" "it is not installed"
  done
  if [ "$REHEARSE" = 1 ] && ! "$PYTHON" -c 'import peft_kernels._C_ptx' &> /dev/null; then
    skip crossovers "the stub device is not built"
  elif [ "$REHEARSE" = 1 ] || usable cuda; then
    part crossovers 45 "$PYTHON" bench/gpu/crossovers.py $([ "$REHEARSE" = 1 ] && echo --rehearse) \
      "$RESULTS/crossovers.json"
    cat "$RESULTS/crossovers.log" 2> /dev/null
    [ ! -e "$RESULTS/crossovers.json" ] || cp "$RESULTS/crossovers.json" "$OUT"
  else
    skip crossovers "only back end cuda has them"
  fi
  # A rehearsal runs them as PTX, where that is built.
  BY="cuda --min-time 0.1 --repeats 5" ONLY='^wgmma'
  [ "$REHEARSE" = 1 ] && BY="ptx --min-time 0 --repeats 1" ONLY='^wgmma-.*72x64-m64'
  WGMMA=(env PEFT_KERNELS_PTX_ARCH=90 "$PYTHON" bench/gpu/run.py --backend $BY --only "$ONLY")
  if { [ "$REHEARSE" = 1 ] || usable cuda; } && [ -n "$("${WGMMA[@]}" --list 2> /dev/null)" ]; then
    part wgmma 60 "${WGMMA[@]}" --seconds "{seconds}" --output "$RESULTS/wgmma"
    cat "$RESULTS/wgmma/table.txt" 2> /dev/null
  else
    skip wgmma "there is no LinearWgmma, which needs compute capability 9.0"
  fi
  QUICK=$([ "$REHEARSE" = 1 ] && echo "--min-time 0 --repeats 1 --only 72x64")
  part speed 200 "$PYTHON" bench/gpu/run.py --backend "$BACKEND" --seconds "{seconds}" --only '^(?!wgmma)' \
    --output "$RESULTS/speed" $QUICK${QUICK:+|^step-}
  cat "$RESULTS/speed/table.txt" 2> /dev/null
  part speed-eager 40 "$PYTHON" bench/gpu/run.py --backend "$BACKEND" --eager --seconds "{seconds}" \
    --only '^(adamw|step-layer|(forward|qlora)-.*-m(1|2048)-)' --output "$RESULTS/speed-eager" $QUICK
fi

# ---- Sanitizers ------------------------------------------------------------------------------------------

if wants tests && [ "$VENDOR" = nvidia ]; then
  for name in memcheck racecheck; do
    sanitize $name 30 $name "$PYTHON" bench/gpu/run.py --backend "$BACKEND" --check --only '192|adamw' \
      --output "$RESULTS/$name"
  done
fi

bundle
echo
cat "$SUMMARY"
exit $FAILED
