#!/usr/bin/env bash
# Runs every fuzz target, the walker's and the daemon's, at once, each for SECONDS (default 60), from the seeds that are kept.
#
#   run.sh [SECONDS]
#
# Needs a nightly toolchain and cargo-fuzz. Prints a judge's line for each target, and fails if one found something, met a kind
# of outcome too rarely to mean anything, or did not come to its end. What it found is in artifacts/TARGET of its crate.
set -euo pipefail
cd "$(dirname "$0")/../.."

seconds=${1:-60}
targets=(walker/fuzz/walk walker/fuzz/registers server/fuzz/{requests,words,dumps,images})
# No sanitizer: there is `unsafe` in few places, and without one the rest is searched several times as fast. Panics and overflows
# are found all the same.
build=$(realpath "${CARGO_TARGET_DIR:-walker/fuzz/target}")/fuzz
for crate in walker/fuzz server/fuzz; do
    CARGO_TARGET_DIR=$build cargo +nightly fuzz build --fuzz-dir "$crate" --sanitizer none
done
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
running=()
for path in "${targets[@]}"; do
    crate=${path%/*} target=${path##*/}
    mkdir -p "$work/$target" "$crate/artifacts/$target"
    "$build"/*/release/"$target" -max_total_time="$seconds" -max_len=1024 -timeout=10 -verbosity=0 \
        -artifact_prefix="$crate/artifacts/$target/" "$work/$target" "$crate/seeds/$target" >"$work/$target.out" 2>&1 &
    running+=($!)
done
status=0
for number in "${!targets[@]}"; do
    path=${targets[number]}
    crate=${path%/*} target=${path##*/}
    ended=0
    wait "${running[number]}" || ended=$?
    if [ "$ended" -eq 0 ]; then
        sed -n '/^  \|^STARVED\|^judge /p' "$work/$target.out"
        grep -q '^judge ' "$work/$target.out" || { echo "$target reported nothing"; status=1; }
    else
        cat "$work/$target.out"
        echo "$target ended with $ended; what it ran on is in $crate/artifacts/$target"
        status=1
    fi
done
exit "$status"
