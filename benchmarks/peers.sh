#!/usr/bin/env bash
# Make the peers' environments, for `python -m gsae_core bench`: benchmarks/peers.sh [FOLDER]
#
# Three, since their pins cannot live together with ours or with each other's: FOLDER/saelens,
# FOLDER/dictionary_learning and FOLDER/saedashboard; FOLDER is .peers in the repository unless given.
# About 4 GB. Run it again to mend an environment that was interrupted. PYTHON names another
# interpreter than python3.
set -euo pipefail

root=$(cd "$(dirname "$0")/.." && pwd)
folder=${1:-$root/.peers}
python=${PYTHON:-python3}
torch=$(sed -n 's/^torch==/torch==/p' "$root/requirements.txt")

mkdir -p "$folder"
# The torch that we run on, so that the products underneath are the same.
echo "$torch" >"$folder/constraints.txt"

environment() { # NAME REQUIREMENT...
  local name=$1
  shift
  echo "making $folder/$name: $*"
  [ -x "$folder/$name/bin/python" ] || "$python" -m venv "$folder/$name"
  local pip=("$folder/$name/bin/python" -m pip install --quiet --disable-pip-version-check)
  # Alone and first: pip must not weigh another build of torch against the peer's own needs.
  "${pip[@]}" "$torch"
  "${pip[@]}" --constraint "$folder/constraints.txt" psutil "$@"
}

environment saelens sae-lens==6.54.12 'transformer-lens<4'
environment dictionary_learning dictionary-learning==0.1.0
# Its numpy is older than what pyarrow needs since version 20, which nothing of its own forbids.
environment saedashboard sae-dashboard==0.8.0 'pyarrow<20'
# nnsight asks for it and never imports it; transformers does whenever it is there, and fails where
# its build (CUDA, from the index) is not torch's (CPU).
"$folder/dictionary_learning/bin/python" -m pip uninstall --quiet --yes torchvision
"$folder/saedashboard/bin/python" -m pip uninstall --quiet --yes torchvision torchaudio

"$folder/saelens/bin/python" -c 'import sae_lens, torch; print("sae-lens", sae_lens.__version__, "on torch", torch.__version__)'
"$folder/dictionary_learning/bin/python" -c 'import importlib.metadata as m, torch
from dictionary_learning.trainers.gdm import GatedSAETrainer
print("dictionary-learning", m.version("dictionary-learning"), "on torch", torch.__version__)'
"$folder/saedashboard/bin/python" -c 'import importlib.metadata as m, torch
from sae_dashboard.sae_vis_runner import SaeVisRunner
print("sae-dashboard", m.version("sae-dashboard"), "on torch", torch.__version__)'
