#!/usr/bin/env bash
# Create .venv, install EasyAira and run the quickstart: a GPT-2 from scratch, SFT, DPO, two released
# folders. Needs Python >= 3.11 and pip, but no GPU and no model download.
#   scripts/quickstart.sh [FOLDER]
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh
install "."
python -m easyaira.quickstart "${1:-quickstart}"
