#!/usr/bin/env bash
# Compiles the primitives' cases into one program, from anywhere: build.sh NVCC PROGRAM FLAGS OF NVCC...
set -eu
nvcc=$1 program=$2
shift 2
cd "$(dirname "$0")/../.."
objects=$(mktemp -d)
trap 'rm -rf "$objects"' EXIT
printf '%s\n' csrc/cuda/launch.cpp tests/card/{main,card_cases}.cu tests/ptx/{value,matrix,memory}_cases.cu |
  xargs -P "$(nproc)" -I{} bash -c '"$0" "${@:3}" -c -o "$1/$(basename "$2").o" "$2"' \
    "$nvcc" "$objects" {} -std=c++17 -O3 -Icsrc/cuda -Itests/ptx "$@"
"$nvcc" "$@" -o "$program" "$objects"/*.o
