#!/usr/bin/env bash
# Ends the run on all workers; the TPU stays and costs: tpu/launch.sh goes on with the run, tpu/teardown.sh deletes the TPU.
#   tpu/stop.sh NAME [--dry-run]
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"
recall "$@"
on_workers 'sudo systemctl disable --now gadjax'
