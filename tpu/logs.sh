#!/usr/bin/env bash
# Gathers the workers' logs into runs/.tpu/NAME/logs, one file each, and shows the end of the first worker's.
#   tpu/logs.sh NAME [--dry-run]
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"
recall "$@"
step mkdir -p "runs/.tpu/$name/logs"
vm ssh "$name" --worker=all --command='tail -n 2000 gadjax/run.log' --output-directory="runs/.tpu/$name/logs" --quiet
vm ssh "$name" --worker=0 --command='tail -n 20 gadjax/run.log' --quiet
