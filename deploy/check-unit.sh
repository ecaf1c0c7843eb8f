#!/bin/bash
# Checks pagewalkd.service: systemd accepts it, it is confined, and the daemon accepts its command line and comes up.
set -euo pipefail

[ $# -eq 1 ] || { echo "usage: $0 PAGEWALKD    the daemon's binary" >&2; exit 2; }
binary=$(realpath "$1")
[ -x "$binary" ] || { echo "$0: $binary is not executable: cargo build --release -p pagewalkd" >&2; exit 2; }
unit=$(dirname "$(realpath "$0")")/pagewalkd.service

scratch=$(mktemp -d)
daemon=
trap '[ -z "$daemon" ] || kill "$daemon" 2>/dev/null || :; rm -rf "$scratch"' EXIT

# The installed path is replaced, as systemd insists that the program exists.
sed "s|/usr/local/bin/pagewalkd|$binary|" "$unit" >"$scratch/pagewalkd.service"
grep -q "^ExecStart=$binary " "$scratch/pagewalkd.service"
said=$(systemd-analyze verify "$scratch/pagewalkd.service" 2>&1) || { echo "$said" >&2; exit 1; }
[ -z "$said" ] || { echo "$said" >&2; exit 1; }
systemd-analyze security --offline=true --threshold=25 "$scratch/pagewalkd.service" | tail -1

# Another port, as the unit's may be taken; %t is where systemd would make the runtime directory.
mkdir "$scratch/pagewalk"
command=$(sed -n "s|%t|$scratch|g; s|127.0.0.1:50051|127.0.0.1:0|; s|^ExecStart=||p" "$scratch/pagewalkd.service")
read -ra words <<<"$command"
"${words[@]}" >"$scratch/log" 2>&1 &
daemon=$!
for _ in {1..100}; do
    [ -S "$scratch/pagewalk/pagewalk.sock" ] && break
    kill -0 "$daemon" 2>/dev/null || break
    sleep 0.1
done
if ! [ -S "$scratch/pagewalk/pagewalk.sock" ]; then
    echo "$0: the unit's command line does not bring the daemon up:" >&2
    cat "$scratch/log" >&2
    exit 1
fi
kill -TERM "$daemon"
status=0
wait "$daemon" || status=$?
daemon=
[ "$status" -eq 0 ] || { echo "$0: SIGTERM ended the daemon with status $status:" >&2; cat "$scratch/log" >&2; exit 1; }
echo "unit: verified, started, stopped"
