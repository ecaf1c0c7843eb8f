//! The registers of a vCPU, as `info registers` prints them.
//!
//! `NAME=HEX` words: 64-bit names (`RAX`, `RFL`) while CS is a 64-bit segment, else 32-bit ones (`EAX`, `EFL`), which leave the
//! upper halves and R8 to R15 out. No walk depends on those. PKRU, PKRS, PAT and CR8 are never printed.

use pagewalk::mode::PAT_RESET;

use super::layout::hex;
use crate::vcpu::{Registers, Selectors};

/// Longest answer that is looked at: with every vector register it is some ten thousand bytes.
const ANSWER_MAX: usize = 1 << 20;

/// What the monitor printed, and what it did not.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Read {
    pub(super) registers: Registers,
    /// Values that stand in for what was not printed.
    pub(super) assumed: Vec<String>,
    /// The vCPU rests in HLT.
    pub(super) halted: bool,
}

pub(super) fn parse(answer: &str) -> Result<Read, String> {
    let text = answer.get(..ANSWER_MAX).unwrap_or(answer);
    let refused = |name: &str| {
        let start: String = text.trim().chars().take(80).collect();
        format!("`info registers` shows no {name}: {start:?}")
    };
    let wide = value(text, "RIP").is_some();
    let need = |name: &str| value(text, name).ok_or_else(|| refused(name));
    let general = |name: &str| need(&format!("{}{name}", if wide { 'R' } else { 'E' }));
    let extra = |name: &str| if wide { need(name) } else { Ok(0) };
    let segment = |name: &str| segment(text, name).ok_or_else(|| refused(name));
    let (cs, ss, ds) = (segment("CS")?, segment("SS")?, segment("DS")?);
    let (es, fs, gs) = (segment("ES")?, segment("FS")?, segment("GS")?);
    let cpl = u8::try_from(need("CPL")?).ok().filter(|cpl| *cpl < 4).ok_or_else(|| refused("CPL"))?;
    let registers = Registers {
        cr0: need("CR0")?,
        cr2: need("CR2")?,
        cr3: need("CR3")?,
        cr4: need("CR4")?,
        cr8: 0,
        efer: need("EFER")?,
        pat: PAT_RESET,
        rip: general("IP")?,
        rflags: general("FL")?,
        rax: general("AX")?,
        rbx: general("BX")?,
        rcx: general("CX")?,
        rdx: general("DX")?,
        rsi: general("SI")?,
        rdi: general("DI")?,
        rbp: general("BP")?,
        rsp: general("SP")?,
        r8: extra("R8")?,
        r9: extra("R9")?,
        r10: extra("R10")?,
        r11: extra("R11")?,
        r12: extra("R12")?,
        r13: extra("R13")?,
        r14: extra("R14")?,
        r15: extra("R15")?,
        fs_base: fs.base,
        gs_base: gs.base,
        pkru: None,
        pkrs: None,
        cpl,
        selectors: Selectors {
            cs: cs.selector,
            ss: ss.selector,
            ds: ds.selector,
            es: es.selector,
            fs: fs.selector,
            gs: gs.selector,
        },
        pdptes: None,
    };
    let mut assumed = vec![format!("PAT={PAT_RESET:#x}"), "CR8=0x0".to_owned()];
    if !wide {
        assumed.push("R8-R15=0x0, and upper halves".to_owned());
    }
    if value(text, "SMM") == Some(1) {
        // What is read then is the memory that is seen outside of it.
        assumed.push("SMM=0".to_owned());
    }
    Ok(Read { registers, assumed, halted: value(text, "HLT") == Some(1) })
}

/// The value after `NAME=`, where NAME is a whole word; names are padded with blanks (`R8 =`).
fn value(text: &str, name: &str) -> Option<u64> {
    let (_, rest) = after(text, name)?;
    hex(rest.split_whitespace().next()?)
}

/// What follows `NAME=`, and what precedes it.
fn after<'a>(text: &'a str, name: &str) -> Option<(&'a str, &'a str)> {
    text.match_indices(name).find_map(|(at, _)| {
        let (before, rest) = text.split_at_checked(at)?;
        let whole = before.chars().next_back().is_none_or(|c| !c.is_ascii_alphanumeric());
        let rest = rest.get(name.len()..)?.trim_start_matches(' ').strip_prefix('=')?;
        whole.then_some((before, rest))
    })
}

struct Segment {
    selector: u16,
    base: u64,
}

/// `CS =0010 0000000000000000 ffffffff 00af9a00 ...`: selector, base, limit, attributes.
fn segment(text: &str, name: &str) -> Option<Segment> {
    let (_, rest) = after(text, name)?;
    let mut words = rest.lines().next()?.split_whitespace();
    let selector = u16::try_from(hex(words.next()?)?).ok()?;
    Some(Segment { selector, base: hex(words.next()?)? })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    const WIDE: &str = "\r\nCPU#0\r\nRAX=00000000041612ee RBX=000000000000000f RCX=0015ffd800280015 RDX=000000001420000f\r\n\
        RSI=00000000000000f1 RDI=0000000014200008 RBP=00000000041612e6 RSP=0000000004337e60\r\n\
        R8 =0000000014a00000 R9 =00000000149ffff8 R10=00000000149fffe6 R11=00000000141ff7f7\r\n\
        R12=00000000041612e4 R13=0000000000ac6e34 R14=00000000041612e4 R15=0000000000800000\r\n\
        RIP=000000000431c370 RFL=00000016 [----AP-] CPL=3 II=0 A20=1 SMM=0 HLT=1\r\n\
        ES =0000 0000000000000000 00000000 00000000\r\nCS =0033 0000000000000000 ffffffff 00af9a00 DPL=0 CS64 [-R-]\r\n\
        SS =002b 0000000000000000 00000000 00000000\r\nDS =0000 0000000000000000 00000000 00000000\r\n\
        FS =0000 00007f0000001000 00000000 00000000\r\nGS =0000 ffff888000000000 00000000 00000000\r\n\
        LDT=0000 0000000000000000 00000000 00008200 DPL=0 LDT\r\nGDT=     0000000004332010 0000002f\r\n\
        CR0=80050033 CR2=0000000000000007 CR3=0000000004377000 CR4=00001020\r\nDR0=0000000000000000\r\n\
        EFER=0000000000000500\r\nFCW=037f FSW=0000 [ST=0] FTW=00 MXCSR=00001f80\r\n";

    #[test]
    fn in_64_bit_mode() {
        let Read { registers: r, assumed, halted } = parse(WIDE).unwrap();
        assert_eq!((r.cr0, r.cr2, r.cr3, r.cr4, r.efer), (0x8005_0033, 7, 0x437_7000, 0x1020, 0x500));
        assert_eq!(
            (r.rip, r.rflags, r.r8, r.r15, r.rsp),
            (0x431_c370, 0x16, 0x14a0_0000, 0x80_0000, 0x433_7e60)
        );
        assert_eq!((r.cpl, r.selectors.cs, r.selectors.ss, halted), (3, 0x33, 0x2b, true));
        assert_eq!((r.fs_base, r.gs_base), (0x7f00_0000_1000, 0xffff_8880_0000_0000));
        assert_eq!((r.pkru, r.pkrs, r.pat), (None, None, PAT_RESET));
        assert_eq!(assumed, ["PAT=0x7040600070406", "CR8=0x0"]);
    }

    #[test]
    fn outside_of_it_and_in_system_management_mode() {
        let narrow = "CPU#0\nEAX=00000001 EBX=00000002 ECX=00000003 EDX=00060fb1\nESI=00000000 EDI=00000000 EBP=00000000 ESP=00000004\n\
            EIP=0000fff0 EFL=00000002 [-------] CPL=0 II=0 A20=1 SMM=1 HLT=0\nES =0000 00000000 0000ffff 00009300\n\
            CS =f000 ffff0000 0000ffff 00009b00\nSS =0000 00000000 0000ffff 00009300\nDS =0000 00000000 0000ffff 00009300\n\
            FS =0000 00000000 0000ffff 00009300\nGS =0000 00000000 0000ffff 00009300\nCR0=60000010 CR2=00000000 CR3=00000000 CR4=00000000\n\
            EFER=0000000000000000\n";
        let Read { registers: r, assumed, .. } = parse(narrow).unwrap();
        assert_eq!((r.cr0, r.rip, r.rax, r.rsp, r.selectors.cs), (0x6000_0010, 0xfff0, 1, 4, 0xf000));
        assert_eq!(assumed.last().map(String::as_str), Some("SMM=0"));
        assert!(assumed.iter().any(|a| a.starts_with("R8")));
    }

    #[test]
    fn what_is_missing_is_an_error_that_names_it() {
        for name in ["CR0", "CR3", "CR4", "EFER", "RIP", "RFL", "CPL", "CS", "R8", "GS"] {
            let without = WIDE.replace(&format!("{name}="), "XX=").replace(&format!("{name} ="), "XX =");
            assert!(parse(&without).is_err(), "{name}");
        }
        for text in
            ["", "CPU#0", "unknown command", &WIDE.replace("CPL=3", "CPL=9"), &WIDE.replace("CR3=", "CR3=x")]
        {
            assert!(parse(text).is_err(), "{text}");
        }
        assert!(parse(WIDE.get(..600).unwrap()).unwrap_err().contains("shows no"));
    }
}
