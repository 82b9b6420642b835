#!/usr/bin/env bash
# A training stage on hosts that you reach by ssh, one torchrun on each; the first host is where they meet:
#     HOSTS="node1 node2" PROCESSES=8 bash train/launch/ssh.sh train.posttrain configs/7b/instruct.yaml [key=value ...]
# The project lies under the same path on every host, with an installed environment, and runs/ on storage that they share.
# Ctrl-C or SIGTERM here reaches every host: the run saves a checkpoint, and this ends with 143; the same command resumes. If one host
# fails more often than RESTARTS, the others are stopped.
# ADDRESS: of the first host, as the others see it; PORT; TORCHRUN: its path on the hosts; SSH: the command that reaches them.
set -euo pipefail
if [ "$#" -lt 2 ] || [ -z "${HOSTS:-}" ]; then
    echo "usage: HOSTS='node1 node2' [PROCESSES=8] bash $0 MODULE CONFIG [key=value ...]" >&2
    exit 2
fi
read -r -a hosts <<<"$HOSTS"
ADDRESS="${ADDRESS:-${hosts[0]}}"
PORT="${PORT:-29500}"
PROCESSES="${PROCESSES:-1}"  # per host
RESTARTS="${RESTARTS:-3}"  # of all processes, where one died
TORCHRUN="${TORCHRUN:-.venv/bin/torchrun}"
SSH="${SSH:-ssh -o BatchMode=yes -o ServerAliveInterval=30}"
DIRECTORY="${DIRECTORY:-$PWD}"
ID="$(hostname)-$$"

started=()
for rank in "${!hosts[@]}"; do
    command=("$TORCHRUN" --nnodes "${#hosts[@]}" --node-rank "$rank" --nproc-per-node "$PROCESSES" --max-restarts "$RESTARTS"
        --master-addr "$ADDRESS" --master-port "$PORT" -m "$@")
    script="cd $(printf %q "$DIRECTORY") && mkdir -p runs && echo \$\$ > runs/.launch-$ID-$rank"
    script+=" && export OMP_NUM_THREADS=${OMP_NUM_THREADS:-8} TORCH_ELASTIC_SHUTDOWN_TIMEOUT=600 && exec$(printf ' %q' "${command[@]}")"
    $SSH "${hosts[rank]}" "$script" &
    started+=("$!")
done

tell_all() {  # each torchrun has the number of the shell that it took the place of
    for rank in "${!hosts[@]}"; do
        $SSH "${hosts[rank]}" "cd $(printf %q "$DIRECTORY") && kill -TERM \$(cat runs/.launch-$ID-$rank)" 2>/dev/null || true
    done
}
asked=no
stop() {
    trap '' TERM INT
    asked=yes
    echo "asked to stop: saving on ${#hosts[@]} hosts" >&2
    tell_all
}
trap stop TERM INT

status=0
left=("${started[@]}")
while [ "${#left[@]}" -gt 0 ]; do
    sleep 1
    running=()
    for process in "${left[@]}"; do
        if kill -0 "$process" 2>/dev/null; then
            running+=("$process")
            continue
        fi
        ended=0
        wait "$process" || ended=$?
        if [ "$ended" -ne 0 ] && [ "$status" -eq 0 ]; then
            status="$ended"
            if [ "$asked" = no ]; then
                echo "a host ended with $ended: stopping the others" >&2
                tell_all
            fi
        fi
    done
    left=(${running[@]+"${running[@]}"})
done
for rank in "${!hosts[@]}"; do
    $SSH "${hosts[rank]}" "rm -f $(printf %q "$DIRECTORY")/runs/.launch-$ID-$rank" || true
done
if [ "$asked" = yes ] && [ "$status" -ne 0 ]; then
    exit 143  # torchrun itself ends with 1 when it was asked to stop
fi
exit "$status"
