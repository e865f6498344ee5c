#!/usr/bin/env bash
# All that needs a CUDA device, in about four minutes: tests and benchmarks. Usage: benchmarks/on_cuda.sh FOLDER
set -u
out=${1:?give a folder for the results}
export PYTHONPATH=src PYTHONUNBUFFERED=1
python3 -m pytest -q -n 8 -p no:benchmark tests/cuda --tb=short 2>&1 | tee "$out/tests.txt" | tail -n 60
python3 -m benchmarks.decay --device cuda --rounds 30 --out "$out/decay-cuda.md"
python3 -m benchmarks.normalization --device cuda --quick --compile --out "$out/normalization-cuda.md"
