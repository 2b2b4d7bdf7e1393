#!/usr/bin/env bash
# Deletes a run's TPU, whatever it is doing, and ends its watch. The bucket stays: tpu/launch.sh with the same name goes on from it.
#   tpu/teardown.sh NAME [--dry-run]
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"
recall "$@"
# First, or a watch orders another; where the disk is full, the TPU is deleted all the same.
[[ -n $dry_run ]] || { mkdir -p "runs/.tpu/$name" && echo over >"runs/.tpu/$name/watch"; } || true
queued delete "$name" --force --quiet
[[ -z $bucket ]] || echo "what it left in the bucket goes with: gcloud storage rm --recursive $bucket/$name"
