#!/usr/bin/env bash
# Does a bundle run where there is nothing but a shell and glibc? spec/bundle_test.sh BUILD_FOLDER
#
# It is unpacked into a root of its own where this machine lets us make one (as root, or by user namespaces); elsewhere it
# runs with an empty environment, and the loader tells which libraries it took. Exit code 77: skipped.

. "$(dirname "${BASH_SOURCE[0]}")/../script/support.sh"

build=$1
[ "$(uname -sm)" = "Linux x86_64" ] || { say "skipped: bundles are for x86-64 Linux"; exit 77; }
scratch=$(mktemp -d)
trap 'chmod -R u+w "$scratch"; rm -rf "$scratch"' EXIT
"$root/script/bundle" --build "$build" --output "$scratch/bundle.tar.gz"

expect() { # expect WHAT TEXT: TEXT is a line of $output
  grep -qxF -- "$2" <<<"$output" || die "$1: expected the line '$2' in: $output"
}
licensed() { # a licence for every package that is named
  local package rest
  while read -r package rest; do
    [ -s "$1/licences/$package" ] || die "there is no licence of $package ($rest)"
  done < <(sed 1d "$1/licences/packages.txt")
}

# ---- A root with a shell, glibc and the bundle, which cannot be written to ---------------------------

jail=$scratch/jail
mkdir -p "$jail"/{bin,dev,proc,tmp,lib64,elsewhere}
: >"$jail/dev/null"
tar -C "$jail" -xzf "$scratch/bundle.tar.gz"
bundle=$(basename "$jail"/cuflash-*)
cp -L "$(command -v dash || command -v sh)" "$jail/bin/sh"
glibc=$(dirname "$(ldd "$jail/bin/sh" | awk '$1 == "libc.so.6" { print $3 }')")
mkdir -p "$jail$glibc"
for library in libc libm libdl librt libpthread; do
  cp -L "$glibc/$library".so.[0-9] "$jail$glibc"
done
cp -L /lib64/ld-linux-x86-64.so.2 "$jail/lib64"
licensed "$jail/$bundle"
chmod -R a-w "$jail/$bundle"

# /proc is where the loader looks up what $ORIGIN is. The mount is gone with its namespace.
enter='mount --rbind /proc "$0/proc" && exec chroot "$0" /bin/sh -c "$1"'
inside=''
for way in "unshare -m" "unshare -rm"; do
  if $way sh -c "$enter" "$jail" 'exit 0' 2>/dev/null; then
    inside=$way
    break
  fi
done
if [ -n "$inside" ]; then
  run() { output=$(env -i PATH="$PATH" $inside sh -c "$enter" "$jail" "unset PATH; cd /elsewhere && $1" 2>&1) || die "'$1' failed: $output"; }
  at=/$bundle
else
  say "no root of our own can be made here: looking at what the loader takes instead"
  run() {
    output=$(cd "$jail/elsewhere" && env -i LD_DEBUG=libs LD_DEBUG_OUTPUT="$scratch/loader" /bin/sh -c "$1" 2>&1) || die "'$1' failed: $output"
    local stray
    stray=$(sed -n 's/.*calling init: //p' "$scratch"/loader.* | sort -u | grep -v "^$jail/" |
      grep -vE '/(ld-linux[^/]*|lib(c|m|dl|rt|pthread)\.so\.[0-9])$' || true)
    [ -z "$stray" ] || die "'$1' took libraries of the system: $stray"
  }
  at=$jail/$bundle
fi

run "$at/luajit -e 'local cf = require \"cuflash\" q = cf.ones {1, 1, 4, 8} print(cf.attention(q, q, q):sum())'"
expect luajit 32
echo "cf.arange(3):sum() / 2" >"$jail/elsewhere/input"
run "$at/repl <input"
expect repl 3
run "$at/busted -o TAP spec/tensor_spec.lua"
grep -qE '^1\.\.[1-9]' <<<"$output" || die "busted: no tests were counted: $output"
run "$at/bench --dim 32 --seq 64 --repeats 1 --threads 1"
grep -qE '^float32 +32 +64' <<<"$output" || die "bench: no figures: $output"
run "$at/test --only 'c%.test_[sterc]'"
tail -1 <<<"$output" | grep -qE '^tests on cpu: [1-9][0-9]* passed, 0 failed, [0-9]+ skipped$' || die "test: $output"
run "$at/test --only 'spec%.[ct]'"
tail -1 <<<"$output" | grep -qE '^tests on cpu: [1-9][0-9]* passed, 0 failed, [0-9]+ skipped$' || die "test: $output"
run "$at/test --only '^example.*i$'"
tail -1 <<<"$output" | grep -qE '^tests on cpu: 2 passed, 0 failed, 0 skipped$' || die "test: $output"
say "runs ${inside:+in a root of its own }from a folder that cannot be written to"
