//! The classes that cases are counted in, so that many easy ones cannot hide that the hard ones are missing.

use super::host::Host;
use super::path::Shape;
use super::setup::Setup;
use crate::judge::Judge;
use crate::oracle::{Answer, By, Cause, Dimension, Event, Kind, Nature, Request, Second, Size};

/// Minimum counts, of this many cases: about a third of what a run has.
pub(crate) const MINIMA_FOR: u64 = 200_000;
pub(crate) const MINIMA: &[(&str, &[u64], u64)] = &[
    ("rights", &[0], 6_250),
    ("protection keys", &[0], 4_380),
    ("entry", &[0], 6_800),
    ("order", &[0], 2_170),
    ("canonicality", &[0], 620),
    ("shadow stack", &[0], 3_120),
    ("masking", &[0], 2_500),
    ("accessed and dirty", &[0], 2_260),
    ("nested", &[0], 9_380),
    ("soup", &[0], 14_390),
    ("nested over EPT", &[0], 4_500),
    ("EPT entry", &[0], 3_030),
    ("EPT rights", &[0], 3_030),
    ("second dimension alone", &[0], 2_000),
    ("unpaged", &[0], 3_000),
    ("2-level", &[0], 3_000),
    ("PAE", &[0], 2_000),
    ("4-level", &[0], 4_000),
    ("5-level", &[0], 4_000),
    ("over 2-level NPT", &[0], 630),
    ("over PAE NPT", &[0], 680),
    ("over 4-level NPT", &[0], 580),
    ("over 5-level NPT", &[0], 550),
    ("over 4-level EPT", &[0], 900),
    ("over 5-level EPT", &[0], 800),
    ("mapped as is", &[0], 800),
    ("mapped 4 KiB", &[0], 5_000),
    ("mapped 2 MiB", &[0], 2_000),
    ("mapped 4 MiB", &[0], 300),
    ("mapped 1 GiB", &[0], 1_500),
    ("nested mapped as is", &[0], 1_900),
    ("nested mapped 4 KiB", &[0], 1_000),
    ("nested mapped 2 MiB", &[0], 700),
    ("nested mapped 4 MiB", &[0], 500),
    ("nested mapped 1 GiB", &[0], 400),
    ("bits set", &[0], 12_000),
    ("lost race, then allowed", &[0], 100),
    ("lost race, then refused", &[0], 100),
    ("bits skipped", &[0], 1_330),
    ("no backing", &[0], 8_000),
    ("#GP", &[0], 150),
    ("#SS", &[0], 150),
    ("#PF code", &[0x00, 0x02, 0x04, 0x06], 1_000),
    ("#PF code", &[0x01, 0x03, 0x05, 0x07], 300),
    ("#PF code", &[0x09, 0x0b, 0x0d, 0x0f], 1_000),
    ("#PF code", &[0x10, 0x11, 0x14, 0x15, 0x19, 0x1d], 380),
    ("#PF code", &[0x21, 0x23, 0x25, 0x27], 150),
    ("#PF code", &[0x40, 0x41, 0x42, 0x43, 0x44, 0x45, 0x46, 0x47], 90),
    ("#PF code", &[0x49, 0x4b, 0x4d, 0x4f], 45),
    ("#PF code", &[0x61, 0x63, 0x65, 0x67], 93),
    ("NPF code", &[0x1_0000_0004, 0x1_0000_0006], 150),
    ("NPF code", &[0x1_0000_0014, 0x1_0000_001d], 60),
    ("NPF code", &[0x1_0000_0005, 0x1_0000_0007], 39),
    ("NPF code", &[0x1_0000_0015], 15),
    ("NPF code", &[0x1_0000_000d, 0x1_0000_000f], 150),
    ("NPF code", &[0x1_0000_0011], 50),
    ("GMET at level", &[1, 2], 50),
    ("GMET at level", &[3], 8),
    ("EPT violation access code", &[0x01], 500),
    ("EPT violation access code", &[0x81, 0x83], 580),
    ("EPT violation access code", &[0x181, 0x182, 0x184], 250),
    ("EPT violation access code", &[0x2181, 0x2182], 80),
    ("EPT violation rights code", &[0x00, 0x08, 0x20, 0x28, 0x40, 0x48, 0x60, 0x68], 35),
    ("EPT violation rights code", &[0x18], 20),
    ("EPT violation rights code", &[0x38, 0x58, 0x78], 1),
    ("EPT violation advanced code", &[0x200, 0x400, 0x600], 20),
    ("EPT violation advanced code", &[0x800, 0xa00, 0xc00, 0xe00], 5),
    ("EPT violation tells of bit 60", &[0], 380),
    ("EPT misconfiguration", &[0], 6_000),
    ("EPT write without read at level", &[1, 2, 3, 4, 5], 140),
    ("EPT execute only at level", &[1, 2, 3, 4, 5], 45),
    ("EPT memory type at level", &[1], 56),
    ("EPT memory type at level", &[2, 3], 8),
    ("EPT not readable at level", &[1, 2, 3, 4, 5], 33),
    ("EPT supervisor shadow stack allowed", &[0], 3),
    ("EPT no supervisor shadow stack at level", &[1, 2, 3], 3),
    ("NPF code", &[0x2_0000_0006, 0x2_0000_0007, 0x2_0000_000f], 530),
    ("not present at level", &[1, 2, 3, 4, 5], 820),
    ("reserved bits at level", &[1, 2, 3, 4, 5], 1_000),
    ("unbacked at level", &[1, 2, 3, 4], 350),
    ("unbacked at level", &[5], 18),
    ("supervisor page at level", &[1, 2, 3, 4], 300),
    ("supervisor page at level", &[5], 80),
    ("no execute at level", &[1, 2, 3, 4], 38),
    ("no execute at level", &[5], 9),
    ("read only at level", &[1, 2, 3, 4], 65),
    ("read only at level", &[5], 16),
    ("SMEP at level", &[1, 2, 3], 60),
    ("SMAP at level", &[1, 2, 3], 150),
    ("protection key at level", &[1, 2, 3], 60),
    ("refused by PKRU", &[0], 500),
    ("refused by PKRS", &[0], 570),
    ("shadow-stack access allowed", &[0], 340),
    ("no shadow stack at level", &[1, 2, 3, 4], 69),
    ("no shadow stack at level", &[5], 32),
    ("supervisor access to a user's shadow stack at level", &[1, 2, 3], 170),
    ("metadata dropped: LAM_U48 or LAM_U57", &[0], 180),
    ("metadata dropped: LAM_SUP", &[0], 170),
    ("metadata dropped: UAI", &[0], 50),
    ("not canonical: LAM_U48 or LAM_U57", &[0], 500),
    ("not canonical: LAM_SUP", &[0], 500),
    ("not canonical: UAI", &[0], 320),
    ("encrypted page", &[0], 52),
    ("nested too wide", &[0], 1_350),
    ("nested not present at level", &[1, 2, 3, 4, 5], 250),
    ("nested reserved bits at level", &[1, 2, 3, 4, 5], 200),
    ("nested unbacked at level", &[1, 2, 3, 4], 130),
    ("nested supervisor page at level", &[1, 2, 3, 4], 30),
    ("nested supervisor page at level", &[5], 15),
    ("nested read only at level", &[1, 2, 3, 4, 5], 40),
    ("nested no execute at level", &[1, 2, 3, 4, 5], 3),
];

pub(crate) fn classify(judge: &mut Judge, setup: &Setup, request: &Request, answer: &Answer) {
    with_metadata(judge, setup, request, answer);
    match &answer.outcome {
        Ok(page) => {
            let shadow_stack = of_a_shadow_stack(setup, request);
            judge.count_if("shadow-stack access allowed", shadow_stack);
            let marked = matches!(setup.system.second, Some(Second::Ept { eptp, .. }) if eptp >> 7 & 1 == 1);
            let not_writable = page.granted.read && !page.granted.write;
            let by_mark = shadow_stack && marked && not_writable && request.by != By::User;
            judge.count_if("EPT supervisor shadow stack allowed", by_mark && page.size == Size::Unpaged);
            let encryption = setup.system.cpu.encryption_bit;
            judge.count_if(
                "encrypted page",
                encryption.is_some_and(|bit| page.entry >> bit & 1 == 1) && setup.shape.0 > 2,
            );
            let modes = ["unpaged", "", "2-level", "PAE", "4-level", "5-level"];
            judge.count(modes[setup.shape.0 as usize], 0);
            if let Some(host) = setup.host {
                let class = match host {
                    Host::Npt(Shape(2)) => "over 2-level NPT",
                    Host::Npt(Shape(3)) => "over PAE NPT",
                    Host::Npt(Shape(4)) => "over 4-level NPT",
                    Host::Npt(_) => "over 5-level NPT",
                    Host::Ept(4) => "over 4-level EPT",
                    Host::Ept(_) => "over 5-level EPT",
                };
                judge.count(class, 0);
            }
            let nested = page.nested.is_some();
            let class = match (page.size, nested) {
                (Size::Unpaged, false) => "mapped as is",
                (Size::FourKib, false) => "mapped 4 KiB",
                (Size::TwoMib, false) => "mapped 2 MiB",
                (Size::OneGib, false) => "mapped 1 GiB",
                (Size::FourMib, false) => "mapped 4 MiB",
                (Size::FourMib, true) => "nested mapped 4 MiB",
                (Size::Unpaged, true) => "nested mapped as is",
                (Size::FourKib, true) => "nested mapped 4 KiB",
                (Size::TwoMib, true) => "nested mapped 2 MiB",
                (Size::OneGib, true) => "nested mapped 1 GiB",
            };
            judge.count(class, 0);
            judge.count_if("bits set", !answer.written.is_empty());
            judge.count_if("bits skipped", answer.skipped);
            judge.count_if("no backing", page.nature == Nature::Nothing);
        }
        Err(refusal) => {
            match refusal.event {
                Event::PageFault(code) => {
                    judge.count("#PF code", u64::from(code));
                    if refusal.cause == Cause::ProtectionKey {
                        let user_page = answer.visits.last().is_some_and(|leaf| leaf.so_far.user);
                        judge.count(if user_page { "refused by PKRU" } else { "refused by PKRS" }, 0);
                    }
                }
                Event::NestedPageFault(info) => judge.count("NPF code", info),
                Event::EptViolation(qualification) => ept_violation(judge, qualification),
                Event::EptMisconfiguration => judge.count("EPT misconfiguration", 0),
                Event::GeneralProtection => judge.count("#GP", 0),
                Event::StackFault => judge.count("#SS", 0),
                Event::Unbacked => {}
            }
            let guest = refusal.dimension == Dimension::Guest;
            let class = match (refusal.cause, guest) {
                (Cause::NonCanonical, _) => return,
                (Cause::TooWide, _) => "nested too wide",
                (Cause::TableUnbacked, true) => "unbacked at level",
                (Cause::TableUnbacked, false) => "nested unbacked at level",
                (Cause::NotPresent, true) => "not present at level",
                (Cause::NotPresent, false) => "nested not present at level",
                (Cause::ReservedBits, true) => "reserved bits at level",
                (Cause::ReservedBits, false) => "nested reserved bits at level",
                (Cause::SupervisorPage, true) => "supervisor page at level",
                (Cause::SupervisorPage, false) => "nested supervisor page at level",
                (Cause::NoExecute, true) => "no execute at level",
                (Cause::NoExecute, false) => "nested no execute at level",
                (Cause::ReadOnly, true) => "read only at level",
                (Cause::ReadOnly, false) => "nested read only at level",
                (Cause::Smep, _) => "SMEP at level",
                (Cause::Smap, _) => "SMAP at level",
                (Cause::UserShadowStack, _) => "supervisor access to a user's shadow stack at level",
                (Cause::NotShadowStack, true) => "no shadow stack at level",
                (Cause::NotShadowStack, false) => "EPT no supervisor shadow stack at level",
                (Cause::ProtectionKey, _) => "protection key at level",
                (Cause::Gmet, _) => "GMET at level",
                (Cause::NotReadable, _) => "EPT not readable at level",
                (Cause::WriteWithoutRead, _) => "EPT write without read at level",
                (Cause::ExecuteOnly, _) => "EPT execute only at level",
                (Cause::MemoryType, _) => "EPT memory type at level",
            };
            judge.count(class, u64::from(refusal.level));
        }
    }
}

/// The parts of an exit qualification; whole ones are too many to count.
fn ept_violation(judge: &mut Judge, qualification: u64) {
    // What was accessed, on behalf of a linear address or not, as its translation or not, and whether of a shadow stack.
    judge.count("EPT violation access code", qualification & 0x2187);
    judge.count("EPT violation rights code", qualification & 0x78);
    judge.count("EPT violation advanced code", qualification & 0xe00);
    judge.count_if("EPT violation tells of bit 60", qualification >> 14 & 1 == 1);
}

/// Pointers with metadata are those that no CPU without masking would take.
fn with_metadata(judge: &mut Judge, setup: &Setup, request: &Request, answer: &Answer) {
    let spare = match setup.shape.0 {
        5 => 64 - 57,
        4 => 64 - 48,
        _ => return,
    };
    let registers = setup.system.registers;
    let how = match (registers.cr3 >> 61 & 3, registers.cr4 >> 28 & 1, registers.efer >> 20 & 1) {
        (0, 0, 0) => return,
        (.., 1) => 1,
        _ if request.linear >> 63 == 1 => 2,
        _ => 3,
    };
    let refused = answer.outcome.is_err_and(|it| it.cause == Cause::NonCanonical);
    let classes = match refused {
        false if ((request.linear << spare) as i64 >> spare) as u64 == request.linear => return,
        false => {
            ["metadata dropped: UAI", "metadata dropped: LAM_SUP", "metadata dropped: LAM_U48 or LAM_U57"]
        }
        true => ["not canonical: UAI", "not canonical: LAM_SUP", "not canonical: LAM_U48 or LAM_U57"],
    };
    judge.count(classes[how - 1], 0);
}

fn of_a_shadow_stack(setup: &Setup, request: &Request) -> bool {
    let kind = matches!(request.kind, Kind::ShadowStackRead | Kind::ShadowStackWrite);
    kind && setup.system.registers.cr4 >> 23 & 1 == 1 && request.by != By::Exempt
}
