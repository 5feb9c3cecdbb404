#!/usr/bin/env bash
# again.sh COMMAND ...   runs COMMAND, and runs it again when it was killed, has crashed, or has lost the hub
#
# It ends with COMMAND: after 0 (the run is over), 2 (an error that you must correct), and after SIGTERM or SIGINT, which
# COMMAND must get, too: Slurm signals every process of a step.
set -u
stopped=
trap 'stopped=1' TERM INT
while true; do
    "$@" &
    child=$!
    wait "$child"
    code=$?
    while kill -0 "$child" 2>/dev/null; do # a signal has ended `wait`, and not COMMAND
        wait "$child"
        code=$?
    done
    case $code in 0 | 2) exit "$code" ;; esac
    [ -n "$stopped" ] && exit "$code"
    echo "again.sh: $1 ended with $code; starting it again" >&2
    sleep 2
done
