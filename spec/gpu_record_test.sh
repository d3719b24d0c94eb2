#!/usr/bin/env bash
# Does script/gpu-record --check tell a record of these sources from others? And do the committed records match?
#
#   spec/gpu_record_test.sh           the check itself, on made-up records
#   spec/gpu_record_test.sh committed script/gpu-record --check; 77 where there is no record

. "$(dirname "${BASH_SOURCE[0]}")/../script/support.sh"

check() { "$root/script/gpu-record" --check "$@"; }
if [ "${1-}" = committed ]; then check && exit 0 || exit $?; fi

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
sources=$(cd "$root" && find kernels src/cuda -type f \( -name '*.[ch]' -o -name '*.cu' -o -name '*.cuh' -o -name CMakeLists.txt \) | LC_ALL=C sort |
  xargs sha256sum | sha256sum | cut -d ' ' -f 1)

record() { # record SOURCES FAILED
  rm -f "$scratch"/*
  sed "s/SOURCES/$1/g; s/FAILED/$2/" >"$scratch/some-gpu.json" <<'JSON'
{"gpu": "Some GPU", "compute": 90, "multiprocessors": 132, "total_bytes": 151397597184, "driver": "580.1", "driver_cuda": "13.0",
 "toolkit": "13.0", "version": "0.1.0", "date": "2026-01-02", "parts": {
  "cuda": {"sources": "SOURCES", "date": "2026-01-02", "passed": 41, "failed": FAILED, "skipped": 2, "specs": 900, "failures": []},
  "memcheck": {"sources": "SOURCES", "date": "2026-01-02", "version": "compute-sanitizer 2025.3", "cases": 12, "summary": "0 errors"},
  "figures": {"sources": "SOURCES", "date": "2026-01-02", "torch": "2.11", "summary": {"forward": 1.05, "worst": 0.9, "deterministic": 0.95, "least_deterministic": 0.905},
   "wrong": [], "rows": [
   {"dtype": "bfloat16", "dim": 64, "causal": false, "seq_q": 512, "seq_k": 512, "batch": 32, "heads": 32, "heads_kv": 32, "pass": "backward",
    "contenders": {"cuflash": {"ms": 1, "tflops": 300}, "deterministic": {"ms": 1.05, "tflops": 285.7}, "cudnn": {"ms": 1.1, "tflops": 272.7}}},
   {"dtype": "bfloat16", "dim": 64, "causal": true, "seq_q": 512, "seq_k": 512, "batch": 32, "heads": 32, "heads_kv": 8, "pass": "forward",
    "ratio": 1.05, "contenders": {"cuflash": {"ms": 1, "tflops": 420, "error": 0.002}, "cudnn": {"ms": 1.05, "tflops": 400}}}]},
  "training": {"sources": "SOURCES", "date": "2026-01-02", "rows": [
   {"dtype": "bfloat16", "dim": 64, "causal": true, "seq": 512, "batch": 32, "heads": 16, "sum": 1.25, "step": 1.3, "ratio": 1.04,
    "queued": 0.1}]}}}
JSON
  "$root/script/gpu-record" --page --results "$scratch"
}
expect() { # expect STATUS TEXT: what --check does, and says
  local output status=0
  output=$(check --results "$scratch" 2>&1) || status=$?
  [ "$status" = "$1" ] || die "expected exit code $1, got $status: $output"
  grep -qF -- "$2" <<<"$output" || die "expected '$2' in: $output"
}

expect 77 "no GPU was recorded yet"
echo '{"cpu": "not of a GPU"}' >"$scratch/cpu.json"
expect 77 "no GPU was recorded yet"
record "$sources" 0
expect 0 "1 record matches the sources"
page=$scratch/some-gpu.md
for line in "# cuflash on Some GPU" "on the GPU: 41 passed, 0 failed, 2 skipped" "memcheck: 0 errors" "racecheck: not run" \
  "| bfloat16 | 64 | yes | 512 | 32×32/8 | forward | 420.0 | – | 400.0 | 1.05 | 2.0e-03 | – |" \
  "| bfloat16 | 64 | no | 512 | 32×32 | backward | 300.0 | 285.7 | 272.7 | – | – | – |" \
  "Deterministic backwards have 0.950 of the others' speed as a geometric mean, and at least 0.905." \
  "| bfloat16 | 64 | yes | 512 | 32×16 | 1.250 | 1.300 | 1.040 | 0.100 |"; do
  grep -qF -- "$line" "$page" || die "expected '$line' in: $(cat "$page")"
done
echo "one more line" >>"$page"
expect 1 "some-gpu.md does not say what some-gpu.json does"
record 0123456789abcdef 0
expect 1 "some-gpu.json: kernels/ or src/cuda/ have changed since it was made: run script/gpu-record --only cuda,memcheck,training,figures"
record "$sources" 3
expect 1 "some-gpu.json: cuda failed"
echo '{' >"$scratch/some-gpu.json"
expect 1 "some-gpu.json cannot be read"
say "ok"
