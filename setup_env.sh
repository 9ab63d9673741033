#!/usr/bin/env bash
# Make .venv/ at the project's root and install into it; run_worker.sh and tests/run.sh call this.
#   setup_env.sh runtime|dev
# TORCH_SPEC names another torch than requirements-torch.txt; PYTHON names the interpreter, and .venv/ is made again if it
# has another version of Python.
# Safe to run twice and from two shells at once.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
kind="${1:-runtime}"
cd "$root"
torch_spec="${TORCH_SPEC:--r requirements-torch.txt}"
venv="$root/.venv"

say() { printf 'setup: %s\n' "$*" >&2; }

install() { "$venv/bin/python" -m pip install --quiet --disable-pip-version-check "$@"; }

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
    # On Debian the venv module is a package of its own. Without it, venv leaves half a folder behind.
    rm -rf "$venv"
    install_system_packages
    "$python" -m venv "$venv"
  fi
}

version_of() { "$1" -c 'import sys; print(sys.version_info[:2])' 2>/dev/null; }

# Without PYTHON any working .venv/ will do: a system's newer python3 is no reason to install everything again.
venv_fits() {
  local version
  version="$(version_of "$venv/bin/python")" || return 1
  [ -z "${PYTHON:-}" ] || [ "$version" = "$(version_of "$(find_python)")" ]
}

# One at a time: a test run and a worker may start together on a fresh checkout.
if command -v flock >/dev/null 2>&1; then
  exec 9>"$root/.venv.lock"
  flock 9
fi

wanted="$(cat requirements*.txt | cksum | cut -d' ' -f1)-${torch_spec//[^A-Za-z0-9.=+]/_}"
stamp="$venv/.installed-$kind"
if venv_fits; then
  for done_stamp in "$stamp" "$venv/.installed-dev"; do
    [ "$(cat "$done_stamp" 2>/dev/null)" = "$wanted" ] && exit 0
  done
else
  make_venv
fi

say "installing ($kind, ${TORCH_SPEC:-torch of requirements-torch.txt}); the first time takes a few minutes"
# TORCH_SPEC may contain options, such as another index, so the shell splits it into words.
# shellcheck disable=SC2086
install $torch_spec
if [ "$kind" = dev ]; then
  install -r requirements-dev.txt
else
  install -r requirements.txt -c requirements-dev.txt
fi
install --no-deps -r requirements-nodeps.txt
printf '%s\n' "$wanted" >"$stamp"
say "ready"
