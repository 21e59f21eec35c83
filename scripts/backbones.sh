#!/usr/bin/env bash
# List the backbones that work here, and how well those with weights read the names of the toy world.
#
#   bash scripts/backbones.sh [NAME …]      NAME: as BACKBONE of the other scripts, or architecture=FILE
ROOT=$(cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/.." && pwd)
if [ -z "${PYTHON:-}" ] && [ -x "$ROOT/.venv/bin/python" ]; then PYTHON=$ROOT/.venv/bin/python; fi
exec "${PYTHON:-python}" "$ROOT/tools/backbones.py" "$@"
