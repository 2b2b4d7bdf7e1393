#!/usr/bin/env bash
# Gathers the workers' logs into runs/.tpu/NAME/logs/all.log, each line after its worker's name, and shows the last ones.
#   tpu/logs.sh NAME [--dry-run]
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"
recall "$@"
log=runs/.tpu/$name/logs/all.log
# shellcheck disable=SC2016 # for the shells there
gather() { on_workers 'tail -n 2000 gadjax/run.log | sed "s/^/$(hostname): /"'; }

step mkdir -p "${log%/*}"
if [[ -n $dry_run ]]; then
  gather
  exit
fi
gather | sort --stable --field-separator=: --key=1,1 >"$log.new" || [[ -s $log.new ]] || fail "$name: no worker answers"
mv "$log.new" "$log" # without a worker that does not answer
tail -n 20 "$log"
