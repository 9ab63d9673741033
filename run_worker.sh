#!/usr/bin/env bash
# Starts the worker. On a bare machine it first makes .venv/ and installs into it; in the image, where MUSETALK_PYTHON
# names the interpreter, it just starts. Works from any directory and may be run again after a restart.
#   WORKER_PORT=8000 ./run_worker.sh
#   ./run_worker.sh --demo      starts it, has it make the demo video, prints where that is, ends
# In queue mode, where Salad's binary is found, it is started beside the server once /hc says ready, and both end
# together; the server first, because the binary drops the running job on SIGTERM.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

say() { printf '{"severity": "info", "message": "run_worker: %s"}\n' "$*"; }

if [ -n "${MUSETALK_PYTHON:-}" ]; then
  python="$MUSETALK_PYTHON"
else
  bash setup_env.sh runtime
  python="$PWD/.venv/bin/python"
fi

if [ "${1:-}" = "--demo" ]; then
  exec "$python" -m demo.show
fi

# The same reading of environment and .env as the server's; wrong settings end the start here, with their names.
facts="$("$python" -m worker.config)"
fact() { sed -n "s/^$1=//p" <<<"$facts"; }
mode="$(fact mode)"
port="$(fact port)"
queue_worker="$(command -v "$(fact queue_worker)" || true)"

if [ "$mode" != queue ] || [ -z "$queue_worker" ]; then
  [ "$mode" = queue ] && say "Salad's queue binary is not here: jobs are taken at /generate only"
  # exec: the server gets the signals itself; a shell as the first process of a container would swallow SIGTERM.
  exec "$python" -m gunicorn --config gunicorn.conf.py "$@"
fi

server=""
binary=""
stopping=""

alive() { [ -n "$1" ] && kill -0 "$1" 2>/dev/null; }

# A second signal is passed on as well: the server then aborts.
# shellcheck disable=SC2329  # the trap calls it
on_signal() {
  stopping=1
  if alive "$server"; then kill -TERM "$server" 2>/dev/null || true; fi
}
trap on_signal TERM INT

"$python" -m gunicorn --config gunicorn.conf.py "$@" &
server=$!

# `wait` returns when a trapped signal comes, so it is asked again until the process is gone.
wait_for() {
  local status=0
  while alive "$1"; do wait "$1" && status=0 || status=$?; done
  wait "$1" 2>/dev/null && status=0 || status=$?
  [ "$status" = 127 ] && status=0
  return "$status"
}

is_ready() {
  "$python" - "$port" <<'PYTHON' 2>/dev/null
import sys, urllib.request
opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
sys.exit(opener.open(f"http://localhost:{sys.argv[1]}/hc", timeout=5).status != 200)
PYTHON
}

while alive "$server" && [ -z "$stopping" ] && ! is_ready; do
  sleep 1 &
  wait $! || true
done

if alive "$server" && [ -z "$stopping" ]; then
  say "ready; starting Salad's queue binary"
  "$queue_worker" &
  binary=$!
  # Whichever ends first.
  while [ -z "$stopping" ] && alive "$server" && alive "$binary"; do wait -n "$server" "$binary" || true; done
fi

status=0
if [ -z "$stopping" ] && alive "$server"; then
  say "Salad's queue binary has ended; stopping the server"
  kill -TERM "$server" 2>/dev/null || true
  status=1
fi
wait_for "$server" || status=$?
if alive "$binary"; then
  kill -TERM "$binary" 2>/dev/null || true
  wait_for "$binary" || true
fi
exit "$status"
