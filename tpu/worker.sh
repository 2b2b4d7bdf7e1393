#!/usr/bin/env bash
# Sets one worker up, there: Python by uv (the images have 3.10), the package, and the run as a service that is started
# again when it fails and after a reboot. watch.sh calls it on all workers at once.
set -euo pipefail
cd "$(dirname "$0")/.."

python3 -m pip install --quiet --user uv
uv=$(python3 -m site --user-base)/bin/uv
"$uv" venv --quiet --python 3.11 .venv
"$uv" pip install --quiet --python .venv/bin/python -c constraints.txt '.[tpu,languages]'

# `state` is what watch.sh reads: "running", or how the run ended. A mistake of the user (2) is not tried again; how often
# all else may be, watch.sh decides, for it knows whether anything came of it.
sudo tee /etc/systemd/system/gadjax.service >/dev/null <<UNIT
[Unit]
Description=gadjax
Wants=network-online.target
After=network-online.target
StartLimitIntervalSec=0

[Service]
User=$(id -un)
WorkingDirectory=$PWD
ExecStartPre=/bin/sh -c 'echo running >state'
ExecStart=$PWD/.venv/bin/gadjax run run.yaml
ExecStopPost=/bin/sh -c 'echo "\$SERVICE_RESULT \$EXIT_STATUS" >state'
Restart=on-failure
RestartPreventExitStatus=2
RestartSec=30
TimeoutStopSec=600
StandardOutput=append:$PWD/run.log
StandardError=append:$PWD/run.log

[Install]
WantedBy=multi-user.target
UNIT
sudo systemctl daemon-reload
sudo systemctl enable --quiet gadjax
sudo systemctl restart gadjax
