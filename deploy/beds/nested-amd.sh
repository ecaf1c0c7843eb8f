#!/usr/bin/env bash
# The bed `nested-amd`: Linux's kvm_amd in a guest of QEMU's TCG, whose CPU has SVM, NPT and 5-level paging.
#
#   nested-amd.sh build                    downloads QEMU, a kernel and busybox into the cache folder; installs nothing
#   nested-amd.sh check                    says whether the bed is there
#   nested-amd.sh run PROGRAM [ARGUMENT]   boots the guest and runs PROGRAM, a static binary, next to its /dev/kvm
#
# The program's output comes out here, and its exit code is this script's. 124 says that the time was up, 125 that the
# bed itself failed.
#
#   PAGEWALK_BEDS          the cache folder; default ${XDG_CACHE_HOME:-~/.cache}/pagewalk-beds
#   PAGEWALK_BED_SECONDS   how long a run may take; default 600
#   PAGEWALK_KVM_AMD       parameters of the module kvm_amd; default "nested=1 npt=1"
# Other variables named PAGEWALK_* are handed to the program.
set -euo pipefail

bed=nested-amd
# shellcheck source=deploy/beds/parts.sh
. "$(dirname "$0")/parts.sh"
parts=(qemu linux-amd64)
linux=$beds/linux-amd64
# In the order in which they are loaded.
modules=(irqbypass kvm kvm-amd)

build() {
    build_parts "${parts[@]}"
    echo "nested-amd: built in $beds: $(cat "$linux/version"), $(cat "$beds/qemu/version")"
}

# What runs first in the guest, as a script for busybox: init [ARGUMENT]...
init() {
    cat <<INIT
#!/bin/busybox sh
/bin/busybox mkdir -p /dev /proc /tmp
/bin/busybox mount -t devtmpfs none /dev
/bin/busybox mount -t proc none /proc
code=125
if /bin/busybox insmod /irqbypass.ko && /bin/busybox insmod /kvm.ko && /bin/busybox insmod /kvm-amd.ko ${PAGEWALK_KVM_AMD:-nested=1 npt=1}; then
    (. /environment; export PAGEWALK_BED=nested-amd; exec /program $(printf '%q ' "$@"))
    code=\$?
fi
echo "nested-amd: exit code \$code"
/bin/busybox reboot -f
INIT
}

check() {
    has_parts "${parts[@]}" || fail "the bed is not built: run $0 build"
}

run() {
    local program=$1
    shift
    [ -f "$program" ] && [ -x "$program" ] || fail "$program is no program"
    check
    if LC_ALL=C ldd "$program" 2>/dev/null | grep -q '=>'; then
        fail "$program is linked dynamically; the guest has no libraries (for Rust: -C target-feature=+crt-static)"
    fi
    work=$(mktemp -d)
    trap 'rm -rf "$work"' EXIT
    mkdir -p "$work/root/bin"
    for module in "${modules[@]}"; do
        cp "$linux/$module.ko" "$work/root/"
    done
    cp "$linux/busybox" "$work/root/bin/"
    cp "$program" "$work/root/program"
    init "$@" >"$work/root/init"
    export -p | grep -E '^declare -x PAGEWALK_' | sed 's/^declare -x/export/' >"$work/root/environment" || true
    chmod +x "$work/root/init" "$work/root/program"
    archive "$work/root" >"$work/initramfs"

    local seconds=${PAGEWALK_BED_SECONDS:-600}
    qemu_command "$seconds"
    set +e
    "${qemu[@]}" -machine pc,accel=tcg -cpu max,la57=on -smp 1 -m 1G \
        -kernel "$linux/vmlinuz" -initrd "$work/initramfs" -append "console=ttyS0 quiet loglevel=3 panic=-1" \
        -serial stdio </dev/null | sed -u 's/\r$//' | tee "$work/output"
    local status=("${PIPESTATUS[@]}")
    set -e
    [ "${status[0]}" -ne 124 ] || { echo "nested-amd: not done after $seconds s" >&2; exit 124; }
    [ "${status[0]}" -eq 0 ] || fail "QEMU ended with ${status[0]}"
    local code
    code=$(sed -n 's/^nested-amd: exit code \([0-9]*\)$/\1/p' "$work/output")
    [ -n "$code" ] || fail "the guest ended before the program did"
    exit "$code"
}

case "${1-}" in
    build) build ;;
    check) check ;;
    run) [ $# -ge 2 ] || fail "run what? usage: $0 run PROGRAM [ARGUMENT]..."; shift; run "$@" ;;
    *) fail "usage: $0 build | check | run PROGRAM [ARGUMENT]..." ;;
esac
