#!/usr/bin/env bash
# An environment for each peer, from the registry: bench/peers/setup.sh FOLDER. PYTHON names the Python to use.
set -euo pipefail
folder="${1:?give the folder for the environments}"
shared=("torch==2.13.0" "transformers==5.23.0" "peft==0.21.2" "accelerate==1.15.0")
declare -A peers=([flower]="flwr==1.41.0 ray==2.55.1" [nvflare]="nvflare==2.9.0")
for peer in "${!peers[@]}"; do
  read -ra own <<<"${peers[$peer]}"
  "${PYTHON:-python3}" -m venv "$folder/$peer"
  "$folder/$peer/bin/pip" install --quiet "${shared[@]}" "${own[@]}"
done
