# A bed whose guest runs one static program next to its /dev/kvm, and ends. Sourced, never run: the caller describes the
# bed, and ends with `guest "$@"`.
#
#   $bed            its name
#   ${parts[@]}     what it is made of: parts.sh
#   ${modules[@]}   the kernel's modules in the order in which they are loaded, each with its parameters
#   $leave          busybox's command that ends the guest
#   emulator        a function: sets ${emulator[@]} to what starts the emulator for at most $1 seconds with the guest's
#                   initramfs in $work, its console on /dev/fd/3, and where its own words are of use, those in $work/log
#   $ended          the exit code of an emulator whose guest has ended
#
# The program's output comes out here, and its exit code is this script's. Where each of several programs is run, one line
# "$bed: program ended with CODE" follows its output. 124 says that the time was up, 125 that the
# bed itself failed.
#
#   PAGEWALK_BEDS          the cache folder; default ${XDG_CACHE_HOME:-~/.cache}/pagewalk-beds
#   PAGEWALK_BED_SECONDS   how long a run may take; default 600
#   PAGEWALK_BED_FILES     files that the program finds in the root folder, separated by colons
# Other variables named PAGEWALK_* are handed to the program.

# shellcheck source=deploy/beds/parts.sh
. "$(dirname "$0")/parts.sh"
linux=$beds/linux-amd64

build() {
    build_parts "${parts[@]}"
    local part versions=()
    for part in "${parts[@]}"; do
        versions+=("$(cat "$beds/$part/version")")
    done
    printf '%s: built in %s:' "$bed" "$beds"
    printf ' %s;' "${versions[@]}"
    echo
}

check() {
    has_parts "${parts[@]}" || fail "the bed is not built: run $0 build"
}

# What runs first in the guest, as a script for busybox: init COMMAND
init() {
    local module load=true
    for module in "${modules[@]}"; do
        # Parameters are separated by blanks.
        load+=" && /bin/busybox insmod /${module%% *}.ko${module#"${module%% *}"}"
    done
    cat <<INIT
#!/bin/busybox sh
/bin/busybox mkdir -p /dev /proc /tmp
/bin/busybox mount -t devtmpfs none /dev
/bin/busybox mount -t proc none /proc
code=125
if $load; then
    (. /environment; export PAGEWALK_BED=$bed; $1)
    code=\$?
fi
echo "$bed: exit code \$code"
# Setting anything waits until all that was said is out.
/bin/busybox stty -F /dev/console sane
/bin/busybox $leave
INIT
}

# unsigned MODULE: the kernel's module without its signature. An emulator takes seconds to check one.
unsigned() {
    local bytes signature=0
    bytes=$(stat -c %s "$1")
    if [ "$(tail -c 28 "$1" | tr -d '\n')" = '~Module signature appended~' ]; then
        # Before the 28 bytes of that mark stands a header of 12 bytes, which ends in the signature's length.
        signature=$((28 + 12 + 0x$(tail -c 32 "$1" | head -c 4 | od -An -tx1 | tr -d ' \n')))
    fi
    head -c $((bytes - signature)) "$1"
}

# The guest's files: initramfs COMMAND PROGRAM... The programs are /program0 and so on.
initramfs() {
    local module
    mkdir -p "$work/root/bin"
    for module in "${modules[@]}"; do
        unsigned "$linux/${module%% *}.ko" >"$work/root/${module%% *}.ko"
    done
    cp "$linux/busybox" "$work/root/bin/"
    local number=0 program
    for program in "${@:2}"; do
        cp "$program" "$work/root/program$number"
        chmod +x "$work/root/program$number"
        number=$((number + 1))
    done
    local file files
    IFS=: read -ra files <<<"${PAGEWALK_BED_FILES-}"
    for file in "${files[@]}"; do
        cp "$file" "$work/root/" || fail "$file cannot be handed to the guest"
    done
    init "$1" >"$work/root/init"
    export -p | grep -E '^declare -x PAGEWALK_' | sed 's/^declare -x/export/' >"$work/root/environment" || true
    chmod +x "$work/root/init"
    archive "$work/root" >"$work/initramfs"
}

# Runs one program with its arguments.
run() {
    boot "exec /program0 $(printf '%q ' "${@:2}")" "$1"
}

# Runs each program without arguments, one after the other.
run_each() {
    local number command=true
    for ((number = 0; number < $#; number++)); do
        command+="; /program$number; echo \"$bed: program ended with \$?\""
    done
    boot "$command" "$@"
}

# Boots the guest to run a command that needs these programs: boot COMMAND PROGRAM...
boot() {
    local program
    for program in "${@:2}"; do
        [ -f "$program" ] && [ -x "$program" ] || fail "$program is no program"
        if LC_ALL=C ldd "$program" 2>/dev/null | grep -q '=>'; then
            fail "$program is linked dynamically; the guest has no libraries (for Rust: -C target-feature=+crt-static)"
        fi
    done
    check
    work=$(mktemp -d)
    trap 'rm -rf "$work"' EXIT
    initramfs "$@"

    local seconds=${PAGEWALK_BED_SECONDS:-600} status=0 code
    emulator "$seconds"
    mkfifo "$work/console"
    sed -u 's/\r$//' <"$work/console" | tee "$work/output" &
    local reader=$!
    # In the background: a shell that waits can still end the emulator when it is told to end.
    "${emulator[@]}" </dev/null 3>"$work/console" >"$work/said" 2>&1 &
    local process=$!
    # shellcheck disable=SC2064
    trap "kill $process; wait $process || true; exit 143" TERM INT HUP
    wait "$process" || status=$?
    trap - TERM INT HUP
    wait "$reader"
    # 137: it had to be killed.
    [ "$status" -ne 124 ] && [ "$status" -ne 137 ] || { echo "$bed: not done after $seconds s" >&2; exit 124; }
    code=$(sed -n "s/^$bed: exit code \([0-9]*\)$/\1/p" "$work/output")
    if [ "$status" -ne "$ended" ] || [ -z "$code" ]; then
        tail -n 20 "$work/said" "$work/log" >&2 2>/dev/null || true
        fail "the emulator ended with $status${code:+, the program with $code}"
    fi
    exit "$code"
}

guest() {
    case "${1-}" in
        build) build ;;
        check) check ;;
        run) [ $# -ge 2 ] || fail "run what? usage: $0 run PROGRAM [ARGUMENT]..."; shift; run "$@" ;;
        run-each) [ $# -ge 2 ] || fail "run what? usage: $0 run-each PROGRAM..."; shift; run_each "$@" ;;
        *) fail "usage: $0 build | check | run PROGRAM [ARGUMENT]... | run-each PROGRAM..." ;;
    esac
}
