# What the scripts beside this one share: their options, checked, and cloud.sh. To be sourced.
# shellcheck shell=bash disable=SC2034 # what is not used here, the scripts use
set -euo pipefail
LC_ALL=C
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. tpu/cloud.sh

name='' type='' zone='' project='' bucket='' spot='' tries=20 dry_run='' deploy='' positional=()

fail() { # MESSAGE: a mistake of the user, in one line
  printf '%s: %s\n' "${0##*/}" "$1" >&2
  exit 2
}

check() { # OPTION VALUE PATTERN EXAMPLE: only plain names go on, to this machine's disk, to the cloud and to shells there
  [[ $2 =~ ^($3)$ ]] || fail "$1: $(printf %q "$2") is not usable; write it like $4"
}

parse() { # ARGUMENT...: into the variables above
  while (($#)); do
    case $1 in
      --name | --type | --zone | --project | --bucket | --tries)
        (($# > 1)) || fail "$1: has no value"
        printf -v "${1#--}" %s "$2"
        shift
        ;;
      --spot) spot=yes ;;
      --dry-run) dry_run=yes ;;
      --deploy) deploy=yes ;; # of watch.sh, when launch.sh calls it
      -*) fail "$(printf %q "$1"): there is no such option" ;;
      *) positional+=("$1") ;;
    esac
    shift
  done
  check --tries "$tries" '[1-9][0-9]{0,3}' 20
  [[ -z $name ]] || check --name "$name" '[a-z]([a-z0-9-]{0,38}[a-z0-9])?' my-run
  [[ -z $type ]] || check --type "$type" 'v[0-9]+[a-z]*-[0-9]+' v5p-32
  [[ -z $zone ]] || check --zone "$zone" '[a-z]+-[a-z]+[0-9]+-[a-z]' us-east5-a
  [[ -z $project ]] || check --project "$project" '[a-z][a-z0-9-]{4,28}[a-z0-9]' my-project
  [[ -z $bucket ]] || check --bucket "$bucket" 'gs://[a-z0-9][a-z0-9._-]*[a-z0-9](/[A-Za-z0-9][A-Za-z0-9._-]*)*' gs://my-bucket/runs
}

recall() { # NAME [OPTION...]: what launch.sh was told of this run, and options of now
  local said=() line
  parse "$@"
  name=${positional[0]:-$name}
  check NAME "$name" '[a-z]([a-z0-9-]{0,38}[a-z0-9])?' my-run
  if [[ -f runs/.tpu/$name/options ]]; then
    while IFS= read -r line; do said+=("$line"); done <"runs/.tpu/$name/options"
  fi
  parse ${said[@]+"${said[@]}"} "$@"
  [[ -n $zone ]] || fail "$name: was not launched from here; launch it, or give --zone"
}
