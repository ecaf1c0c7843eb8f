#!/usr/bin/env bash
# The bed `nested-intel`: Linux's kvm_intel in a guest of Bochs, whose CPU has VMX with EPT, and PCID.
#
#   nested-intel.sh build                    downloads Bochs, a kernel and busybox into the cache folder; installs nothing
#   nested-intel.sh check                    says whether the bed is there
#   nested-intel.sh run PROGRAM [ARGUMENT]   boots the guest and runs PROGRAM, a static binary, next to its /dev/kvm
#   nested-intel.sh run-each PROGRAM...        boots the guest and runs these programs one after the other
#
# Output, exit codes and environment: guest.sh. The guest's clock counts instructions: its seconds are about as long as
# ours.
#
#   PAGEWALK_KVM_INTEL     parameters of the module kvm_intel; default "nested=1 ept=1"
set -euo pipefail

bed=nested-intel
parts=(bochs linux-amd64)
modules=(irqbypass kvm "kvm-intel ${PAGEWALK_KVM_INTEL:-nested=1 ept=1}")
leave='poweroff -f'
# Bochs calls the end of the power a panic.
ended=1

# What a boot spends most of its instructions on, and a guest that lives for seconds has no use for: the tests that the
# kernel's ciphers make of themselves, certificates, tables for tracing, and what holds off other programs. By default
# the clock is the counter of cycles, which Bochs advances once an instruction while the kernel takes it for 3.5 GHz.
append='console=ttyS0,115200 quiet loglevel=3 panic=-1 clocksource=hpet mitigations=off cryptomgr.notests'
append+=' initcall_blacklist=trace_eval_init,load_system_certificate_list'

emulator() {
    local folder=$beds/bochs disc=$work/disc
    bochs_command "$1"
    mkdir -p "$disc"
    cp "$linux/vmlinuz" "$disc/vmlinuz"
    mv "$work/initramfs" "$disc/initrd"
    cp "$folder/usr/lib/ISOLINUX/isolinux.bin" "$folder/usr/lib/syslinux/modules/bios/ldlinux.c32" "$disc"
    printf 'DEFAULT linux\nLABEL linux\nKERNEL /vmlinuz\nINITRD /initrd\nAPPEND %s\n' "$append" >"$disc/isolinux.cfg"
    "${with_libraries[@]}" "$folder/usr/bin/genisoimage" -quiet -o "$work/disc.iso" -b isolinux.bin -c boot.cat \
        -no-emul-boot -boot-load-size 4 -boot-info-table "$disc" || fail "no disc can be made"
    cat >"$work/bochsrc" <<RC
plugin_ctrl: unmapped=1, biosdev=1, extfpuirq=1, serial=1, speaker=0, parallel=0, gameport=0
display_library: term
cpu: model=corei7_skylake_x, count=1, ips=60000000, reset_on_triple_fault=0, ignore_bad_msrs=1
memory: guest=512, host=512
romimage: file="$folder/usr/share/bochs/BIOS-bochs-latest"
vgaromimage: file="$folder/usr/share/vgabios/vgabios.bin"
ata0-master: type=cdrom, path="$work/disc.iso", status=inserted
boot: cdrom
com1: enabled=1, mode=file, dev=/dev/fd/3
log: $work/log
panic: action=fatal
error: action=ignore
info: action=ignore
debug: action=ignore
RC
    # Debian's Bochs waits in its debugger.
    echo continue >"$work/commands"
    emulator=("${bochs[@]}" -q -f "$work/bochsrc" -rc "$work/commands")
}

# shellcheck source=deploy/beds/guest.sh
. "$(dirname "$0")/guest.sh"
guest "$@"
