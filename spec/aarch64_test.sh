#!/usr/bin/env bash
# Does the library compile for ARM, into NEON's multiply-adds, and is attention right there? By a cross compiler, under an emulator:
# script/setup --aarch64 installs both; without them the test is skipped. spec/aarch64_test.sh BUILD_FOLDER

. "$(dirname "${BASH_SOURCE[0]}")/../script/support.sh"

prefix=aarch64-linux-gnu
for program in $prefix-gcc $prefix-objdump qemu-aarch64; do
  command -v $program >/dev/null || { echo "skipped: there is no $program (script/setup --aarch64 installs it)"; exit 77; }
done
build=$1/aarch64
emulator=(qemu-aarch64 -L /usr/$prefix)
cmake -S "$root" -B "$build" -G Ninja -DCMAKE_BUILD_TYPE=Release -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 \
  -DCMAKE_C_COMPILER=$prefix-gcc -DCUFLASH_CUDA=OFF -DCUFLASH_WERROR=ON >"$1/aarch64.log"
ninja -C "$build" libcuflash.so test_attention test_threads test_element >"$1/aarch64.log" || { cat "$1/aarch64.log"; die "it does not compile"; }
count=$($prefix-objdump -d "$build/libcuflash.so" | grep -cE 'fmla\s+v[0-9]+\.4s' || true)
[ "$count" -gt 100 ] || die "expected NEON's multiply-adds in the library, found $count"
export CUFLASH_SPEC_NO_FORK=1 # the emulator ends with an assertion of its own where a forked child starts a thread
for program in test_attention test_threads test_element; do
  "${emulator[@]}" "$build/spec/$program" || die "$program failed"
done
say "ok, $count vector multiply-adds"
