#!/usr/bin/env bash
# Does script/kernel-report --check see what it should? On a made-up table and compiler's log.

. "$(dirname "${BASH_SOURCE[0]}")/../script/support.sh"

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
mkdir -p "$scratch"/{build,kernels/mma}
cat >"$scratch/kernels/mma/table.h" <<'EOT'
/* A comment with X(1, 2, 3, 4, 5, 6, 7) in it. */
#define CUFLASH_MMA_SMEM(dim, m) ((dim) * (m))
#define CUFLASH_MMA_BACKWARD(X) \
    X(64, 128, 64, 2, 256, 1, CUFLASH_MMA_SMEM(64, 128)) \
    X(128, 64, 64, 1, 128, 2, CUFLASH_MMA_SMEM(128, 64))
EOT
compiled() { # compiled NAME ARCH REGISTERS STACK SPILLS
  cat <<EOT
ptxas info    : Compiling entry function '$1' for '$2'
ptxas info    : Function properties for $1
    $4 bytes stack frame, $5 bytes spill stores, $5 bytes spill loads
ptxas info    : Used $3 registers, used 1 barriers, 96 bytes smem, 744 bytes cmem[0]
EOT
}
for arch in sm_80 sm_90; do
  for dtype in f16 bf16; do
    for tail in d64_128x64 d128_64x64; do
      compiled cuflash_mma_backward_${dtype}_$tail $arch 200 0 0
      compiled cuflash_mma_finish_${dtype}_$tail $arch 30 0 0
    done
  done
done >"$scratch/good"
expect() { # expect STATUS TEXT: what --check does, and says
  local output status=0
  output=$("$root/script/kernel-report" "$scratch/build" --sources "$scratch/kernels" --check 2>&1) || status=$?
  [ "$status" = "$1" ] || die "expected exit code $1, got $status: $output"
  grep -qE -- "$2" <<<"$output" || die "expected '$2' in: $output"
}
log=$scratch/build/mma_backward.log

expect 77 "holds no compiled kernels"
cp "$scratch/good" "$log"
expect 0 "16 kernels, as they should be"
compiled cuflash_gone_forward_f32_d64_64x64 sm_80 255 8 8 >"$(dirname "$log")/gone_forward.log" # of sources that are no more
expect 0 "16 kernels, as they should be"
expect 0 "^cuflash_mma_backward_bf16_d64_128x64 +sm_90 +256 +200 +255 +0 +0 +96$"
sed '/d128_64x64/,$d' "$scratch/good" >"$log"
expect 1 "cuflash_mma_finish_f16_d128_64x64 is in the launch table, but was not compiled for sm_80"
{ cat "$scratch/good"; compiled cuflash_mma_other sm_80 40 8 16; } >"$log"
expect 1 "cuflash_mma_other on sm_80: 8 bytes of stack, 16 of spills"
echo "cuflash_mma_oth* sm_80 16 a table of its own" >"$scratch/kernels/spills.txt"
expect 0 "17 kernels, as they should be"
echo "cuflash_mma_oth* sm_90 16 another architecture" >"$scratch/kernels/spills.txt"
expect 1 "1 complaints"
sed 's/ 256, 1, CUFLASH/ 128, 4, CUFLASH/' -i "$scratch/kernels/mma/table.h"
cp "$scratch/good" "$log"
expect 1 "200 registers, but 4 x 128 threads can have 128 each"
say "ok"
