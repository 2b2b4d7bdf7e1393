# What the scripts ask of the cloud and of the workers. Sourced by common.sh, whose variables it uses.
# shellcheck shell=bash disable=SC2154,SC2016 # they are set there; what is quoted is for shells on the workers

image() { # that the page "TPU software versions" of Cloud TPU names for the type
  case $type in
    v5p-*) echo v2-alpha-tpuv5 ;;
    v5litepod-*) echo v2-alpha-tpuv5-lite ;;
    v6e-*) echo v2-alpha-tpuv6e ;;
    v[234]-*) echo tpu-ubuntu2204-base ;;
    *) fail "--type: ${type:-(none)} is not known; known are v4-8, v5litepod-8, v5p-8, v6e-8 and their larger kin" ;;
  esac
}

step() { # COMMAND...: done, or with --dry-run shown
  if [[ -n $dry_run ]]; then
    printf '%q ' "$@"
    echo
  else
    "$@"
  fi
}

queued() { step gcloud compute tpus queued-resources "$@" --zone="$zone" ${project:+--project="$project"}; }
vm() { step gcloud compute tpus tpu-vm "$@" --zone="$zone" ${project:+--project="$project"}; }
on_workers() { vm ssh "$name" --worker=all --command="$1" --quiet; } # COMMAND: it has no word of the user in it

create() {
  queued create "$name" --node-id="$name" --accelerator-type="$type" --runtime-version="$(image)" ${spot:+--spot} --quiet
}
delete() { queued delete "$name" --force --quiet; }
requested() { queued list --filter="name ~ /$name\$" --format='value(state.state)'; } # "" where there is none
node() { vm describe "$name" --format='value(state)'; }

set_up() { # code of now alone: of what was there a run needs nothing that is not in the bucket
  vm scp "runs/.tpu/$name/code.tar" "$name:" --worker=all --quiet &&
    on_workers 'sudo systemctl stop gadjax 2>/dev/null; rm -rf gadjax && mkdir gadjax && tar -xf code.tar -C gadjax && bash gadjax/tpu/worker.sh'
}

progress() { # of each worker "new", "running", "success 0" or "exit-code 2", and how often the run failed and was started again
  on_workers 'echo "$(cat gadjax/state 2>/dev/null || echo new) $(systemctl show --property=NRestarts --value gadjax)"'
}

kept() { # what the bucket has of the run's work: sealed checkpoints, evaluated stages
  step gcloud storage ls "$bucket/$name/stages/*/checkpoints/*/sha256-*" "$bucket/$name/evaluation/**" 2>/dev/null || true
}
