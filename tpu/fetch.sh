#!/usr/bin/env bash
# Brings a run home from the bucket, the report and the exported student too, but no checkpoints.
#   tpu/fetch.sh NAME [--dry-run]
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"
recall "$@"
[[ -n $bucket ]] || fail "$name: was not launched from here; give --bucket"
step mkdir -p "runs/$name"
step gcloud storage rsync "$bucket/$name" "runs/$name" --recursive --exclude='stages/.*/checkpoints/.*'
