# A run's attempts: which of them are counted, and how the last one ends. Sourced by watch.sh.
# shellcheck shell=bash disable=SC2154 # they are set in common.sh
pause=${GADJAX_TPU_PAUSE:-60} # seconds between looks
lost=0 before=''              # attempts since the bucket had what it had `before`

tell() { printf '%s %s: %s\n' "$(date '+%F %T')" "$name" "$1"; }

clear_away() { # until nothing is left that costs
  local left
  until delete || { left=$(requested) && [[ -z $left ]]; }; do sleep "$pause"; done
}

finish() { # STATUS MESSAGE: all that matters is in the bucket, and chips cost money
  tell "$2"
  clear_away
  exit "$1"
}

lose() { # MESSAGE: an attempt that chips were paid for; so many in a row that bring nothing are the last
  local now
  now=$(kept)
  [[ -z $now || $now == "$before" ]] || lost=0 before=$now
  lost=$((lost + 1))
  tell "$1 ($lost of $tries)"
  ((lost < tries)) || finish 1 "gives up and deletes the TPU: $tries attempts brought no checkpoint; what logs there are is in runs/.tpu/$name"
}

again() { # a TPU that is no more is in the way of the next
  [[ ! -d runs/.tpu/$name/logs ]] || mv "runs/.tpu/$name/logs" "runs/.tpu/$name/logs-$(date +%s)"
  clear_away
}
