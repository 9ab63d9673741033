#!/usr/bin/env bash
# The one test command: makes its own environment from nothing, then runs lint, types and tests.
#   tests/run.sh                everything
#   tests/run.sh ARGS...        pytest with these arguments only
#   tests/run.sh --setup-only   prepare .venv/ and stop
# PYTHON=python3.10 tests/run.sh runs with the versions of the image.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash setup_env.sh dev
[ "${1:-}" = "--setup-only" ] && exit 0

# The page is tested in a real browser, the GPU path on a pretended card whose guard is compiled. Where a program is
# missing, those tests are skipped and their reason names it.
find_missing() {
  missing=()
  command -v chromium >/dev/null 2>&1 || missing+=(chromium)
  command -v chromedriver >/dev/null 2>&1 || missing+=(chromium-driver)
  command -v g++ >/dev/null 2>&1 || command -v clang++ >/dev/null 2>&1 || missing+=(g++)
}
find_missing
if [ "${#missing[@]}" -gt 0 ] && [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null 2>&1; then
  printf 'setup: installing %s for the tests\n' "${missing[*]}" >&2
  { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends \
    "${missing[@]}"; } >/dev/null 2>&1 || true
  find_missing
  [ "${#missing[@]}" = 0 ] || printf 'setup: %s could not be installed\n' "${missing[*]}" >&2
fi

export PATH="$PWD/.venv/bin:$PATH"
# Two threads: small tensors spin on a busy machine, and a newcomer's laptop stays usable.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-2}"
if [ "$#" -gt 0 ]; then
  exec python -m pytest "$@"
fi
step() { printf '\n== %s\n' "$*"; }
step "ruff"; ruff check . && ruff format --check .
step "language"; python -m tests.language
# The packages of each Python have other annotations; the code is right under those of 3.10 and 3.11.
if python -c 'import sys; sys.exit(sys.version_info[:2] not in ((3, 10), (3, 11)))'; then
  step "mypy"; mypy
else
  step "mypy: only with Python 3.10 and 3.11"
fi
# Keys, tokens and addresses with a login; a line that only looks like one is marked there.
if git rev-parse --is-inside-work-tree >/dev/null 2>&1; then
  step "secrets"; git ls-files -z | xargs -0 detect-secrets-hook
fi
step "shellcheck"; shellcheck ./*.sh tests/*.sh .ci/run
step "hadolint"; hadolint Dockerfile.worker
# One thread each: threads of several processes on one core mostly wait for each other. Four processes keep two cores
# busy, because many tests wait for a server, a clock or a disk.
export OMP_NUM_THREADS=1
step "pytest"
python -m pytest -q --durations=15 -n 4 --dist loadfile --no-loadscope-reorder --cov --cov-report=
printf 'coverage by unit and contract tests, branches included: %s %%\n' "$(coverage report --format=total)"
