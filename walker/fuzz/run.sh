#!/usr/bin/env bash
# Runs every fuzz target at once, each for SECONDS (default 60), from the seeds that are kept.
#
#   run.sh [SECONDS]
#
# Needs a nightly toolchain and cargo-fuzz. Prints a judge's line for each target, and fails if one found something, met a kind
# of outcome too rarely to mean anything, or did not come to its end. What it found is in artifacts/TARGET.
set -euo pipefail
cd "$(dirname "$0")"

seconds=${1:-60}
targets=(walk registers)
# No sanitizer: the walker has no `unsafe`, and without one it is searched several times as fast. Panics and overflows are
# found all the same.
build=$(realpath "${CARGO_TARGET_DIR:-target}")/fuzz
CARGO_TARGET_DIR=$build cargo +nightly fuzz build --fuzz-dir . --sanitizer none
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
running=()
for target in "${targets[@]}"; do
    mkdir -p "$work/$target" "artifacts/$target"
    "$build"/*/release/"$target" -max_total_time="$seconds" -max_len=1024 -timeout=10 -verbosity=0 \
        -artifact_prefix="artifacts/$target/" "$work/$target" "seeds/$target" >"$work/$target.out" 2>&1 &
    running+=($!)
done
status=0
for number in "${!targets[@]}"; do
    target=${targets[number]}
    ended=0
    wait "${running[number]}" || ended=$?
    if [ "$ended" -eq 0 ]; then
        sed -n '/^  \|^STARVED\|^judge /p' "$work/$target.out"
        grep -q '^judge ' "$work/$target.out" || { echo "$target reported nothing"; status=1; }
    else
        cat "$work/$target.out"
        echo "$target ended with $ended; what it ran on is in $PWD/artifacts/$target"
        status=1
    fi
done
exit "$status"
