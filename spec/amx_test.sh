#!/usr/bin/env bash
# Are the kernels for AMX right, on a machine without it? Its tile instructions are functions here, by AVX512-BF16 (c/amx_tiles.h);
# where that is missing the test is skipped. Where there is AMX, the specs of it run as well. spec/amx_test.sh BUILD_FOLDER

. "$(dirname "${BASH_SOURCE[0]}")/../script/support.sh"

grep -qw avx512_bf16 /proc/cpuinfo 2>/dev/null || { echo "skipped: this CPU has no AVX512-BF16"; exit 77; }
build=$1/amx
cmake -S "$root" -B "$build" -G Ninja -DCMAKE_BUILD_TYPE=Release -DCUFLASH_CUDA=OFF -DCUFLASH_WERROR=ON \
  -DCMAKE_C_FLAGS="-DCUFLASH_AMX_TILES -include $root/spec/c/amx_tiles.h" >"$1/amx.log"
ninja -C "$build" libcuflash.so test_attention test_threads >"$1/amx.log" || { cat "$1/amx.log"; die "it does not compile"; }
export CUFLASH_LIB=$build/libcuflash.so CUFLASH_CPU_ISA=amx
"$root/script/busted" "$root"/spec/attention_*_spec.lua # exits with 77 where the compiler has no AMX
for program in test_attention test_threads; do
  "$build/spec/$program" || die "$program failed"
done
