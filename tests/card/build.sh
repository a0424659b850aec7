#!/usr/bin/env bash
# Compiles the primitives' cases into one program, from anywhere: build.sh NVCC PROGRAM FLAGS OF NVCC...
set -eu
nvcc=$1 program=$2
shift 2
cd "$(dirname "$0")/../.."
"$nvcc" -std=c++17 -O3 "$@" -Icsrc/cuda -Itests/ptx -o "$program" \
  tests/card/main.cu tests/card/card_cases.cu tests/ptx/{value,matrix,memory}_cases.cu
