#!/bin/sh
# Runs a Python script with the first Python that has NumPy; 77 where there is none.
python=$("$(dirname "$0")/../../script/numpy-python" 2>/dev/null) || {
  echo "skipped: no Python with NumPy was found"
  exit 77
}
exec "$python" "$@"
