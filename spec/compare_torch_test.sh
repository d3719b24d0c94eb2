#!/usr/bin/env bash
# Does bench/compare_torch.py run on the CPU, find all results right, and write what it printed? spec/compare_torch_test.sh BUILD_FOLDER
# Exit code 77: there is no Python with PyTorch.

. "$(dirname "${BASH_SOURCE[0]}")/../script/support.sh"

export CUFLASH_LIB=$1/libcuflash.so
python=''
for candidate in ${CUFLASH_PYTHON:+"$CUFLASH_PYTHON"} python3 /usr/bin/python3; do
  if "$candidate" -c 'import torch.nn.attention' 2>/dev/null; then
    python=$candidate
    break
  fi
done
if [ -z "$python" ]; then
  echo "skipped: no Python with PyTorch was found (CUFLASH_PYTHON may name one)"
  exit 77
fi
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
compare() { "$python" "$root/bench/compare_torch.py" --device cpu --threads 1 "$@" 2>&1; }
contains() { grep -qE -- "$2" <<<"$1" || die "expected '$2' in: $1"; }

output=$(compare --shape 1,4,2,70,40 --shape 2,2,2,33,64,1 --dtype float32,bfloat16 --check-only --layout bshd)
contains "$output" "^all results are right$"
contains "$output" "^bfloat16 +40 yes +70 +1x4/2 backward"
output=$(compare --shape 1,2,2,128,32 --dtype float32 --repeats 1 --most 1 --budget 1 --json "$scratch/figures.json")
contains "$output" "^worst row: float32 32"
"$python" - "$scratch/figures.json" <<'PY'
import json, sys
figures = json.load(open(sys.argv[1]))
assert len(figures["rows"]) == 4 and not figures["wrong"], figures
for row in figures["rows"]:
    assert row["ratio"] > 0 and row["contenders"]["cuflash"]["tflops"] > 0 and row["contenders"]["cuflash"]["error"] < 5e-6, row
PY
status=0
output=$(compare --rows nothing) || status=$?
[ $status = 2 ] || die "expected exit code 2 for a row that is none, got $status"
contains "$output" "expected .*targets.*, got 'nothing'"
say "ok"
