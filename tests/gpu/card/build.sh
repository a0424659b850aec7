#!/usr/bin/env bash
# Compiles the primitives' cases into one program, from anywhere: build.sh NVCC PROGRAM FLAGS OF NVCC...
set -eu
nvcc=$1 program=$2
shift 2
cd "$(dirname "$0")/../../.."
objects=$(mktemp -d)
trap 'rm -rf "$objects"' EXIT
jobs=()
for source in csrc/cuda/core/launch.cpp tests/gpu/card/{main,card_cases}.cu tests/gpu/ptx/cases/{value,matrix,memory}_cases.cu; do
  "$nvcc" -std=c++17 -O3 "$@" -Icsrc/cuda -Itests/gpu/ptx -c -o "$objects/${source##*/}.o" "$source" &
  jobs+=($!)
done
for job in "${jobs[@]}"; do wait "$job"; done
"$nvcc" "$@" -o "$program" "$objects"/*.o
