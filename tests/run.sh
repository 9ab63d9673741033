#!/usr/bin/env bash
# The one test command: makes its own environment from nothing, then runs lint, types and tests.
#   tests/run.sh                everything
#   tests/run.sh ARGS...        pytest with these arguments only
#   tests/run.sh --setup-only   prepare .venv/ and stop
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash setup_env.sh dev
[ "${1:-}" = "--setup-only" ] && exit 0

# The playground is tested in a real browser; without root those tests are skipped, with the reason.
if ! command -v chromium >/dev/null 2>&1 && [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null 2>&1; then
  printf 'setup: installing chromium for the tests\n' >&2
  { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends \
    chromium chromium-driver; } >/dev/null 2>&1 || printf 'setup: chromium could not be installed\n' >&2
fi

export PATH="$PWD/.venv/bin:$PATH"
# Two threads: small tensors spin on a busy machine, and a newcomer's laptop stays usable.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-2}"
if [ "$#" -gt 0 ]; then
  exec python -m pytest "$@"
fi
step() { printf '\n== %s\n' "$*"; }
step "ruff"; ruff check . && ruff format --check .
# Each Python gets another NumPy, with other annotations, and what is right of one is wrong of the next.
if python -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))'; then
  step "mypy"; mypy
else
  step "mypy: only with Python 3.11"
fi
# Keys, tokens and addresses with a login; what only looks like one is marked in its line.
if git rev-parse --is-inside-work-tree >/dev/null 2>&1; then
  step "secrets"; git ls-files -z | xargs -0 detect-secrets-hook
fi
step "shellcheck"; shellcheck ./*.sh tests/*.sh .ci/run
if [ -f Dockerfile.worker ]; then
  step "hadolint"; hadolint Dockerfile.worker
fi
# One process a core, with one thread each: threads of several processes on one core mostly wait for each other.
export OMP_NUM_THREADS=1
step "pytest"; exec python -m pytest -q --durations=15 -n 2 --dist loadfile --no-loadscope-reorder
