#!/usr/bin/env bash
# What the cloud says of a run's TPU, and each worker of the run: "running", or how it ended.
#   tpu/status.sh NAME [--dry-run]
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"
recall "$@"
queued describe "$name"
on_workers 'cat gadjax/state && tail -n 3 gadjax/run.log'
