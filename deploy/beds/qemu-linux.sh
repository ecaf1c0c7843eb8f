#!/usr/bin/env bash
# The bed `qemu-linux`: stock Debian kernels in guests of QEMU's TCG, whose own MMU is asked over QMP what it thinks.
#
#   qemu-linux.sh build             downloads QEMU and the kernels into the cache folder; installs nothing
#   qemu-linux.sh check             says whether the bed is there
#   qemu-linux.sh files FOLDER      puts the kernel and the initramfs of the amd64 guests into a folder, as `vmlinuz` and
#                                   `initramfs`, for whoever else boots them
#   qemu-linux.sh boot GUEST RAM    boots a guest with two vCPUs, whose memory is the file RAM (it is made to fit); QMP is
#                                   on standard input and output, what the guest says on standard error
#   qemu-linux.sh stand RAM SHARE   a machine of 4 GiB that stands still from power-on: its memory is the file RAM, which
#                                   it shares (`on`) or has a view of its own of (`off`); ends as a guest does
#
# GUEST is one of
#
#   4-level    amd64 under 4-level paging, with page-table isolation and 1 GiB pages
#   5-level    amd64 under 5-level paging
#   2-level    i386 under 2-level paging
#   pae        i386 under PAE paging, with page-table isolation
#
# The guest runs one program, qemu-linux.c, which says `ready` when it has mapped what it maps. QEMU ends with the process
# that started it, when that closes QMP's other end and asks for it (`quit`), or when its time is up.
#
#   PAGEWALK_BEDS          the cache folder; default ${XDG_CACHE_HOME:-~/.cache}/pagewalk-beds
#   PAGEWALK_BED_SECONDS   how long a guest may live; default 600
#   PAGEWALK_BED_QMP       path of a socket for one more QMP; default none
#   PAGEWALK_BED_APPEND    more of the kernel's command line: `nokaslr`, and `-- kallsyms` has the program tell the
#                          kernel's symbols; default none
#   PAGEWALK_BED_SIZE      how much memory the guest has, with `file` and `private`; default as the judges know it
#   PAGEWALK_BED_MEMORY    `file` or `private`: whether RAM holds the guest's memory; `numa`: RAM holds the first of two nodes of
#                          512 MiB, and there are slots for DIMMs; default file
set -euo pipefail

bed=qemu-linux
# shellcheck source=deploy/beds/parts.sh
. "$(dirname "$0")/parts.sh"
parts=(qemu linux-amd64 linux-686 linux-686-pae)

build() {
    build_parts "${parts[@]}"
    echo "qemu-linux: built in $beds: $(cat "$beds"/linux-*/version | xargs), $(cat "$beds/qemu/version")"
}

check() {
    has_parts "${parts[@]}" || fail "the bed is not built: run $0 build"
    need gcc "the guests' program is written in C"
}

# initramfs BITS: its one program is the guests'; needs a folder $work
initramfs() {
    mkdir "$work/root" "$work/root/proc"
    gcc "-m$1" -march="$([ "$1" = 64 ] && echo x86-64 || echo i686)" -O1 -Wall -Wextra -Werror -static -nostdlib \
        -ffreestanding -fno-stack-protector -fno-pic -no-pie -mgeneral-regs-only -fcf-protection=none \
        -fno-tree-loop-distribute-patterns -o "$work/root/init" "${0%.sh}.c" || fail "the guest's program does not compile"
    archive "$work/root"
}

files() {
    has_parts linux-amd64 || fail "the kernel is not there: run $0 build"
    need gcc "the guests' program is written in C"
    work=$(mktemp -d)
    trap 'rm -rf "$work"' EXIT
    initramfs 64 >"$1/initramfs"
    cp "$beds/linux-amd64/vmlinuz" "$1/vmlinuz"
}

boot() {
    local guest=$1 ram=$2 linux bits memory cpu append
    case $guest in
        4-level) linux=linux-amd64 bits=64 memory=3328M cpu=max,la57=off append="pti=on hugepagesz=1G hugepages=1" ;;
        5-level) linux=linux-amd64 bits=64 memory=1G cpu=max,la57=on append="" ;;
        2-level) linux=linux-686 bits=32 memory=1G cpu=qemu32,-pae append="" ;;
        pae) linux=linux-686-pae bits=32 memory=1G cpu=max,-lm append="pti=on" ;;
        *) fail "there is no guest $guest" ;;
    esac
    memory=${PAGEWALK_BED_SIZE:-$memory}
    check
    work=$(mktemp -d)
    trap 'rm -rf "$work"' EXIT
    initramfs "$bits" >"$work/initramfs"
    # QEMU takes this shell's place: what it needs is handed over open, and nothing stays behind.
    exec 3<"$work/initramfs"
    rm -rf "$work"
    qemu_command "${PAGEWALK_BED_SECONDS:-600}"
    local machine=pc,accel=tcg,memory-backend=ram0 options
    case ${PAGEWALK_BED_MEMORY:-file} in
        file) options=(-m "$memory" -object "memory-backend-file,id=ram0,size=$memory,mem-path=$ram,share=on") ;;
        private) options=(-m "$memory" -object "memory-backend-ram,id=ram0,size=$memory") ;;
        numa)
            machine=pc,accel=tcg
            options=(-m 1G,slots=2,maxmem=2G
                -object "memory-backend-file,id=ram0,size=512M,mem-path=$ram,share=on" -numa node,cpus=0,memdev=ram0
                -object memory-backend-memfd,id=ram1,size=512M,share=on -numa node,cpus=1,memdev=ram1)
            ;;
        *) fail "PAGEWALK_BED_MEMORY is file, private or numa" ;;
    esac
    [ -z "${PAGEWALK_BED_QMP-}" ] || qemu+=(-qmp "unix:$PAGEWALK_BED_QMP,server=on,wait=off")
    exec "${qemu[@]}" \
        -machine "$machine" -cpu "$cpu" -smp 2 "${options[@]}" \
        -kernel "$beds/$linux/vmlinuz" -initrd /dev/fd/3 \
        -append "console=ttyS0 quiet loglevel=3 panic=-1 no_timer_check hugepages=8 $append ${PAGEWALK_BED_APPEND-}" \
        -chardev stdio,id=qmp,signal=off -mon chardev=qmp,mode=control \
        -chardev file,id=serial,path=/dev/stderr -serial chardev:serial
}

stand() {
    check
    qemu_command "${PAGEWALK_BED_SECONDS:-600}"
    exec "${qemu[@]}" -S -machine pc,accel=tcg,memory-backend=ram0 -smp 2 -m 4G \
        -object "memory-backend-file,id=ram0,size=4G,mem-path=$1,share=$2" \
        -qmp "unix:$PAGEWALK_BED_QMP,server=on,wait=off"
}

case "${1-}" in
    build) build ;;
    check) check ;;
    files) [ $# -eq 2 ] || fail "usage: $0 files FOLDER"; files "$2" ;;
    boot) [ $# -eq 3 ] || fail "usage: $0 boot GUEST RAM"; boot "$2" "$3" ;;
    stand) [ $# -eq 3 ] || fail "usage: $0 stand RAM SHARE"; stand "$2" "$3" ;;
    *) fail "usage: $0 build | check | files FOLDER | boot GUEST RAM | stand RAM SHARE" ;;
esac
