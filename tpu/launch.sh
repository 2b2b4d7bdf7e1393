#!/usr/bin/env bash
# Runs an experiment on a Cloud TPU, from a config to the report in a bucket:
#   tpu/launch.sh CONFIG --name N --type v5p-32 --zone Z --bucket gs://... [--project P] [--spot] [--tries N] [--dry-run] [KEY.PATH=VALUE ...]
# Once more with the same name: the code and config of now take over, the run goes on.
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

from=$OLDPWD # where CONFIG is looked for
parse "$@"
for option in name type zone bucket; do
  [[ -n ${!option} ]] || fail "--$option: is missing"
done
image >/dev/null # a type that nobody knows is told before the teacher is asked
((${#positional[@]})) || fail "CONFIG: is missing"
config=${positional[0]} overrides=("${positional[@]:1}")
[[ $config == /* ]] || config=$from/$config
[[ -f $config ]] || fail "CONFIG: $(printf %q "$config") is no file"
for override in ${overrides[@]+"${overrides[@]}"}; do
  [[ $override == ?*=* ]] || fail "$(printf %q "$override"): is not an override; write it like run.seed=1"
done
settings=(${overrides[@]+"${overrides[@]}"} "run.name=$name" "run.folder=runs" "run.bucket=$bucket")

# The teacher is asked here, and its text frozen: no key is ever needed there, and what failed is not asked again there.
step gadjax collect "$config" "${settings[@]}"
step gadjax collect "$config" "${settings[@]}" --status
step gadjax prepare "$config" "${settings[@]}"

state=runs/.tpu/$name
step mkdir -p "$state"
step python tpu/pack.py "runs/$name" "$state/code.tar"
options=(--type "$type" --zone "$zone" --bucket "$bucket" --tries "$tries" ${project:+--project "$project"} ${spot:+--spot})
[[ -n $dry_run ]] || printf '%s\n' "${options[@]}" >"$state/options"

exec tpu/watch.sh "$name" "${options[@]}" --deploy ${dry_run:+--dry-run}
