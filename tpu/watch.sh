#!/usr/bin/env bash
# Sees a run through: asks for the TPU, sets its workers up, and again after every preemption; when the run has ended, deletes it.
#   tpu/watch.sh NAME [--dry-run]
# May be interrupted (the run goes on) and started again where the run was launched.
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"
recall "$@"
pause=${GADJAX_TPU_PAUSE:-60} # seconds between looks

case $type in # the images that Cloud TPU's page "TPU software versions" names
  v5p-*) image=v2-alpha-tpuv5 ;;
  v5litepod-*) image=v2-alpha-tpuv5-lite ;;
  v6e-*) image=v2-alpha-tpuv6e ;;
  v[234]-*) image=tpu-ubuntu2204-base ;;
  *) fail "--type: ${type:-(none)} is not known; known are v4-8, v5litepod-8, v5p-8, v6e-8 and their larger kin" ;;
esac

tell() { printf '%s %s: %s\n' "$(date '+%F %T')" "$name" "$1"; }
create() { queued create "$name" --node-id="$name" --accelerator-type="$type" --runtime-version="$image" ${spot:+--spot} --quiet; }
delete() { queued delete "$name" --force --quiet; }
requested() { queued list --filter="name ~ /$name\$" --format='value(state.state)'; }
node() { vm describe "$name" --format='value(state)'; }
progress() { on_workers 'cat gadjax/state 2>/dev/null || echo new'; } # of each worker: "new", "running", "success 0", "exit-code 2"
set_up() {
  vm scp "runs/.tpu/$name/code.tar" "$name:" --worker=all --quiet &&
    on_workers 'mkdir -p gadjax && tar -xf code.tar -C gadjax && bash gadjax/tpu/worker.sh' && deploy=''
}

again() { # a TPU that was taken away is in the way of the next
  tell "was preempted"
  [[ ! -d runs/.tpu/$name/logs ]] || mv "runs/.tpu/$name/logs" "runs/.tpu/$name/logs-$(date +%s)"
  delete || true
}

finish() { # STATUS MESSAGE: all that matters is in the bucket, and chips cost money
  tell "$2"
  until delete; do sleep "$pause"; done
  exit "$1"
}

look() {
  local found ended
  found=$(requested) || { tell "the cloud does not answer" && return; }
  [[ $found != ACTIVE ]] || case $(node || true) in
    PREEMPTED | TERMINATED) found=SUSPENDED ;;
    READY) ;;
    *) found=waiting ;;
  esac
  case $found in
    '') tell "asks for a $type" && { create || [[ -z $deploy ]] || fail "$name: the cloud refused the request, as it says above"; } ;;
    SUSPENDED) again ;;
    FAILED) if [[ -n $deploy ]]; then finish 1 "the cloud gave the request up"; else again; fi ;;
    ACTIVE)
      ended=$(progress) || return 0
      if [[ -n $deploy ]] || grep -qx new <<<"$ended"; then
        tell "sets the workers up"
        set_up || tell "the set-up failed and is tried again"
        return
      fi
      tpu/logs.sh "$name" >/dev/null || true
      ! grep -qx 'exit-code 2' <<<"$ended" || finish 2 "the run cannot go on; its message is in runs/.tpu/$name/logs"
      grep -qvx 'success 0' <<<"$ended" || finish 0 "done; tpu/fetch.sh $name brings the report here"
      ;;
  esac
}

if [[ -n $dry_run ]]; then # once through, from nothing to the end
  create && requested && node && set_up && progress && tpu/logs.sh "$name" "${@:2}" && delete
  exit
fi
while true; do
  look
  sleep "$pause"
done
