#!/usr/bin/env bash
# Installs this checkout with tested versions of all that it needs:  launch/install.sh PIP EXTRAS
#
#   launch/install.sh .venv/bin/pip tpu,gcs        EXTRAS of setup.cfg: tpu, cuda, gcs, s3, ... or none
#
# The buckets' clients need versions of their own of two packages, as `make buckets` tests them.
set -euo pipefail
[[ $# -ge 1 && $1 != -* ]] || { echo "usage: $0 PIP [EXTRAS]" >&2; exit 2; }
pip=$1 extras=${2:-}
if [[ $pip == */* ]]; then pip=$(realpath --no-symlinks "$pip"); fi
cd "$(dirname "$0")/.."
constraints=$(mktemp)
trap 'rm -f "$constraints"' EXIT
if [[ $extras == *gcs* || $extras == *s3* ]]; then
  grep -v -e '^fsspec=' -e '^python-dateutil=' constraints.txt | cat - constraints-buckets.txt > "$constraints"
else
  cp constraints.txt "$constraints"
fi
set -x
"$pip" install --no-cache-dir --quiet --constraint "$constraints" setuptools wheel
"$pip" install --no-cache-dir --quiet --constraint "$constraints" --no-build-isolation --editable ".${extras:+[$extras]}"
