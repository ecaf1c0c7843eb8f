#!/usr/bin/env bash
# The bed `nested-amd`: Linux's kvm_amd in a guest of QEMU's TCG, whose CPU has SVM, NPT and 5-level paging.
#
#   nested-amd.sh build                    downloads QEMU, a kernel and busybox into the cache folder; installs nothing
#   nested-amd.sh check                    says whether the bed is there
#   nested-amd.sh run PROGRAM [ARGUMENT]   boots the guest and runs PROGRAM, a static binary, next to its /dev/kvm
#   nested-amd.sh run-each PROGRAM...        boots the guest and runs these programs one after the other
#
# Output, exit codes and environment: guest.sh.
#
#   PAGEWALK_KVM_AMD       parameters of the module kvm_amd; default "nested=1 npt=1"
set -euo pipefail

bed=nested-amd
parts=(qemu linux-amd64)
modules=(irqbypass kvm "kvm-amd ${PAGEWALK_KVM_AMD:-nested=1 npt=1}")
leave='reboot -f'
ended=0

emulator() {
    qemu_command "$1"
    emulator=("${qemu[@]}" -machine pc,accel=tcg -cpu max,la57=on -smp 1 -m 1G
        -kernel "$linux/vmlinuz" -initrd "$work/initramfs" -append "console=ttyS0 quiet loglevel=3 panic=-1"
        -chardev file,id=console,path=/dev/fd/3 -serial chardev:console)
}

# shellcheck source=deploy/beds/guest.sh
. "$(dirname "$0")/guest.sh"
guest "$@"
