#!/usr/bin/env bash
# Does bench/attention.lua print and write figures, on the CPU and on a CUDA device (the stand-in for the driver, whose kernels take
# no time that means anything)? spec/bench_test.sh BUILD_FOLDER KERNELS; KERNELS is 0 where the build has none.

. "$(dirname "${BASH_SOURCE[0]}")/../script/support.sh"

export CUFLASH_LIB=$1/libcuflash.so LUA_PATH="$root/lua/?.lua;$root/lua/?/init.lua;;"
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
bench() { luajit "$root/bench/attention.lua" "$1/bench" "${@:2}" 2>&1; }
contains() { grep -qE -- "$2" <<<"$1" || die "expected '$2' in: $1"; }

output=$(bench "$1" --dim 32,40 --seq 64 --repeats 1 --threads 1 --json "$scratch/cpu.json")
contains "$output" "^1 thread$"
contains "$output" "^float32 +40 +64 +2 +yes +[0-9.]+ +[0-9]+% +[0-9.]+ +[0-9]+% +[1-9][0-9.]*$"
[ "$(grep -c '"forward"' "$scratch/cpu.json")" = 4 ] || die "expected 4 rows in: $(cat "$scratch/cpu.json")"

output=$(bench "$1" --dim 32 --seq 64 --heads 3 --repeats 1 --threads 1 --scaling 2 --json "$scratch/scaling.json")
contains "$output" "^multiply-adds between registers +[1-9][0-9.]* +[1-9][0-9.]* +[1-9][0-9.]* +[0-9]+%$"
contains "$output" "^float32 +32 +64 +3 +yes +backward +[1-9][0-9.]* +[1-9][0-9.]* +[1-9][0-9.]* +[0-9]+%$"
[ "$(grep -c '^float32 ' <<<"$output")" = 6 ] || die "expected 6 rows in: $output"
[ "$(grep -c '"pass"' "$scratch/scaling.json")" = 4 ] || die "expected 4 rows in: $(cat "$scratch/scaling.json")"
output=$(bench "$1" --dim 32 --seq 64 --repeats 1 --threads 1 --scaling 9999) && die "--scaling 9999 is an error, got: $output"
contains "$output" "^bench: --scaling: expected 1 to [0-9]+, the cores there are, got 9999$"

output=$(bench "$1" --dim 257 --device cuda) && die "--dim 257 is an error on a CUDA device, got: $output"
contains "$output" "^bench: --dim: expected 1 to 256, got 257$"
if [ "$2" = 0 ]; then
  say "ok; this build has no CUDA kernels"
  exit
fi
output=$(LD_LIBRARY_PATH=$1/spec bench "$1" --device cuda --dim 64 --seq 256 --heads 4 --kv-heads 2 --repeats 2 --dtype float32,float16)
contains "$output" "^Fake GPU 0, sm_90, driver for CUDA "
contains "$output" "^float16 +64 +256 +4 +yes +[0-9.]+ +[0-9.]+$"
[ "$(grep -cE '^float(32|16) ' <<<"$output")" = 4 ] || die "expected 4 rows in: $output"
say "ok"
