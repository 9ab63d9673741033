#!/usr/bin/env bash
# Makes .venv/ at the project's root and installs into it; shared by run_worker.sh and tests/run.sh.
#   setup_env.sh runtime|dev
# TORCH_SPEC chooses the torch build (default torch==2.13.0); PYTHON chooses the interpreter.
# Prints nothing but what is being done; safe to run twice and from two shells at once.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
kind="${1:-runtime}"
torch_spec="${TORCH_SPEC:-torch==2.13.0}"
venv="$root/.venv"

say() { printf 'setup: %s\n' "$*" >&2; }

find_python() {
  local candidate
  for candidate in ${PYTHON:-} python3 python3.12 python3.11 python3.13 python3.10; do
    if command -v "$candidate" >/dev/null 2>&1 &&
      "$candidate" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null; then
      command -v "$candidate"
      return 0
    fi
  done
  return 1
}

install_system_packages() {
  if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null 2>&1; then
    say "installing python3 and its venv module"
    apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends python3 python3-venv >&2
  fi
}

make_venv() {
  local python
  python="$(find_python)" || { install_system_packages; python="$(find_python)"; } || {
    say "no Python 3.10 to 3.13 found; install one (Debian, Ubuntu: apt-get install python3-venv) or set PYTHON"
    exit 1
  }
  say "making .venv with $("$python" --version)"
  rm -rf "$venv"
  if ! "$python" -m venv "$venv" 2>/dev/null; then
    # Debian splits the venv module off; without it a half-made folder is left behind.
    rm -rf "$venv"
    install_system_packages
    "$python" -m venv "$venv"
  fi
}

# One at a time: a test run and a worker may be started together on a fresh checkout.
if command -v flock >/dev/null 2>&1; then
  exec 9>"$root/.venv.lock"
  flock 9
fi

wanted="$(cat "$root/requirements.txt" "$root/requirements-dev.txt" "$root/requirements-nodeps.txt" | cksum | cut -d' ' -f1)-${torch_spec//[^A-Za-z0-9.=+]/_}"
stamp="$venv/.installed-$kind"
if [ -x "$venv/bin/python" ] && "$venv/bin/python" -c '' 2>/dev/null; then
  for done_stamp in "$stamp" "$venv/.installed-dev"; do
    [ "$(cat "$done_stamp" 2>/dev/null)" = "$wanted" ] && exit 0
  done
else
  make_venv
fi

# The lock pins one torch; TORCH_SPEC may say another, so torch is taken out of the lock and installed by its own line.
lock="$venv/requirements-locked.txt"
grep -v '^torch==' "$root/requirements-dev.txt" >"$lock"
say "installing ($torch_spec, $kind); the first time takes a few minutes"
# TORCH_SPEC may carry options (an index, for example): word splitting is wanted.
# shellcheck disable=SC2086
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check $torch_spec
if [ "$kind" = dev ]; then
  "$venv/bin/python" -m pip install --quiet --disable-pip-version-check -r "$lock"
else
  "$venv/bin/python" -m pip install --quiet --disable-pip-version-check -r "$root/requirements.txt" -c "$lock"
fi
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps -r "$root/requirements-nodeps.txt"
printf '%s\n' "$wanted" >"$stamp"
say "ready"
