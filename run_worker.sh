#!/usr/bin/env bash
# Start the worker, from any directory. On a bare machine this first makes .venv/ and installs into it. In the image
# MUSETALK_PYTHON names the interpreter and nothing is installed.
#   WORKER_PORT=8000 ./run_worker.sh
#   ./run_worker.sh --demo      start, make the demo video, print its path, end
#   ./run_worker.sh --help
# With WORKER_GPUS it starts a worker for each card, and a summary of them on WORKER_PORT (docs/operations.md).
# In queue mode it also starts Salad's queue binary, if it is installed, once /hc reports ready. When one of the two ends,
# the other is stopped. worker/cli/start.py has the order in which SIGTERM stops them, so that no job is refused.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

usage="usage: run_worker.sh [--help] [--demo] [--config FILE]"

# Before anything is installed.
for argument in "$@"; do
  if [ "$argument" = "-h" ] || [ "$argument" = "--help" ]; then
    cat <<END
$usage

Start the worker on WORKER_PORT (8000), from the settings in the environment and .env; with WORKER_GPUS a worker for each
card, on the ports behind it.

  -h, --help     show this text and end
  --demo         start, make the demo video, print its path, end
  --config FILE  another configuration of Gunicorn than gunicorn.conf.py

Settings: docs/configuration.md. Page for a quick test: python app.py
END
    exit 0
  fi
done

case "${1:-}:$#" in
  :0 | --demo:1 | --config:2 | --config=?*:1) ;;
  *)
    printf '%s\nrun_worker.sh: error: wrong arguments: %s\n' "$usage" "$*" >&2
    exit 2
    ;;
esac

if [ -n "${MUSETALK_PYTHON:-}" ]; then
  python="$MUSETALK_PYTHON"
else
  bash setup_env.sh runtime
  python="$PWD/.venv/bin/python"
fi

if [ "${1:-}" = "--demo" ]; then
  exec "$python" -m demo.show
fi

# exec: the program itself receives the signals. A shell as the first process of a container would swallow SIGTERM.
exec "$python" -m worker.cli.start "$@"
