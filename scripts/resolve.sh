#!/usr/bin/env bash
# Do the wheel's dependencies and markers resolve, for each Python and system it names, with all its
# extras (and so with any of them), and beside SAELens? Installs nothing. Without WHEEL one is built.
#
#   scripts/resolve.sh [WHEEL]
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
uv=$root/.venv/bin/uv
built=$(mktemp -d)
trap 'rm -rf "$built"' EXIT
if [ $# = 0 ]; then
  "$uv" build --quiet --wheel --out-dir "$built" "$root"
  set -- "$built"/*.whl
fi
wheel=$(realpath "$1")

"$root/.venv/bin/python" -m zipfile -e "$wheel" "$built"
extras=$(sed -n 's/^Provides-Extra: //p' "$built"/*.dist-info/METADATA | paste -sd,)
code=0
resolve() { # NAME REQUIREMENT...
  local name=$1 python system
  shift
  for python in 3.11 3.12 3.13; do
    for system in linux macos; do
      if printf '%s\n' "$@" | "$uv" pip compile --quiet --no-header --output-file /dev/null \
        --python-version "$python" --python-platform "$system" - >"$built/log" 2>&1; then
        echo "ok    $name, Python $python, $system"
      else
        echo "bad   $name, Python $python, $system"
        cat "$built/log"
        code=1
      fi
    done
  done
}

resolve "$extras" "gsae-core[$extras] @ file://$wheel"
resolve "app, lens and SAELens" "gsae-core[app,lens] @ file://$wheel" "sae-lens==6.54.12"
exit "$code"
