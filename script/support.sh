# Shared by the scripts in this folder: sourced, not run.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
name=$(basename "$0")

say() { printf '%s: %s\n' "$name" "$*"; }
die() { printf '%s: %s\n' "$name" "$*" >&2; exit 1; }

# The comment at the head of the running script is its help.
help() { sed -n '2,/^$/s/^# \{0,1\}//p' "$0"; }
