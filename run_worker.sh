#!/usr/bin/env bash
# Starts the worker. On a bare machine it first makes .venv/ and installs into it; in the image, where MUSETALK_PYTHON
# names the interpreter, it just starts. Works from any directory and may be run again after a restart.
#   WORKER_PORT=8000 ./run_worker.sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
if [ -n "${MUSETALK_PYTHON:-}" ]; then
  python="$MUSETALK_PYTHON"
else
  bash setup_env.sh runtime
  python="$PWD/.venv/bin/python"
fi
# exec: the server gets the signals itself; a shell as the first process of a container would swallow SIGTERM.
exec "$python" -m gunicorn --config gunicorn.conf.py "$@"
