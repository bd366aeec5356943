#!/usr/bin/env bash
# Do SAELens and dictionary_learning themselves read what we write, and we what they write?
#   benchmarks/interop.sh [FOLDER]
#
# FOLDER holds the peers' environments (.peers unless given; benchmarks/peers.sh makes them, 3 GB).
# SAEs of random weights go both ways; latents and reconstructions on the same activations have to
# agree to 1e-6 of the largest. PYTHON names another interpreter for our side than .venv's.
set -euo pipefail

root=$(cd "$(dirname "$0")/.." && pwd)
peers=${1:-$root/.peers}
python=${PYTHON:-$root/.venv/bin/python}
[ -x "$peers/saelens/bin/python" ] && [ -x "$peers/dictionary_learning/bin/python" ] ||
  "$root/benchmarks/peers.sh" "$peers"

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
here=$root/benchmarks/interop
export PYTHONPATH=$root PYTHONWARNINGS=ignore HF_HUB_OFFLINE=1

"$python" "$here/ours.py" write "$work"
"$peers/saelens/bin/python" "$here/saelens_side.py" "$work"
"$peers/dictionary_learning/bin/python" "$here/dictionary_learning_side.py" "$work"
"$python" "$here/ours.py" compare "$work"
