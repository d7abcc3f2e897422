#!/usr/bin/env bash
# Build the documentation in site/: create .venv, install EasyAira with the extra docs, run MkDocs.
#   scripts/docs.sh            a warning is an error
#   scripts/docs.sh --serve    and serve it on http://127.0.0.1:8000, rebuilt at each change
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh
install ".[docs]"
export NO_MKDOCS_2_WARNING=1
if [ "${1:-}" = --serve ]; then
  exec mkdocs serve --strict
fi
mkdocs build --strict
