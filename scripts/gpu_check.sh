#!/usr/bin/env bash
# Checks and measures jaxtrain on a machine with an NVIDIA GPU, in at most 8 minutes and without a network:
#   scripts/gpu_check.sh --data DIR_OR_TAR [--out DIR] [--minutes 8] [--only PART,PART]
# PYTHON names an interpreter (3.11 or newer) that can import JAX and jaxtrain's other requirements.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
exec "${PYTHON:-python3}" "$root/scripts/gpu_check.py" "$@"
