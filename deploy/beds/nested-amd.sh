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

here=${PAGEWALK_BEDS:-${XDG_CACHE_HOME:-$HOME/.cache}/pagewalk-beds}/nested-amd
# In the order in which they are loaded.
modules=(irqbypass kvm kvm-amd)

fail() {
    printf 'nested-amd: %s\n' "$1" >&2
    exit 125
}

need() {
    command -v "$1" >/dev/null || fail "$1 is missing: $2"
}

build() {
    need apt-get "this bed is made of Debian packages, and builds on Debian and its relatives only"
    need dpkg-deb "install the package dpkg"
    local kernel packages
    kernel=$(apt-cache depends linux-image-cloud-amd64 2>/dev/null | awk '/Depends: linux-image-/ { print $2; exit }')
    [ -n "$kernel" ] || fail "apt knows no linux-image-cloud-amd64: run apt-get update, or add a Debian source"
    # QEMU and the libraries that this system lacks. What apt would remove for them stays: nothing is installed.
    packages=$(apt-get -s -y --no-install-recommends install qemu-system-x86 | awk '/^Inst/ { print $2 }') \
        || fail "apt finds no way to qemu-system-x86"

    mkdir -p "$(dirname "$here")"
    work=$(mktemp -d "$here.XXXXXX")
    trap 'rm -rf "$work"' EXIT
    mkdir "$work/packages" "$work/kernel" "$work/bed"
    # shellcheck disable=SC2086
    (cd "$work/packages" && printf '%s\n' $packages qemu-system-x86 qemu-system-common qemu-system-data seabios ipxe-qemu \
        busybox-static "$kernel" | sort -u | xargs apt-get -q -o APT::Sandbox::User=root download) \
        || fail "the packages cannot be downloaded"
    for package in "$work"/packages/*.deb; do
        case $package in
            */linux-image-*) dpkg-deb -x "$package" "$work/kernel" ;;
            *) dpkg-deb -x "$package" "$work/bed" ;;
        esac
    done
    cp "$work"/kernel/boot/vmlinuz-* "$work/bed/vmlinuz"
    for module in "${modules[@]}"; do
        file=$(find "$work/kernel" -name "$module.ko*")
        case $file in
            *.ko) cp "$file" "$work/bed/" ;;
            *.ko.xz) xz -dc "$file" >"$work/bed/$module.ko" ;;
            *) fail "$kernel has no module $module" ;;
        esac
    done
    rm -rf "$here"
    mv "$work/bed" "$here"
    version >/dev/null || { rm -rf "$here"; fail "QEMU does not start"; }
    echo "nested-amd: built in $here: $kernel, $(version)"
}

# qemu SECONDS ARGUMENT...
qemu() {
    local libraries=lib/x86_64-linux-gnu
    QEMU_MODULE_DIR=$here/usr/$libraries/qemu LD_LIBRARY_PATH=$here/usr/$libraries:$here/$libraries \
        timeout --kill-after=5 "$1" "$here/usr/bin/qemu-system-x86_64" "${@:2}"
}

version() {
    qemu 20 --version | sed -n 1p
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
    [ -f "$here/vmlinuz" ] || fail "the bed is not built: run $0 build"
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
        cp "$here/$module.ko" "$work/root/"
    done
    cp "$here/bin/busybox" "$work/root/bin/"
    cp "$program" "$work/root/program"
    init "$@" >"$work/root/init"
    export -p | grep -E '^declare -x PAGEWALK_' | sed 's/^declare -x/export/' >"$work/root/environment" || true
    chmod +x "$work/root/init" "$work/root/program"
    (cd "$work/root" && find . | "$here/bin/busybox" cpio -o -H newc 2>/dev/null) >"$work/initramfs"

    local seconds=${PAGEWALK_BED_SECONDS:-600}
    set +e
    qemu "$seconds" -nodefaults -no-user-config -display none -no-reboot \
        -L "$here/usr/share/qemu" -L "$here/usr/share/seabios" -L "$here/usr/lib/ipxe/qemu" \
        -machine pc,accel=tcg -cpu max,la57=on -smp 1 -m 1G \
        -kernel "$here/vmlinuz" -initrd "$work/initramfs" -append "console=ttyS0 quiet loglevel=3 panic=-1" \
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
