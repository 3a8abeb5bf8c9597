#!/usr/bin/env bash
# Makes the secrets of compose.yaml in cluster/secrets/, or in the folder given. What is there already is kept.
# The folder is closed to others; its files are readable, as each container has a user of its own.
set -euo pipefail
folder="${1:-$(cd "$(dirname "$0")" && pwd)/secrets}"
mkdir -p "$folder"
chmod 700 "$folder"
cd "$folder"

random() { od -An -N24 -tx1 /dev/urandom | tr -d ' \n'; }
put() { # NAME CONTENT
    if [[ -e "$1" ]]; then
        echo "$1: kept" >&2
    else
        printf '%s' "$2" >"$1.new"
        chmod 644 "$1.new"
        mv "$1.new" "$1"
        echo "$1: made" >&2
    fi
}

for name in ray_token api_key postgres_password grafana_password; do put "$name" "$(random)"; done
put mlflow.env "MLFLOW_BACKEND_STORE_URI=postgresql+psycopg2://mlflow:$(cat postgres_password)@postgres:5432/mlflow
"
put nexusgen.env "NEXUSGEN_API_KEYS=$(cat api_key)
AWS_ACCESS_KEY_ID=nexusgen
AWS_SECRET_ACCESS_KEY=$(random)
"
put s3.json '{"identities": [{"name": "nexusgen", "actions": ["Admin", "Read", "Write", "List", "Tagging"],
  "credentials": [{"accessKey": "nexusgen", "secretKey": "'"$(sed -n 's/^AWS_SECRET_ACCESS_KEY=//p' nexusgen.env)"'"}]}]}
'
