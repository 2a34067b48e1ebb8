#!/usr/bin/env bash
# Check and measure jaxtrain on a machine with an NVIDIA GPU, in at most 8 minutes and without network access:
#   scripts/gpu_check.sh --data DIR_OR_TAR [--out DIR] [--minutes 8] [--only PART,PART]
# PYTHON: an interpreter (3.11 or newer) with JAX and the other requirements of jaxtrain.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
exec "${PYTHON:-python3}" "$root/scripts/gpu_check.py" "$@"
