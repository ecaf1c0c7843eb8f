#!/usr/bin/env bash
# Every judge, and one table of what they said.
#
#   judges.sh              runs the judges, and then prints the table
#   judges.sh table LOG    prints the table of a run whose output is in LOG
#
# A row adds up the judges that it names; each has to have said `judge NAME: N cases, D disagreements, T s` and made its minimum.
# The verdict on a row is OK, DISAGREES, SHORT (of cases), MISSING (a judge said nothing), or SKIPPED: a bed of the row's said so and
# PAGEWALK_REQUIRE does not name it. Whatever is not OK or SKIPPED makes this fail, and so does a judge that is in no row.
#
#   PAGEWALK_FUZZ_SECONDS   how long each fuzz target runs; default 60
# Beds, PAGEWALK_REQUIRE and PAGEWALK_SEED: see README.md.
set -euo pipefail
cd "$(dirname "$0")/../.."

# Name | what it is | beds | cases of each judge | of all | seconds of each | judges, with `*` for any ending
rows() {
    cat <<'ROWS'
kvm|Local /dev/kvm, 4-level: KVM_TRANSLATE and execution|kvm|300000|1000000|0|kvm-translate kvm-execution
amd-translate|kvm_amd in TCG, KVM_TRANSLATE: unpaged, 2-level, PAE, 4-, 5-level|nested-amd|50000|0|0|nested-amd-translate-unpaged nested-amd-translate-2 nested-amd-translate-pae nested-amd-translate-4 nested-amd-translate-5
amd-execution|kvm_amd in TCG, executed accesses in the same modes|nested-amd|20000|0|0|nested-amd-kvm-execution-unpaged nested-amd-kvm-execution-2 nested-amd-kvm-execution-pae nested-amd-kvm-execution-4 nested-amd-kvm-execution-5
amd-nested|kvm_amd nested: L2 unpaged, 2-level, PAE, 4-, 5-level over NPT of 4, 5|nested-amd|20000|0|0|nested-amd-npt-unpagedx4 nested-amd-npt-unpagedx5 nested-amd-npt-2x4 nested-amd-npt-2x5 nested-amd-npt-paex4 nested-amd-npt-paex5 nested-amd-npt-4x4 nested-amd-npt-4x5 nested-amd-npt-5x4 nested-amd-npt-5x5
amd-executing|Executing in the nested bed: #PF, EXITINFO1, SMEP, SMAP, PKU, A/D|nested-amd|1000|100000|0|nested-amd-vmrun-* nested-amd-keys-execution-* nested-amd-kvm-execution-*
amd-daemon|The daemon in that bed over gRPC, each paging mode, alone and as a real L2 over NPT|nested-amd|1000|0|0|nested-amd-daemon-translate-* nested-amd-daemon-npt-*
amd-toggled|L2s that run there: entered and left under 4 clients, and observed|nested-amd|1000|0|0|nested-amd-daemon-toggled nested-amd-daemon-observed
amd-running|L2s that run there: L1 restored, L2 crashed, requests refused|nested-amd|20|0|0|nested-amd-daemon-restored nested-amd-daemon-crashed nested-amd-daemon-refused
amd-linux|A stock Linux kernel on the daemon's own vCPUs there, paused, stepped and running|nested-amd|1000|0|0|nested-amd-daemon-linux
intel-translate|kvm_intel in Bochs, KVM_TRANSLATE: unpaged, 2-level, PAE, 4-level|nested-intel|10000|0|0|nested-intel-translate-unpaged nested-intel-translate-2 nested-intel-translate-pae nested-intel-translate-4
intel-nested|kvm_intel nested: L2 unpaged, 2-level, PAE, 4-level over 4-level EPT|nested-intel|10000|20000|0|nested-intel-ept-unpaged nested-intel-ept-2 nested-intel-ept-pae nested-intel-ept-4
intel-daemon|The daemon in that bed over gRPC, unpaged to 4-level, alone and as a real L2 over EPT|nested-intel|1000|0|0|nested-intel-daemon-translate-* nested-intel-daemon-ept-*
intel-toggled|L2s that run there: entered and left under 4 clients, and observed|nested-intel|500|0|0|nested-intel-daemon-toggled nested-intel-daemon-observed
intel-running|L2s that run there: L1 restored, L2 crashed, requests refused|nested-intel|20|0|0|nested-intel-daemon-restored nested-intel-daemon-crashed nested-intel-daemon-refused
intel-exit|kvm_intel in Bochs: executed accesses of an L2, exit qualification as L1 sees it|nested-intel|1000|5000|0|nested-intel-vmentry-unpaged nested-intel-vmentry-2 nested-intel-vmentry-pae nested-intel-vmentry-4
tcg-mmu|QEMU's own MMU on stock Linux, every `info tlb` entry|qemu|20000|0|0|linux-4-level-info-tlb linux-5-level-info-tlb linux-2-level-info-tlb linux-pae-info-tlb
tcg-asked|Random addresses of those guests, `gva2gpa`|qemu|20000|0|0|linux-4-level-gva2gpa linux-5-level-gva2gpa linux-2-level-gva2gpa linux-pae-gva2gpa
tcg-rights|The rights of their ranges, `info mem`|qemu|500|0|0|linux-4-level-info-mem linux-2-level-info-mem linux-pae-info-mem
tcg-user|What a program in them has mapped, byte by byte|qemu|10000|0|0|linux-4-level-user linux-5-level-user linux-2-level-user linux-pae-user
map|The whole map of those guests is the whole of `info tlb`, page by page|qemu|20000|0|0|linux-4-level-map linux-5-level-map linux-2-level-map linux-pae-map
attached|The daemon attached to such guests: `info tlb`, `gva2gpa`|qemu|20000|0|0|attached-4-level-translation attached-5-level-translation attached-2-level-translation attached-pae-translation attached-5-level-private-translation
attached-bytes|Bytes read there: `memsave`, and what the guest's program announced|qemu|1000|0|0|attached-4-level-bytes attached-5-level-bytes attached-2-level-bytes attached-pae-bytes attached-5-level-private-bytes
dump|Dumps of those guests, with paging=true as well: addresses and bytes|qemu|20000|0|0|linux-4-level-dump linux-5-level-dump linux-2-level-dump linux-pae-dump linux-5-level-private-dump linux-5-level-paging-dump linux-pae-paging-dump
dump-volatility|The same dumps read by volatility3, 4-level and 5-level|qemu volatility3|5000|0|0|volatility-4-level-dump volatility-5-level-dump
dump-drgn|The kernel's address space in the same dumps, read by drgn|qemu drgn|5000|0|0|drgn-4-level-dump drgn-5-level-dump
attached-symbols|Such guests' kernels by their symbols, KASLR on and off: kallsyms, `gva2gpa`|qemu|4000|0|0|attached-symbols
attached-spaces|Their address spaces, active or not, and the halves under page-table isolation|qemu|500|0|0|attached-spaces
validated|A page remapped without pause: no validated answer mixes two mappings||10000000|0|0|validated
validated-kvm|The same on a vCPU of KVM's, whose guest remaps a page of its own|kvm|1000000|0|0|validated-kvm
attached-tasks|The processes that have them, halves included, by the kernel's BTF|qemu|50|0|0|attached-tasks-4-level attached-tasks-5-level
oracle|The independent oracle, odometer and soup||5000000|0|0|oracle
exhaustive|Loop-free rules, every input: reserved bits, canonicality, rights, keys||30000000|0|0|exhaustive
fuzz|Fuzzing the walker: panics, step bound, hangs, contradictions||100000|0|SECONDS|fuzz-walk fuzz-registers
fuzz-daemon|Fuzzing the daemon: requests, words, dumps and images of any kind||10000|0|SECONDS|fuzz-requests fuzz-words fuzz-dumps fuzz-images
mutants|Mutants of the walker, each caught by a judge|kvm|205|0|0|mutants
model|Interleavings of kicks and publications||5000|0|0|loom-publication
slips|Slips in them, each found by an interleaving||9|0|0|loom-slips
ROWS
}

table() {
    rows | sed "s/|SECONDS|/|${PAGEWALK_FUZZ_SECONDS:-60}|/" | awk -F'|' -v required=",${PAGEWALK_REQUIRE:-}," '
        FNR == NR {
            count++
            name[count] = $1; title[count] = $2; bed[count] = $3
            each[count] = $4; all[count] = $5; seconds[count] = $6; judges[count] = $7
            next
        }
        { sub(/\r$/, "") }
        # A judge that ran twice in one log: its last word.
        match($0, /^judge [^ ]+: [0-9]+ cases, [0-9]+ disagreements, [0-9.]+ s$/) {
            split($0, word, / +/)
            who = substr(word[2], 1, length(word[2]) - 1)
            cases[who] = word[3]; disagreements[who] = word[5]; time[who] = word[7]
        }
        /^SKIPPED / { where = $0; sub(/^SKIPPED /, "", where); sub(/:.*/, "", where); skipped[where] = 1 }
        function thousands(number,   text, out) {
            text = sprintf("%d", number); out = ""
            while (length(text) > 3) { out = "," substr(text, length(text) - 2) out; text = substr(text, 1, length(text) - 3) }
            return text out
        }
        END {
            line = "| %-70s | %13s | %-22s | %13s | %9s | %s\n"
            printf line, "judge", "cases", "at least", "disagreements", "seconds", "verdict |"
            printf "|%s|%s:|%s|%s:|%s:|---|\n", dashes(72), dashes(14), dashes(24), dashes(14), dashes(10)
            for (row = 1; row <= count; row++) {
                total = wrong = 0; spent = 0.0; missing = short = ""
                wanted = split(judges[row], want, " ")
                for (n = 1; n <= wanted; n++) {
                    pattern = want[n]; gsub(/\*/, ".*", pattern); found = 0
                    for (who in cases) if (who ~ "^" pattern "$") {
                        found++
                        total += cases[who]; wrong += disagreements[who]; spent += time[who]
                        if (cases[who] + 0 < each[row] + 0 || time[who] + 0 < seconds[row] + 0) short = short " " who
                    }
                    if (!found) missing = missing " " want[n]
                }
                if (total < all[row] + 0) short = short " in all"
                least = each[row] > 0 && wanted > 1 ? thousands(each[row]) " each" : thousands(each[row])
                if (all[row] > 0) least = thousands(all[row])
                if (seconds[row] > 0) least = seconds[row] " s each"
                absent = 0; beds = split(bed[row], needed, " ")
                for (n = 1; n <= beds; n++)
                    if (skipped[needed[n]] && index(required, "," needed[n] ",") == 0) absent = 1
                if (wrong > 0) verdict = "DISAGREES"
                else if (missing != "" && total == 0 && absent) verdict = "SKIPPED"
                else if (missing != "") verdict = "MISSING:" missing
                else if (short != "") verdict = "SHORT:" short
                else verdict = "OK"
                if (verdict != "OK" && verdict != "SKIPPED") failed++
                printf line, title[row], thousands(total), least, wrong, sprintf("%.1f", spent), verdict " |"
                said[row] = sprintf("judge row-%s: %d cases, %d disagreements, %.1f s", name[row], total, wrong, spent)
            }
            print ""
            for (row = 1; row <= count; row++) print said[row]
            for (who in cases) {
                listed = who ~ /^row-/
                for (row = 1; row <= count; row++) {
                    wanted = split(judges[row], want, " ")
                    for (n = 1; n <= wanted; n++) { pattern = want[n]; gsub(/\*/, ".*", pattern); if (who ~ "^" pattern "$") listed = 1 }
                }
                if (!listed) { printf "judge %s is in no row\n", who; strays++ }
            }
            if (failed) printf "\n%d of %d rows are not as they have to be\n", failed, count
            if (failed || strays) exit 1
        }
        function dashes(n,   text) { text = ""; while (n-- > 0) text = text "-"; return text }
    ' - "$1"
}

# Test targets that judge: by the name that they have in their crates.
targets() {
    local package file
    for package in walker:pagewalk server:pagewalkd; do
        for file in "${package%%:*}"/tests/{judge_*,mutants.rs,model,attached}; do
            [ -e "$file" ] && printf -- '%s %s\n' "${package##*:}" "$(basename "$file" .rs)"
        done
    done
}

run() {
    local log status=0 package target
    log=$(realpath "${CARGO_TARGET_DIR:-target}")/judges.log
    : >"$log"
    while read -r package target; do
        cargo test --locked -p "$package" --test "$target" 2>&1 | tee -a "$log" || status=1
    done < <(targets)
    walker/fuzz/run.sh "${PAGEWALK_FUZZ_SECONDS:-60}" 2>&1 | tee -a "$log" || status=1
    echo
    table "$log" || status=1
    exit "$status"
}

case "${1-}" in
    "") run ;;
    table) [ -f "${2-}" ] || { echo "usage: $0 table LOG" >&2; exit 2; }; table "$2" ;;
    *) echo "usage: $0 | table LOG" >&2; exit 2 ;;
esac
