#!/usr/bin/env bash
# Start the worker, from any directory. On a bare machine this first makes .venv/ and installs into it. In the image
# MUSETALK_PYTHON names the interpreter and nothing is installed.
#   WORKER_PORT=8000 ./run_worker.sh
#   ./run_worker.sh --demo      start, make the demo video, print its path, end
# In queue mode the script also starts Salad's queue binary, if it is installed, once /hc reports ready. When one of the
# two ends, the script stops the other. On SIGTERM it stops the server first, because the binary would drop the running job.
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

# The server's own reader of environment and .env. Wrong settings end the start here, with their names.
facts="$("$python" -m worker.config)"
fact() { sed -n "s/^$1=//p" <<<"$facts"; }
mode="$(fact mode)"
port="$(fact port)"
queue_worker="$(command -v "$(fact queue_worker)" || true)"

if [ "$mode" != queue ] || [ -z "$queue_worker" ]; then
  [ "$mode" = queue ] && say "Salad's queue binary not found; jobs arrive only at /generate"
  # exec: the server itself receives the signals. A shell as the first process of a container would swallow SIGTERM.
  exec "$python" -m gunicorn --config gunicorn.conf.py "$@"
fi

server=""
binary=""
stopping=""

alive() { [ -n "$1" ] && kill -0 "$1" 2>/dev/null; }

# The script passes on a second signal as well: the server then aborts.
# shellcheck disable=SC2329  # the trap calls it
on_signal() {
  stopping=1
  if alive "$server"; then kill -TERM "$server" 2>/dev/null || true; fi
}
trap on_signal TERM INT

"$python" -m gunicorn --config gunicorn.conf.py "$@" &
server=$!

# `wait` returns early when a trapped signal arrives, so the loop calls it until the process has ended.
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
