# Parts that the beds share, each downloaded once into a folder of its own under $beds. Sourced, never run: the caller
# names itself in $bed, and takes the parts that it is made of.
#
#   qemu            QEMU and its libraries
#   bochs           Bochs with its BIOS and libraries, and what makes a CD that boots
#   linux-amd64     Debian's kernel for virtual machines (vmlinuz, KVM's modules), and busybox
#   linux-686       Debian's 32-bit kernel without PAE
#   linux-686-pae   the same with PAE
#
# Nothing is installed: what apt would remove or upgrade on this system stays as it is.

beds=${PAGEWALK_BEDS:-${XDG_CACHE_HOME:-$HOME/.cache}/pagewalk-beds}

fail() {
    printf '%s: %s\n' "$bed" "$1" >&2
    exit 125
}

need() {
    command -v "$1" >/dev/null || fail "$1 is missing: $2"
}

# Whether all of these parts are there.
has_parts() {
    local part
    for part; do
        [ -e "$beds/$part/version" ] || return 1
    done
}

# Downloads the missing ones of these parts.
build_parts() {
    need apt-get "beds are made of Debian packages, and build on Debian and its relatives only"
    need dpkg-deb "install the package dpkg"
    need flock "install the package util-linux"
    need setpriv "install the package util-linux"
    mkdir -p "$beds"
    local part
    for part; do
        # In a shell of its own, which holds the lock and removes what is unfinished.
        (
            exec 9>"$beds/lock"
            flock 9
            ! has_parts "$part" || exit 0
            work=$(mktemp -d "$beds/$part.XXXXXX")
            trap 'rm -rf "$work"' EXIT
            mkdir "$work/packages" "$work/files" "$work/part"
            apt=()
            case $part in
                qemu) part_qemu ;;
                bochs) part_bochs ;;
                linux-amd64) part_linux_amd64 ;;
                linux-686 | linux-686-pae) part_linux_i386 "linux-image-${part#linux-}" ;;
                *) fail "there is no part $part" ;;
            esac
            rm -rf "${beds:?}/$part"
            mv "$work/part" "$beds/$part"
        )
    done
}

# download PACKAGE...: into files/, with the options of ${apt[@]}
download() {
    (cd "$work/packages" && apt-get -q "${apt[@]}" -o APT::Sandbox::User=root download "$@") \
        || fail "the packages cannot be downloaded"
    local package
    for package in "$work"/packages/*.deb; do
        dpkg-deb -x "$package" "$work/files"
    done
}

# The kernel's package that the package $1 depends on.
kernel_of() {
    local kernel
    kernel=$(apt-cache "${apt[@]}" depends "$1" 2>/dev/null | awk '/Depends: linux-image-/ { print $2; exit }')
    [ -n "$kernel" ] || fail "apt knows no $1: run apt-get update, or add a Debian source"
    echo "$kernel"
}

# download_all PACKAGE...: downloads these and the libraries that this system lacks for them
download_all() {
    local packages
    packages=$(apt-get -s -y --no-install-recommends install "$@" | awk '/^Inst/ { print $2 }') \
        || fail "apt finds no way to $*"
    # shellcheck disable=SC2046,SC2086
    download $(printf '%s\n' $packages "$@" | sort -u)
}

part_qemu() {
    download_all qemu-system-x86 qemu-system-common qemu-system-data seabios ipxe-qemu
    rmdir "$work/part"
    mv "$work/files" "$work/part"
    qemu_command 20 "$work/part"
    "${qemu[@]}" --version | sed -n 1p >"$work/version" || fail "QEMU does not start"
    mv "$work/version" "$work/part/version"
}

part_bochs() {
    download_all bochs bochs-term bochsbios vgabios genisoimage isolinux syslinux-common
    rmdir "$work/part"
    mv "$work/files" "$work/part"
    bochs_command 20 "$work/part"
    "${bochs[@]}" --help 2>&1 | sed -n 's/^ *\(Bochs x86 Emulator .*\)/\1/p' >"$work/version"
    [ -s "$work/version" ] || fail "Bochs does not start"
    mv "$work/version" "$work/part/version"
}

part_linux_amd64() {
    local kernel module file
    kernel=$(kernel_of linux-image-cloud-amd64)
    download "$kernel" busybox-static
    cp "$work"/files/boot/vmlinuz-* "$work/part/vmlinuz"
    cp "$work/files/bin/busybox" "$work/part/busybox"
    for module in irqbypass kvm kvm-amd kvm-intel; do
        file=$(find "$work/files" -name "$module.ko*")
        case $file in
            *.ko) cp "$file" "$work/part/" ;;
            *.ko.xz) xz -dc "$file" >"$work/part/$module.ko" ;;
            *) fail "$kernel has no module $module" ;;
        esac
    done
    echo "$kernel" >"$work/part/version"
}

# The system's own lists are of its own architecture: these are private ones, of the same mirrors. The release alone is
# asked, not its security updates: a bed serves nobody, and a release's packages stay where they are.
part_linux_i386() {
    local lists=$work/apt keyring=/usr/share/keyrings/debian-archive-keyring.gpg kernel
    mkdir -p "$lists/state/lists/partial" "$lists/cache/archives/partial"
    [ -e "$keyring" ] || fail "$keyring is missing: install the package debian-archive-keyring"
    # shellcheck disable=SC2016
    apt-get indextargets --format '$(LABEL) $(REPO_URI) $(RELEASE) $(COMPONENT)' 'Created-By: Packages' \
        | awk -v keyring="$keyring" '$1 == "Debian" && $4 == "main" { print "deb [arch=i386 signed-by=" keyring "]", $2, $3, $4 }' \
        | sort -u >"$lists/sources.list"
    [ -s "$lists/sources.list" ] || fail "apt has no Debian source"
    touch "$lists/status"
    apt=(-o APT::Architecture=i386 -o APT::Architectures::=i386 -o Acquire::Languages=none
        -o Acquire::IndexTargets::deb::DEP-11::DefaultEnabled=false
        -o Dir::State="$lists/state" -o Dir::State::status="$lists/status" -o Dir::Cache="$lists/cache"
        -o Dir::Etc::sourcelist="$lists/sources.list" -o Dir::Etc::sourceparts=/dev/null)
    apt-get -q "${apt[@]}" -o APT::Sandbox::User=root update || fail "the lists of i386 cannot be downloaded"
    kernel=$(kernel_of "$1")
    download "$kernel"
    cp "$work"/files/boot/vmlinuz-* "$work/part/vmlinuz"
    echo "$kernel" >"$work/part/version"
}

# qemu_command SECONDS [FOLDER]: sets ${qemu[@]} to what starts QEMU, for at most that long, and not longer than its parent
# lives
qemu_command() {
    local seconds=$1 folder=${2:-$beds/qemu} libraries=lib/x86_64-linux-gnu
    qemu=(setpriv --pdeathsig KILL timeout --kill-after=5 "$seconds" setpriv --pdeathsig KILL
        env "QEMU_MODULE_DIR=$folder/usr/$libraries/qemu" "LD_LIBRARY_PATH=$folder/usr/$libraries:$folder/$libraries"
        "$folder/usr/bin/qemu-system-x86_64"
        -L "$folder/usr/share/qemu" -L "$folder/usr/share/seabios" -L "$folder/usr/lib/ipxe/qemu"
        -nodefaults -no-user-config -display none -no-reboot)
}

# bochs_command SECONDS [FOLDER]: sets ${bochs[@]} to what starts Bochs, for at most that long, and not longer than its
# parent lives, and ${with_libraries[@]} to what other programs of that folder are started by
bochs_command() {
    local seconds=$1 folder=${2:-$beds/bochs} libraries=lib/x86_64-linux-gnu
    with_libraries=(env "LD_LIBRARY_PATH=$folder/usr/$libraries:$folder/$libraries")
    # Bochs ends by SIGKILL alone.
    bochs=(setpriv --pdeathsig KILL timeout --kill-after=1 "$seconds" setpriv --pdeathsig KILL
        "${with_libraries[@]}" TERM=linux
        "LTDL_LIBRARY_PATH=$folder/usr/$libraries/bochs/plugins" "BXSHARE=$folder/usr/share/bochs"
        "$folder/usr/bin/bochs-bin")
}

# archive FOLDER: an initramfs of all that is in it
archive() {
    (cd "$1" && find . | "$beds/linux-amd64/busybox" cpio -o -H newc 2>/dev/null)
}
