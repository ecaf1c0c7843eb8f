//! Worked examples: addresses taken apart and error codes put together by hand, so that the oracle does not rest on itself.

mod checks;
mod ept;

use std::collections::BTreeMap;

use super::{
    Answer, By, Cause, Cpu, Event, Kind, Nature, Page, Physical, Refusal, Registers, Request, Second, Size,
    System, Written, translate,
};

/// Each example and what it shows.
pub(crate) const EXAMPLES: &[(&str, fn())] = &[
    ("two_level_4_kib", two_level_4_kib),
    ("two_level_4_mib_needs_pse", two_level_4_mib_needs_pse),
    ("two_level_pse_36", two_level_pse_36),
    ("two_level_reports_fetches_for_smep_alone", two_level_reports_fetches_for_smep_alone),
    ("two_level_accessed_and_dirty", two_level_accessed_and_dirty),
    ("pae_by_registers", pae_by_registers),
    ("pae_absent_register", pae_absent_register),
    ("pae_2_mib_above_4_gib", pae_2_mib_above_4_gib),
    ("pae_reserves_up_to_bit_62", pae_reserves_up_to_bit_62),
    ("pae_from_memory_when_nested", pae_from_memory_when_nested),
    ("npt_in_the_formats_of_a_32_bit_host", npt_in_the_formats_of_a_32_bit_host),
    ("four_level_every_page_size", four_level_every_page_size),
    ("five_level_selects_by_bits_56_to_48", five_level_selects_by_bits_56_to_48),
    ("non_canonical", non_canonical),
    ("error_codes_of_the_manual", error_codes_of_the_manual),
    ("exit_info_of_nested_faults", exit_info_of_nested_faults),
    ("a_shadow_stack_in_every_mode", checks::a_shadow_stack_in_every_mode),
    ("what_is_no_shadow_stack", checks::what_is_no_shadow_stack),
    ("keys_of_supervisor_pages", checks::keys_of_supervisor_pages),
    ("linear_address_masking", checks::linear_address_masking),
    ("upper_address_ignore", checks::upper_address_ignore),
    ("encryption_is_no_address_bit", checks::encryption_is_no_address_bit),
    ("guest_mode_execute_trap", checks::guest_mode_execute_trap),
    ("ept_every_page_size", ept::every_page_size),
    ("ept_is_as_wide_as_its_levels", ept::as_wide_as_its_levels),
    ("ept_misconfigurations", ept::misconfigurations),
    ("ept_violations_of_the_final_address", ept::violations_of_the_final_address),
    ("ept_violations_of_a_table", ept::violations_of_a_table),
    ("ept_advanced_information", ept::advanced_information),
    ("ept_mode_based_execute", ept::mode_based_execute),
    ("ept_supervisor_shadow_stack", ept::supervisor_shadow_stack),
    ("ept_loads_pdptes_as_reads", ept::loads_pdptes_as_reads),
    ("ept_accessed_and_dirty", ept::accessed_and_dirty),
    ("ept_guest_flags_need_a_writable_page", ept::guest_flags_need_a_writable_page),
];

/// Eight-byte words; the address space ends at 1 MiB, but for those.
struct Words(BTreeMap<u64, u64>);

impl Words {
    fn new(words: &[(u64, u64)]) -> Words {
        Words(words.iter().copied().collect())
    }
}

impl Physical for Words {
    fn read(&self, address: u64) -> Option<u64> {
        assert_eq!(address % 8, 0);
        match self.0.get(&address) {
            Some(word) => Some(*word),
            None => (address < 1 << 20).then_some(0),
        }
    }

    fn nature(&self, address: u64) -> Nature {
        if address < 1 << 20 { Nature::Ram } else { Nature::Nothing }
    }
}

const CPU: Cpu = Cpu { amd: false, maxphyaddr: 36, page1gb: true, encryption_bit: None };
const PG_PE_WP: u64 = 0x8001_0001;
const PSE: u64 = 1 << 4;
const PAE: u64 = 1 << 5;
const LA57: u64 = 1 << 12;
const SMEP: u64 = 1 << 20;
const SMAP: u64 = 1 << 21;
const PKE: u64 = 1 << 22;
const LME_LMA: u64 = 0x500;
const NXE: u64 = 1 << 11;

fn system(cr3: u64, cr4: u64, efer: u64) -> System {
    let registers = Registers { cr0: PG_PE_WP, cr3, cr4, efer };
    System { registers, cpu: CPU, pdpte_registers: None, second: None }
}

fn ask(system: &System, words: &[(u64, u64)], kind: Kind, by: By, linear: u64) -> Answer {
    let request = Request { linear, kind, by, ac: false, pkru: 0, pkrs: 0, stack: false };
    translate(system, &Words::new(words), request)
}

#[track_caller]
fn page(answer: &Answer) -> Page {
    answer.outcome.expect("a page")
}

#[track_caller]
fn refused(answer: &Answer) -> Refusal {
    answer.outcome.expect_err("a refusal")
}

/// 0x0040_3abc is PDE 1, PTE 3, offset 0xabc. Both entries are upper halves of their words.
fn two_level_4_kib() {
    let words = [(0x1000, 0x2007 << 32), (0x2008, 0x5_6067 << 32)];
    let page = page(&ask(&system(0x1fff, PSE, 0), &words, Kind::Write, By::User, 0x0040_3abc));
    assert_eq!((page.physical, page.size, page.entry), (0x5_6abc, Size::FourKib, 0x5_6067));
    assert!(page.granted.write && page.granted.user && page.granted.execute && page.dirty);
}

/// 0xc012_3456 is PDE 0x300, offset 0x12_3456 in a 4-MByte page.
fn two_level_4_mib_needs_pse() {
    let words = [(0x1c00, 0x0800_0087)];
    let mapped = page(&ask(&system(0x1000, PSE, 0), &words, Kind::Read, By::User, 0xc012_3456));
    assert_eq!((mapped.physical, mapped.size), (0x0812_3456, Size::FourMib));
    let table = refused(&ask(&system(0x1000, 0, 0), &words, Kind::Read, By::User, 0xc012_3456));
    // PTE 0x123 of a table at 0x0800_0000, where nothing is.
    assert_eq!((table.event, table.level, table.at), (Event::Unbacked, 1, 0x0800_048c));
}

/// With 36 bits, PDE bits 16:13 are address bits 35:32, and bits 21:17 are reserved. With 32 bits all of 21:13 are, with 40 and
/// more only bit 21.
fn two_level_pse_36() {
    let ask = |maxphyaddr, pde| {
        let mut system = system(0x1000, PSE, 0);
        system.cpu.maxphyaddr = maxphyaddr;
        ask(&system, &[(0x1000, pde)], Kind::Read, By::Supervisor, 0x1234)
    };
    assert_eq!(page(&ask(36, 0x0801_2083)).physical, 0x9_0800_1234);
    for (maxphyaddr, pde, bits) in
        [(36, 0x0802_0083, 0x2_0000), (32, 0x0800_2083, 0x2000), (52, 0x0820_0083, 0x20_0000)]
    {
        let refused = refused(&ask(maxphyaddr, pde));
        assert_eq!((refused.event, refused.bits, refused.level), (Event::PageFault(9), bits, 2));
    }
    assert_eq!(page(&ask(52, 0x0810_0083)).physical, 0x80_0800_1234);
}

/// EFER.NXE means nothing without CR4.PAE.
fn two_level_reports_fetches_for_smep_alone() {
    let fetch = |cr4| refused(&ask(&system(0x1000, cr4, NXE), &[], Kind::Fetch, By::User, 0)).event;
    assert_eq!(fetch(0), Event::PageFault(4));
    assert_eq!(fetch(SMEP), Event::PageFault(0x14));
}

fn two_level_accessed_and_dirty() {
    let words = [(0x1000, 0x2007 << 32), (0x2008, 0x5_6007 << 32)];
    let answer = ask(&system(0x1000, 0, 0), &words, Kind::Write, By::User, 0x0040_3abc);
    let written = |address, entry| Written { address, entry, bytes: 4 };
    assert_eq!(answer.written, [written(0x1004, 0x2027), written(0x200c, 0x5_6067)]);
}

/// 0x4020_1234 is PDPTE 1, PDE 1, PTE 1, offset 0x234.
fn pae_by_registers() {
    let mut system = system(0, PAE, NXE);
    system.pdpte_registers = Some([0, 0x3001, 0, 0]);
    let words = [(0x3008, 0x4007), (0x4008, 0x8000_0001_2345_6067)];
    let read = page(&ask(&system, &words, Kind::Read, By::User, 0x4020_1234));
    assert_eq!((read.physical, read.size, read.granted.execute), (0x1_2345_6234, Size::FourKib, false));
    let fetch = refused(&ask(&system, &words, Kind::Fetch, By::User, 0x4020_1234));
    assert_eq!((fetch.event, fetch.cause, fetch.bits), (Event::PageFault(0x15), Cause::NoExecute, 1 << 63));
    // The register gives no rights and takes none, and has no accessed bit.
    let written = ask(&system, &words, Kind::Write, By::User, 0x4020_1234).written;
    assert_eq!(written, [Written { address: 0x3008, entry: 0x4027, bytes: 8 }]);
}

/// The other bits of an absent PDPTE are ignored.
fn pae_absent_register() {
    let mut system = system(0, PAE, 0);
    system.pdpte_registers = Some([0xffff_ffff_ffff_fffe, 0, 0, 0]);
    let refused = refused(&ask(&system, &[], Kind::Write, By::Supervisor, 0x3fff_ffff));
    assert_eq!((refused.event, refused.level, refused.at), (Event::PageFault(2), 3, 0));
}

fn pae_2_mib_above_4_gib() {
    let mut system = system(0, PAE, 0);
    system.pdpte_registers = Some([0, 0, 0, 0x2001]);
    let page = page(&ask(&system, &[(0x2ff8, 0x9_fee0_0087)], Kind::Read, By::User, 0xffff_fff8));
    assert_eq!((page.physical, page.size), (0x9_feff_fff8, Size::TwoMib));
}

/// In long mode bit 62 would be part of a key, and bits 58:52 free.
fn pae_reserves_up_to_bit_62() {
    let mut system = system(0, PAE, NXE);
    system.pdpte_registers = Some([0x2001, 0, 0, 0]);
    for bit in 36..63 {
        let refused = refused(&ask(&system, &[(0x2000, 0x3007 | 1 << bit)], Kind::Read, By::User, 0));
        assert_eq!((refused.event, refused.bits), (Event::PageFault(0xd), 1 << bit));
    }
}

/// Nested tables of a long-mode host that map the first GiB onto itself.
const IDENTITY: [(u64, u64); 2] = [(0x8000, 0x9027), (0x9000, 0xe7)];
const HOST: Registers = Registers { cr0: PG_PE_WP, cr3: 0, cr4: PAE, efer: LME_LMA | NXE };

fn nested(guest: System) -> System {
    System { second: Some(Second::Npt { ncr3: 0x8000, host: HOST, cpu: CPU, gmet: false }), ..guest }
}

/// A table at CR3 bits 31:5; the entry is read, and a reserved bit in it is a page fault of the guest.
fn pae_from_memory_when_nested() {
    let system = nested(system(0x10f8, PAE, 0));
    let read = |pdpte| {
        let words = [&IDENTITY[..], &[(0x10e8, pdpte), (0x2000, 0x8_0087)]].concat();
        ask(&system, &words, Kind::Read, By::User, 0x4000_0000)
    };
    let answer = read(0x2001);
    // The PDE maps 0x8_0000 as a 2-MByte page: its bit 19 is reserved.
    assert_eq!(refused(&answer).bits, 0x8_0000);
    for bit in [1, 2, 5, 6, 7, 8, 36, 63] {
        let refused = refused(&read(0x2001 | 1 << bit));
        assert_eq!((refused.event, refused.level, refused.bits), (Event::PageFault(0xd), 3, 1 << bit));
    }
    let words = [&IDENTITY[..], &[(0x10e8, 0x2001), (0x2000, 0x0087)]].concat();
    let sound = ask(&system, &words, Kind::Read, By::User, 0x4000_1234);
    assert_eq!(sound.written, [Written { address: 0x2000, entry: 0xa7, bytes: 8 }]);
    assert_eq!(page(&sound).nested, Some((0x1234, Size::OneGib)));
}

/// A guest without paging, whose addresses go through the host's tables at once: 0x4040_2234 is PDE 0x101, PTE 2, offset 0x234 in
/// 2-level paging; 0x4020_1234 is PDPTE 1, PDE 1, PTE 1 in PAE paging.
fn npt_in_the_formats_of_a_32_bit_host() {
    let guest = |ncr3, cr4| {
        let mut system = system(0, 0, 0);
        system.registers.cr0 = 1;
        let host = Registers { cr0: PG_PE_WP, cr3: 0, cr4, efer: 0 };
        system.second = Some(Second::Npt { ncr3, host, cpu: CPU, gmet: false });
        system
    };
    let two_level = [(0x1400, 0x2007 << 32), (0x2008, 0x5_6007)];
    let mapped = page(&ask(&guest(0x1000, 0), &two_level, Kind::Read, By::Supervisor, 0x4040_2234));
    assert_eq!((mapped.physical, mapped.nested), (0x5_6234, Some((0x4040_2234, Size::FourKib))));
    let pae = [(0x10e8, 0x3001), (0x3008, 0x4007), (0x4008, 0x5_6003)];
    let refused = refused(&ask(&guest(0x10e0, PAE), &pae, Kind::Write, By::Supervisor, 0x4020_1234));
    let (event, cause) = (Event::NestedPageFault(0x1_0000_0007), Cause::SupervisorPage);
    assert_eq!((refused.event, refused.cause, refused.at), (event, cause, 0x4008));
}

/// 0x0080_c060_4abc is PML4E 1, PDPTE 3, PDE 3, PTE 4, offset 0xabc.
fn four_level_every_page_size() {
    let linear = 0x0080_c060_4abc;
    let to = |pdpte, pde, pte| {
        let words = [(0x1008, 0x2007), (0x2018, pdpte), (0x3018, pde), (0x4020, pte)];
        let page = page(&ask(&system(0x1018, PAE, LME_LMA), &words, Kind::Read, By::User, linear));
        (page.physical, page.size)
    };
    assert_eq!(to(0x3007, 0x4007, 0x9_8765_4087), (0x9_8765_4abc, Size::FourKib));
    assert_eq!(to(0x3007, 0x9_8760_1087, 0), (0x9_8760_4abc, Size::TwoMib));
    assert_eq!(to(0x9_8000_1087, 0, 0), (0x9_8060_4abc, Size::OneGib));
}

/// 0x00ab_0000_0000_0000 is PML5E 0xab and nothing but.
fn five_level_selects_by_bits_56_to_48() {
    let words = [(0x1558, 0x2007), (0x2000, 0x3007), (0x3000, 0x87)];
    let system = system(0x1000, PAE | LA57, LME_LMA);
    let page = page(&ask(&system, &words, Kind::Read, By::User, 0x00ab_0000_0000_0123));
    assert_eq!((page.physical, page.size), (0x123, Size::OneGib));
}

fn non_canonical() {
    let ask = |cr4, linear, stack| {
        let request = Request { linear, kind: Kind::Read, by: By::User, ac: false, pkru: 0, pkrs: 0, stack };
        translate(&system(0x1000, cr4, LME_LMA), &Words::new(&[]), request).outcome.unwrap_err().event
    };
    for linear in [0x0000_8000_0000_0000, 0xffff_7fff_ffff_ffff, 0x8000_0000_0000_0000] {
        assert_eq!(ask(PAE, linear, false), Event::GeneralProtection);
        assert_eq!(ask(PAE, linear, true), Event::StackFault);
    }
    for linear in [0x0000_7fff_ffff_ffff, 0xffff_8000_0000_0000] {
        assert_eq!(ask(PAE, linear, false), Event::PageFault(4));
    }
    for linear in [0x0100_0000_0000_0000, 0xfeff_ffff_ffff_ffff] {
        assert_eq!(ask(PAE | LA57, linear, false), Event::GeneralProtection);
    }
    for linear in [0x00ff_ffff_ffff_ffff, 0xff00_0000_0000_0000, 0x0000_8000_0000_0000] {
        assert_eq!(ask(PAE | LA57, linear, false), Event::PageFault(4));
    }
}

fn error_codes_of_the_manual() {
    let code = |cr4, leaf, kind, by, pkru| {
        let words = [(0x1000, 0x2007), (0x2000, leaf)];
        let request = Request { linear: 0, kind, by, ac: false, pkru, pkrs: 0, stack: false };
        match translate(&system(0x1000, PAE | cr4, LME_LMA | NXE), &Words::new(&words), request).outcome {
            Ok(_) => None,
            Err(Refusal { event: Event::PageFault(code), cause, .. }) => Some((code, cause)),
            Err(other) => panic!("{other:?}"),
        }
    };
    let (user, kernel) = (By::User, By::Supervisor);
    // A read-only user page under key 5, and PKRU that disables writes to it.
    let read_only = 0x85 | 5 << 59;
    let write_disable = 2 << 10;
    assert_eq!(code(0, 0x83, Kind::Read, user, 0), Some((5, Cause::SupervisorPage)));
    assert_eq!(code(0, 0x85, Kind::Write, user, 0), Some((7, Cause::ReadOnly)));
    assert_eq!(code(0, 0x85, Kind::Write, kernel, 0), Some((3, Cause::ReadOnly)));
    assert_eq!(code(0, 0x87 | 1 << 63, Kind::Fetch, kernel, 0), Some((0x11, Cause::NoExecute)));
    assert_eq!(code(SMEP, 0x87, Kind::Fetch, kernel, 0), Some((0x11, Cause::Smep)));
    assert_eq!(code(SMAP, 0x87, Kind::Read, kernel, 0), Some((1, Cause::Smap)));
    assert_eq!(code(SMAP, 0x87, Kind::Fetch, kernel, 0), None);
    assert_eq!(
        code(PKE, 0x87 | 5 << 59, Kind::Write, user, write_disable),
        Some((0x27, Cause::ProtectionKey))
    );
    assert_eq!(code(PKE, read_only, Kind::Write, user, write_disable), Some((0x27, Cause::ReadOnly)));
    assert_eq!(code(PKE, read_only, Kind::Read, user, write_disable), None);
    assert_eq!(code(PKE, 0x83 | 5 << 59, Kind::Write, kernel, 3 << 10), None);
    assert_eq!(code(0, 0x2087, Kind::Write, user, 0), Some((0xf, Cause::ReservedBits)));
    assert_eq!(code(0, 0, Kind::Fetch, user, 0), Some((0x14, Cause::NotPresent)));
}

fn exit_info_of_nested_faults() {
    let system = nested(system(0x1000, PAE, LME_LMA));
    let event = |nested_leaf, kind| {
        // The guest's PML4 and PDPT lie in the first GiB; the final address in the second.
        let guest = [(0x1000, 0x2007), (0x2000, 0x4000_0087), (0x9008, nested_leaf)];
        let words = [&IDENTITY[..], &guest].concat();
        let refused = refused(&ask(&system, &words, kind, By::Supervisor, 0x123));
        assert_eq!((refused.nested, refused.linear), (Some(0x4000_0123), 0x123));
        refused.event
    };
    assert_eq!(event(0, Kind::Read), Event::NestedPageFault(0x1_0000_0004));
    assert_eq!(event(0x4000_0085, Kind::Write), Event::NestedPageFault(0x1_0000_0007));
    assert_eq!(event(0x4000_0087 | 1 << 63, Kind::Fetch), Event::NestedPageFault(0x1_0000_0015));
    assert_eq!(event(0x4000_2087, Kind::Read), Event::NestedPageFault(0x1_0000_000d));

    // A table that the nested tables make read-only: its walk counts as a user write.
    let words = [(0x8000, 0x9027), (0x9000, 0x85), (0x1000, 0x2007)];
    let table = refused(&ask(&system, &words, Kind::Fetch, By::User, 0x123));
    assert_eq!((table.event, table.nested), (Event::NestedPageFault(0x2_0000_0007), Some(0x1000)));
}
