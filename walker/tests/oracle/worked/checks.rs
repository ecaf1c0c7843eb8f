//! Shadow stacks, supervisor keys, pointers with metadata, encryption, and GMET.

use super::*;

const CET: u64 = 1 << 23;
const PKS: u64 = 1 << 24;
const LAM_SUP: u64 = 1 << 28;
const LAM_U57: u64 = 1 << 61;
const LAM_U48: u64 = 1 << 62;
const UAIE: u64 = 1 << 20;

/// In each mode: the leaf is read-only and dirty, all above is writable. The bit 6 is error code's SS.
pub(super) fn a_shadow_stack_in_every_mode() {
    let mut pae = system(0, PAE | CET, 0);
    pae.pdpte_registers = Some([0x2001, 0, 0, 0]);
    let modes = [
        // PDE and PTE of 4 bytes.
        (system(0x1000, CET, 0), vec![(0x1000, 0x2007), (0x2000, 0x5_6045)]),
        // PDPTEs have no R/W to count.
        (pae, vec![(0x2000, 0x3007), (0x3000, 0x5_6045)]),
        (system(0x1000, PAE | CET, LME_LMA), vec![(0x1000, 0x2007), (0x2000, 0xc5)]),
        (system(0x1000, PAE | CET | LA57, LME_LMA), vec![(0x1000, 0x2007), (0x2000, 0x3007), (0x3000, 0xc5)]),
    ];
    for (system, words) in modes {
        for kind in [Kind::ShadowStackRead, Kind::ShadowStackWrite, Kind::Read] {
            let answer = ask(&system, &words, kind, By::User, 0);
            assert!(page(&answer).dirty && !page(&answer).granted.write);
        }
        let data = refused(&ask(&system, &words, Kind::Write, By::User, 0));
        assert_eq!((data.event, data.cause), (Event::PageFault(7), Cause::ReadOnly));
        let read = refused(&ask(&system, &words, Kind::ShadowStackRead, By::Supervisor, 0));
        assert_eq!((read.event, read.cause), (Event::PageFault(0x41), Cause::UserShadowStack));
        let absent = refused(&ask(&system, &[], Kind::ShadowStackWrite, By::User, 0));
        assert_eq!((absent.event, absent.cause), (Event::PageFault(0x46), Cause::NotPresent));
    }
}

pub(super) fn what_is_no_shadow_stack() {
    let code = |cr4, pml4e, leaf, by| {
        let words = [(0x1000, pml4e), (0x2000, leaf)];
        let answer = ask(&system(0x1000, PAE | CET | cr4, LME_LMA), &words, Kind::ShadowStackWrite, by, 0);
        answer.outcome.err().map(|refused| (refused.event, refused.cause))
    };
    let (user, kernel) = (By::User, By::Supervisor);
    let no = Cause::NotShadowStack;
    assert_eq!(code(0, 0x2007, 0xc5, user), None);
    // R/W of the leaf; D; R/W above.
    assert_eq!(code(0, 0x2007, 0xc7, user), Some((Event::PageFault(0x47), no)));
    assert_eq!(code(0, 0x2007, 0x85, user), Some((Event::PageFault(0x47), no)));
    assert_eq!(code(0, 0x2005, 0xc5, user), Some((Event::PageFault(0x47), no)));
    // The supervisor's own; SMAP has no say, and neither mode may use the other's.
    assert_eq!(code(SMAP, 0x2007, 0xc1, kernel), None);
    assert_eq!(code(SMAP, 0x2007, 0xc1, user), Some((Event::PageFault(0x47), Cause::SupervisorPage)));
    assert_eq!(code(0, 0x2007, 0xc5, kernel), Some((Event::PageFault(0x43), Cause::UserShadowStack)));
}

/// Key 5 in bits 62:59; its AD is bit 10 of PKRS and its WD bit 11.
pub(super) fn keys_of_supervisor_pages() {
    let code = |cr0, cr4, leaf: u64, kind, by, pkrs| {
        let words = [(0x1000, 0x2007), (0x2000, leaf | 5 << 59)];
        let request = Request { linear: 0, kind, by, ac: false, pkru: 0, pkrs, stack: false };
        let mut system = system(0x1000, PAE | cr4, LME_LMA | NXE);
        system.registers.cr0 = cr0;
        translate(&system, &Words::new(&words), request).outcome.err().map(|it| (it.event, it.cause))
    };
    let wp = PG_PE_WP;
    let no_wp = 0x8000_0001;
    let (user, kernel) = (By::User, By::Supervisor);
    let key = |code| Some((Event::PageFault(code), Cause::ProtectionKey));
    assert_eq!(code(wp, PKS, 0x83, Kind::Read, kernel, 1 << 10), key(0x21));
    assert_eq!(code(wp, PKS, 0x83, Kind::Read, By::ImplicitSupervisor, 1 << 10), key(0x21));
    assert_eq!(code(wp, PKS, 0x83, Kind::Write, kernel, 1 << 11), key(0x23));
    assert_eq!(code(no_wp, PKS, 0x83, Kind::Write, kernel, 1 << 11), None);
    assert_eq!(code(wp, PKS, 0x83, Kind::Read, kernel, 1 << 11), None);
    assert_eq!(code(wp, PKS, 0x83, Kind::Fetch, kernel, 3 << 10), None);
    assert_eq!(code(wp, 0, 0x83, Kind::Read, kernel, 3 << 10), None);
    // A user page is not PKRS's, and a supervisor page not PKRU's.
    assert_eq!(code(wp, PKS, 0x87, Kind::Read, kernel, 3 << 10), None);
    assert_eq!(code(wp, PKE | PKS, 0x87, Kind::Read, user, 3 << 10), None);
    // PK tells of the key although U/S refuses first.
    let both = Some((Event::PageFault(0x25), Cause::SupervisorPage));
    assert_eq!(code(wp, PKS, 0x83, Kind::Read, user, 1 << 10), both);
    // A shadow stack is data.
    assert_eq!(code(wp, PKS | CET, 0xc1, Kind::ShadowStackWrite, kernel, 1 << 11), key(0x63));
}

fn masked(cr3: u64, cr4: u64, efer: u64, pointer: u64, kind: Kind, stack: bool) -> Result<(), (Event, u64)> {
    // Nothing is mapped: an address that passes ends in a #PF, and CR2 tells what it became.
    let request = Request { linear: pointer, kind, by: By::Supervisor, ac: false, pkru: 0, pkrs: 0, stack };
    let system = system(0x1000 | cr3, PAE | cr4, LME_LMA | efer);
    let refused = translate(&system, &Words::new(&[]), request).outcome.unwrap_err();
    match refused.event {
        Event::PageFault(_) if refused.linear == pointer => Ok(()),
        event => Err((event, refused.linear)),
    }
}

pub(super) fn linear_address_masking() {
    let gp = Event::GeneralProtection;
    let pf = Event::PageFault(0);
    let read = |cr3, cr4, pointer| masked(cr3, cr4, 0, pointer, Kind::Read, false);
    // LAM57 lets go of bits 62:57, LAM48 of bits 62:48.
    let tagged_57 = 0x7e00_7fff_ffff_f000;
    let tagged_48 = 0x7fff_0000_0000_1000;
    assert_eq!(read(LAM_U57, 0, tagged_57), Err((pf, 0x7fff_ffff_f000)));
    assert_eq!(read(LAM_U57 | LAM_U48, 0, tagged_48), Err((gp, tagged_48)));
    assert_eq!(read(LAM_U48, 0, tagged_48), Err((pf, 0x1000)));
    assert_eq!(read(LAM_U48, LA57, tagged_48), Err((pf, 0x1000)));
    assert_eq!(read(0, 0, tagged_57), Err((gp, tagged_57)));
    // Bit 63 and bit 47, or 56, still have to agree.
    assert_eq!(read(LAM_U48, 0, 0x8000_0000_1000), Err((gp, 0x8000_0000_1000)));
    assert_eq!(read(LAM_U57, LA57, 0x0100_0000_0000_1000), Err((gp, 0x0100_0000_0000_1000)));
    assert_eq!(read(LAM_U57, LA57, 0x00ff_8000_0000_1000), Ok(()));
    // Supervisor pointers: by CR4.LAM_SUP and the paging mode.
    let supervisor = 0x8123_8000_0000_0000;
    assert_eq!(read(LAM_U48, 0, supervisor), Err((gp, supervisor)));
    assert_eq!(read(0, LAM_SUP, supervisor), Err((pf, 0xffff_8000_0000_0000)));
    assert_eq!(read(0, LAM_SUP | LA57, 0x8123_8000_0000_0000), Err((pf, 0xff23_8000_0000_0000)));
    // Not fetches.
    assert_eq!(masked(LAM_U57, 0, 0, tagged_57, Kind::Fetch, false), Err((gp, tagged_57)));
}

pub(super) fn upper_address_ignore() {
    let gp = Event::GeneralProtection;
    let pf = Event::PageFault(0);
    let tagged = 0xaa00_7fff_ffff_f000;
    let ask = |cr4, pointer, kind, stack| masked(0, cr4, UAIE, pointer, kind, stack);
    assert_eq!(ask(0, tagged, Kind::Read, false), Err((pf, 0x7fff_ffff_f000)));
    assert_eq!(ask(LA57, tagged, Kind::Read, false), Err((pf, 0x7fff_ffff_f000)));
    // With 4-level paging bits 56:48 are still checked, with 5-level paging nothing is.
    assert_eq!(ask(0, 0xaa01_0000_0000_0000, Kind::Read, false), Err((gp, 0xaa01_0000_0000_0000)));
    assert_eq!(ask(LA57, 0x55ff_0000_0000_0000, Kind::Read, false), Err((pf, 0xffff_0000_0000_0000)));
    // DS and ES alone.
    assert_eq!(ask(0, tagged, Kind::Read, true), Err((Event::StackFault, tagged)));
    assert_eq!(ask(0, tagged, Kind::Fetch, false), Err((gp, tagged)));
}

/// Bit 47 on a CPU of 43 address bits: in CR3, in each entry, and nowhere in the address.
pub(super) fn encryption_is_no_address_bit() {
    let secret = 1 << 47;
    let mut system = system(0x1000 | secret, PAE, LME_LMA);
    system.cpu.maxphyaddr = 43;
    system.cpu.encryption_bit = Some(47);
    let words = [(0x1000, 0x2007 | secret), (0x2000, 0x4000_0087 | secret)];
    let mapped = page(&ask(&system, &words, Kind::Read, By::User, 0x123));
    assert_eq!((mapped.physical, mapped.entry), (0x4000_0123, 0x4000_0087 | secret));
    // The bits around it stay reserved.
    let words = [(0x1000, 0x2007 | secret | 1 << 48)];
    let wrong = refused(&ask(&system, &words, Kind::Read, By::User, 0x123));
    assert_eq!((wrong.event, wrong.bits), (Event::PageFault(0xd), 1 << 48));
}

/// U/S of the nested page against kind and CPL.
pub(super) fn guest_mode_execute_trap() {
    let fault = |gmet, nested_leaf: u64, kind, by| {
        let mut guest = system(0, 0, 0);
        guest.registers.cr0 = 1;
        let host = Registers { efer: LME_LMA | NXE, ..HOST };
        guest.second = Some(Second::Npt { ncr3: 0x8000, host, cpu: CPU, gmet });
        let words = [(0x8000, 0x9007), (0x9000, nested_leaf)];
        ask(&guest, &words, kind, by, 0x123).outcome.err().map(|it| (it.event, it.cause))
    };
    let (user_page, supervisor_page) = (0x87, 0x83);
    let npf = |code: u64, cause| Some((Event::NestedPageFault(0x1_0000_0000 | code), cause));
    // Without GMET every access is the user's.
    assert_eq!(fault(false, supervisor_page, Kind::Read, By::Supervisor), npf(5, Cause::SupervisorPage));
    assert_eq!(fault(false, user_page, Kind::Fetch, By::Supervisor), None);
    // With it, U/S is about code below CPL 3 alone.
    assert_eq!(fault(true, user_page, Kind::Fetch, By::Supervisor), npf(0x11, Cause::Gmet));
    assert_eq!(fault(true, supervisor_page, Kind::Fetch, By::Supervisor), None);
    assert_eq!(fault(true, user_page, Kind::Fetch, By::User), None);
    for kind in [Kind::Read, Kind::Write] {
        for page in [user_page, supervisor_page] {
            for by in [By::User, By::Supervisor] {
                assert_eq!(fault(true, page, kind, by), None);
            }
        }
    }
    // Bit 2 tells the CPL.
    assert_eq!(fault(true, 0, Kind::Write, By::Supervisor), npf(2, Cause::NotPresent));
    assert_eq!(fault(true, 0, Kind::Write, By::User), npf(6, Cause::NotPresent));
}
