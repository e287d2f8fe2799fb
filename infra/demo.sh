#!/usr/bin/env bash
# The whole house in one command: a Ray head of its own, a pretraining job on it, the model served over HTTP, one answer.
# Usage: infra/demo.sh [--option value ...]     options of `python -m jobs.pretrain demo`, e.g. --name mine --steps 500
# A second run finds the finished run and serves it at once. Whatever this script starts, it ends.
set -euo pipefail
cd "$(dirname "$0")/.."

PYTHON=${PYTHON:-$([ -x .venv/bin/python ] && echo "$PWD/.venv/bin/python" || command -v python3)}
PATH="$(dirname "$PYTHON"):$PATH"
RECIPE=${RECIPE:-demo}
EDIFICE_HOME=${EDIFICE_HOME:-$HOME/.edifice}
LOGS=$(mktemp -d "${TMPDIR:-/tmp}/edifice-demo.XXXXXX")
export PATH EDIFICE_HOME PYTHONUNBUFFERED=1
# Every process that talks to the cluster needs the token; this one lives and dies with the demo.
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN=${RAY_AUTH_TOKEN:-$("$PYTHON" -c 'import secrets; print(secrets.token_hex(32))')}
export RAY_USAGE_STATS_ENABLED=0 RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO=0
export RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S=2  # the head waits that long for work to leave, at the end
unset RAY_ADDRESS

say() { printf '\n\033[1m== %s\033[0m\n' "$*"; }
started=()
finish() {
    status=$?
    trap - EXIT INT TERM
    for ((i = ${#started[@]} - 1; i >= 0; i--)); do kill -TERM "${started[i]}" 2>/dev/null || true; done
    for pid in "${started[@]}"; do
        for _ in $(seq 60); do kill -0 "$pid" 2>/dev/null || break; sleep 0.25; done
        kill -KILL "$pid" 2>/dev/null || true
    done
    if [ "$status" -ne 0 ]; then echo "demo failed; logs: $LOGS" >&2; else rm -rf "$LOGS"; fi
    exit "$status"
}
trap finish EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

read -r GCS DASHBOARD AGENT CLIENT METRICS HTTP < <("$PYTHON" - <<'PY'
import socket
# Below 10002, where Ray's worker ports begin; held open together so that no port comes twice.
found = []
for port in range(7001, 10000):
    s = socket.socket()
    try:
        s.bind(("127.0.0.1", port))
        found.append(s)
    except OSError:
        s.close()
    if len(found) == 6:
        break
print(*(s.getsockname()[1] for s in found))
PY
)

# name of the run: --name X or --name=X among the options, else the recipe's
NAME=$RECIPE
previous=
for argument in "$@"; do
    [ "$previous" = --name ] && NAME=$argument
    case $argument in --name=*) NAME=${argument#--name=} ;; esac
    previous=$argument
done
RUN=$EDIFICE_HOME/runs/$NAME

say "1/4 a Ray head on port $GCS (dashboard http://127.0.0.1:$DASHBOARD)"
"$PYTHON" -m cluster.beside ray start --head --block --node-ip-address 127.0.0.1 --port "$GCS" --dashboard-host 127.0.0.1 \
    --dashboard-port "$DASHBOARD" --dashboard-agent-listen-port "$AGENT" --ray-client-server-port "$CLIENT" \
    --metrics-export-port "$METRICS" --temp-dir "$LOGS/ray" --disable-usage-stats >"$LOGS/head.log" 2>&1 &
started+=($!)
for _ in $(seq 240); do
    kill -0 "${started[0]}" 2>/dev/null || { tail -20 "$LOGS/head.log" >&2; exit 1; }
    "$PYTHON" - "$DASHBOARD" <<'PY' && break
import os, sys, urllib.request
request = urllib.request.Request(f"http://127.0.0.1:{sys.argv[1]}/api/version",
                                 headers={"Authorization": "Bearer " + os.environ["RAY_AUTH_TOKEN"]})
try:
    urllib.request.urlopen(request, timeout=2)
except OSError:
    sys.exit(1)
PY
    sleep 0.5
done

say "2/4 ray job submit --working-dir . -- python -m jobs.pretrain $RECIPE $*"
ray job submit --address "http://127.0.0.1:$DASHBOARD" --working-dir . -- python -m jobs.pretrain "$RECIPE" "$@" &
started+=($!)
wait "${started[1]}"  # in the background, since bash acts on a signal only between foreground commands

say "3/4 serve run serve.app:build model=$RUN"
export RAY_ADDRESS=127.0.0.1:$GCS
serve start --http-host 127.0.0.1 --http-port "$HTTP" >"$LOGS/serve.log" 2>&1 || { tail -20 "$LOGS/serve.log" >&2; exit 1; }
serve run serve.app:build model="$RUN" >>"$LOGS/serve.log" 2>&1 &
started+=($!)

say "4/4 a completion from http://127.0.0.1:$HTTP/v1/completions"
"$PYTHON" - "$HTTP" "${started[2]}" "$LOGS/serve.log" "$NAME" <<'PY'
import json, os, sys, time, urllib.error, urllib.request
port, pid, log, name = sys.argv[1], int(sys.argv[2]), sys.argv[3], sys.argv[4]
base = f"http://127.0.0.1:{port}"
keys = os.environ.get("EDIFICE_API_KEYS", "").split(",")
headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {keys[0]}"} if keys[0] else {})

def get(path, body=None):
    request = urllib.request.Request(base + path, json.dumps(body).encode() if body else None, headers)
    with urllib.request.urlopen(request, timeout=120) as answer:
        return answer.read()

deadline = time.time() + 180
while True:
    try:
        get("/health")
        break
    except (urllib.error.URLError, OSError):
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            sys.exit("the server ended:\n" + "".join(open(log).readlines()[-20:]))
        if time.time() > deadline:
            sys.exit("the server did not become healthy in 180 s:\n" + "".join(open(log).readlines()[-20:]))
        time.sleep(0.5)
models = json.loads(get("/v1/models"))["data"]
prompt = "def read(self, size=-1):\n    "
body = {"model": models[0]["id"], "prompt": prompt, "max_tokens": 64, "temperature": 0.7, "seed": 1}
began = time.time()
answer = json.loads(get("/v1/completions", body))
print(prompt + answer["choices"][0]["text"])
print(f"\n-- {answer['usage']['completion_tokens']} tokens in {time.time() - began:.2f} s from {models[0]['id']}")
PY
say "done; the run is $RUN (loss.png, metrics.jsonl, checkpoints)"
