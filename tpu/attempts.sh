# A run's attempts: which of them are counted, and how the last one ends. Sourced by watch.sh.
# shellcheck shell=bash disable=SC2154 # they are set in common.sh
pause=${GADJAX_TPU_PAUSE:-60} # seconds between looks
lost=0 unanswered=0 before='' # attempts, and looks in a row, since the bucket had what it had `before`
me="$HOSTNAME $$"             # in runs/.tpu/NAME/watch, until the TPU is torn down or another watch is started

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

heed() { # what is new in the bucket: where there is something, the run is well
  local now
  now=$(kept)
  [[ -z $now || $now == "$before" ]] || lost=0 unanswered=0 before=$now
}

silent() { # MESSAGE: a look that told nothing, which may be this machine's network; so many in a row are the last
  heed
  unanswered=$((unanswered + 1))
  tell "$1 ($unanswered of $tries in a row)"
  ((unanswered < tries)) || finish 1 "gives up and deletes the TPU: $1; what logs there are is in runs/.tpu/$name"
}

lose() { # MESSAGE: an attempt that chips were paid for; so many in a row that bring nothing are the last
  heed
  lost=$((lost + 1))
  tell "$1 ($lost of $tries)"
  ((lost < tries)) || finish 1 "gives up and deletes the TPU: $tries attempts brought no checkpoint; what logs there are is in runs/.tpu/$name"
}

give_way() { # to teardown.sh, where a request that crossed with it is taken back, and to a watch that was started later
  local now
  now=$(cat "runs/.tpu/$name/watch" 2>/dev/null || echo "$me")
  case $now in
    "$me") ;;
    over) finish 1 "was torn down; tpu/launch.sh goes on with what is in the bucket" ;;
    *) tell "another watch was started; this one ends" && exit 1 ;;
  esac
}

again() { # a TPU that is no more is in the way of the next
  [[ ! -d runs/.tpu/$name/logs ]] || mv "runs/.tpu/$name/logs" "runs/.tpu/$name/logs-$(date +%s)"
  clear_away
}
