#!/usr/bin/env bash
# Run a command on every machine of a hostfile, in this folder, over ssh alone: for launchers that are started once on
# each machine. The command finds NODE_RANK, NODES and MASTER_ADDR (the first machine, unless set here) set:
#
#   bash launchers/shell/on_hosts.sh hosts 'deepspeed --hostfile hosts --no_ssh --node_rank $NODE_RANK \
#       --master_addr $MASTER_ADDR --module pretrain.train recipe=tokenizer_warmup ...'
#
# When one machine's command fails, or this script is ended, all are ended: their processes get SIGTERM. More in
# docs/launch.md.
set -euo pipefail

if (($# != 2)) || [[ ! -r $1 ]]; then
    echo "usage: on_hosts.sh HOSTFILE 'COMMAND': expected a readable file of machines, one a line, and one command" >&2
    exit 2
fi
mapfile -t hosts < <(sed 's/#.*//' "$1" | awk 'NF {print $1}')
if ((${#hosts[@]} == 0)); then
    echo "error: $1 names no machine: expected lines such as 'node-1 slots=8'" >&2
    exit 2
fi
export NODES=${#hosts[@]} MASTER_ADDR=${MASTER_ADDR:-${hosts[0]}}

# ssh carries no environment: these variables go into its command line, where others can read them, so no keys.
carried='PATH|PYTHONPATH|LD_LIBRARY_PATH|OMP_NUM_THREADS|NODES|MASTER_.*|(CUDA|NCCL|GLOO|TORCH|DS|DUALTOKEN)_.*'
variables=()
for name in $(compgen -e | grep -xE "$carried"); do
    variables+=("$name=${!name}")
done

# On its machine the command is a process group of its own, ended when standard input ends: by that an ssh that was
# itself ended, or lost its connection, is noticed on the other side; it passes on no signal. The group may not be there
# yet: told again until it is, or until the command has ended.
# shellcheck disable=SC2016
remote='exec 3<&0; setsid bash -c "$1" </dev/null & group=$!
{ cat <&3; until kill -TERM -- -$group || ! kill -0 $group; do sleep 0.1; done; } >/dev/null 2>&1 & watch=$!
wait $group && code=0 || code=$?; kill $watch 2>/dev/null; exit $code'

# The standard input of every ssh: a pipe that nobody writes to and this script alone holds open.
pipe=$(mktemp -u)
mkfifo "$pipe"
exec 3<>"$pipe"
exec 4<"$pipe"
rm "$pipe"

quoted() { # words for any POSIX shell; printf's %q is for bash alone
    local word
    for word; do printf "'%s' " "${word//\'/\'\\\'\'}"; done
}
for node in "${!hosts[@]}"; do
    line="cd $(quoted "$PWD")&& exec env $(quoted "${variables[@]}" "NODE_RANK=$node" bash -c "$remote" on_hosts "$2")"
    ssh -o BatchMode=yes "${hosts[node]}" "$line" <&4 3>&- 4<&- &
done

trap : INT TERM # `wait` returns, then the others are ended
code=0
for _ in "${hosts[@]}"; do
    wait -n || { code=$?; break; }
done
exec 3>&-
wait
exit "$code"
