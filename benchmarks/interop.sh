#!/usr/bin/env bash
# Do SAELens and dictionary_learning themselves read what we write, and we what they write?
#   benchmarks/interop.sh [FOLDER]
#   benchmarks/interop.sh --with PYTHON
#
# FOLDER holds the peers' environments (.peers unless given; benchmarks/peers.sh makes them, 3 GB).
# SAEs of random weights go both ways; latents and reconstructions on the same activations have to
# agree to 1e-6 of the largest. PYTHON names another interpreter for our side than .venv's.
# --with: one environment that holds this package and SAELens; dictionary_learning, whose pins
# cannot live in it, is left out.
set -euo pipefail

root=$(cd "$(dirname "$0")/.." && pwd)
here=$root/benchmarks/interop
python=${PYTHON:-$root/.venv/bin/python}
if [ "${1:-}" = --with ]; then
  python=${2:?which interpreter?}
  saelens=$python dictionary_learning=
else
  peers=${1:-$root/.peers}
  saelens=$peers/saelens/bin/python dictionary_learning=$peers/dictionary_learning/bin/python
  [ -x "$saelens" ] && [ -x "$dictionary_learning" ] || "$root/benchmarks/peers.sh" "$peers"
fi

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export PYTHONWARNINGS=ignore HF_HUB_OFFLINE=1

"$python" "$here/ours.py" write "$work"
"$saelens" "$here/saelens_side.py" "$work"
[ -z "$dictionary_learning" ] ||
  "$dictionary_learning" "$here/dictionary_learning_side.py" "$work"
"$python" "$here/ours.py" compare "$work"
