#!/usr/bin/env bash
# Create .venv, check style and types, and run the tests. Arguments are passed to pytest.
#   scripts/test.sh                        everything
#   scripts/test.sh --fast                 without the slow tests; three minutes
#   scripts/test.sh --matrix               --fast with the oldest and newest JAX, in .venv-3.11, ...
#   scripts/test.sh tests/test_losses.py   one file
#   PYTHON=python3.12 scripts/test.sh      with another Python (remove .venv first)
set -euo pipefail
cd "$(dirname "$0")/.."
if [ "${1:-}" = --matrix ]; then
  for version in 3.11 3.12 3.13; do
    if ! command -v "python$version" >/dev/null; then
      echo "skipped: python$version is not installed"
      continue
    fi
    jax="jax>=0.11,<0.13" # needs Python 3.12
    [ "$version" = 3.11 ] && jax="jax>=0.10,<0.11"
    PYTHON="python$version" VENV=".venv-$version" JAX="$jax" scripts/test.sh --fast "${@:2}"
  done
  exit
fi
if [ "${1:-}" = --fast ]; then
  set -- -m "not slow" "${@:2}"
fi
source scripts/environment.sh
install_torch
install ".[dev]" ${JAX:+"$JAX"}
ruff check .
ruff format --check .
hadolint Dockerfile
mypy
# worksteal keeps neighbouring tests on one worker, which shares fixtures and compiled programs
python -m pytest -n "${WORKERS:-2}" --dist worksteal "$@"
