#!/usr/bin/env bash
# Make an environment in .venv, install EasyAira, and run the whole job: a GPT-2 from scratch, SFT,
# DPO, two released folders. Needs Python >= 3.11 and pip, no GPU and no download of a model.
#   scripts/quickstart.sh [FOLDER]
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh
install "."
python -m easyaira.quickstart "${1:-quickstart}"
