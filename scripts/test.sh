#!/usr/bin/env bash
# Make an environment in .venv, check the style, and run every test. Arguments go to pytest.
#   scripts/test.sh                        everything
#   scripts/test.sh tests/test_losses.py   one file
#   PYTHON=python3.12 scripts/test.sh      with another Python (remove .venv first)
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh
install ".[dev]"
ruff check .
ruff format --check .
python -m pytest -n "${WORKERS:-2}" "$@"
