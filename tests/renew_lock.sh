#!/usr/bin/env bash
# Renew requirements-dev.txt, the lock of development and image, from requirements.txt and requirements-dev.in.
#   tests/renew_lock.sh             keep the pins that still fit, add what is new
#   tests/renew_lock.sh --upgrade   choose the newest versions
# uv resolves for Python 3.10 to 3.13 at once. torch is left out: its CUDA builds pin gigabytes of packages of their own.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
lock=requirements-dev.txt
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT

python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check uv
grep -v '^torch>=' requirements.txt >"$work/runtime.in"
# uv keeps the pins that it finds in the output file.
cp "$lock" "$work/lock.txt"
"$work/venv/bin/uv" pip compile --quiet --universal --python-version 3.10 --no-header --no-annotate \
  --no-emit-index-url "$@" --output-file "$work/lock.txt" "$work/runtime.in" requirements-dev.in
{
  grep '^#' "$lock"
  cat "$work/lock.txt"
} >"$work/new.txt"
cat "$work/new.txt" >"$lock"
