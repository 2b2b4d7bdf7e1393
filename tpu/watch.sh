#!/usr/bin/env bash
# Sees a run through: asks for the TPU, sets its workers up, and again after every preemption; when the run has ended, deletes it.
#   tpu/watch.sh NAME [--tries N] [--dry-run]
# May be interrupted (the run goes on) and started again where the run was launched.
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"
recall "$@"
[[ -n $dry_run || -f runs/.tpu/$name/code.tar ]] || fail "$name: was not launched from here, and there is nothing to set workers up with; launch it"
image >/dev/null
. tpu/attempts.sh
restarts=0 # how often the run started again

see() { # what the workers of a TPU that is there are doing
  local said now
  said=$(progress) || { silent "the workers do not answer" && return; }
  if [[ -n $deploy ]] || grep -q '^new ' <<<"$said"; then
    tell "sets the workers up"
    if set_up; then deploy=''; else lose "the set-up failed"; fi
    return
  fi
  tpu/logs.sh "$name" >/dev/null || { silent "the workers do not answer" && return; }
  unanswered=0
  ! grep -q '^exit-code 2 ' <<<"$said" || finish 2 "the run cannot go on; its message is in runs/.tpu/$name/logs/all.log"
  grep -qv '^success 0 ' <<<"$said" || finish 0 "done; tpu/fetch.sh $name brings the report here"
  now=$(grep -o '[0-9]*$' <<<"$said" | sort -n | tail -n 1 || true)
  ((${now:-0} <= restarts)) || lose "the run failed and was started again"
  restarts=${now:-0}
}

look() {
  local found
  give_way
  found=$(requested) || { tell "the cloud does not answer" && return; }
  [[ $found != ACTIVE ]] || found=ACTIVE-$(node || true)
  case $found in
    '') give_way && tell "asks for a $type" && { create || [[ -z $deploy ]] || fail "$name: the cloud refused the request, as it says above"; } ;;
    ACTIVE-READY) see ;;
    SUSPENDED | ACTIVE-PREEMPTED | ACTIVE-TERMINATED) lose "was preempted" && again ;;
    ACTIVE-*) silent "the TPU is not ready" ;;
    FAILED)
      [[ -z $deploy ]] || finish 1 "the cloud gave the request up"
      again
      ;;
  esac
}

if [[ -n $dry_run ]]; then # once through, from nothing to the end
  create && requested && node && set_up && progress && kept && tpu/logs.sh "$name" "${@:2}" && delete
  exit
fi
echo "$me" >"runs/.tpu/$name/watch"
while true; do
  look
  sleep "$pause"
done
