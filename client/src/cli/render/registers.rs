//! A vCPU's registers.

use super::{
    provenance,
    table::{Cell, Table},
};
use crate::v1::{Provenance, Registers};

pub(in crate::cli) fn answer(registers: Option<&Registers>, provenance: Option<&Provenance>) -> String {
    let registers = registers.cloned().unwrap_or_default();
    format!("{}\n{}", table(&registers), provenance::short(provenance))
}

/// Those that the source can give, four to a line.
pub(in crate::cli) fn table(r: &Registers) -> String {
    let groups = [
        vec![("rip", r.rip), ("rflags", r.rflags), ("rsp", r.rsp), ("rbp", r.rbp)],
        vec![("rax", r.rax), ("rbx", r.rbx), ("rcx", r.rcx), ("rdx", r.rdx)],
        vec![("rsi", r.rsi), ("rdi", r.rdi), ("r8", r.r8), ("r9", r.r9)],
        vec![("r10", r.r10), ("r11", r.r11), ("r12", r.r12), ("r13", r.r13)],
        vec![("r14", r.r14), ("r15", r.r15), ("fs_base", r.fs_base), ("gs_base", r.gs_base)],
        vec![("cr0", r.cr0), ("cr2", r.cr2), ("cr3", r.cr3), ("cr4", r.cr4)],
        vec![("cr8", r.cr8), ("efer", r.efer), ("pat", r.pat)],
    ];
    let mut table = Table::default();
    for group in groups {
        table.row(
            group
                .into_iter()
                .filter_map(|(name, value)| Some((name, value?)))
                .flat_map(|(name, value)| [Cell::dim(name), Cell::address(value)]),
        );
    }
    let selectors = [("cs", r.cs), ("ss", r.ss), ("ds", r.ds), ("es", r.es), ("fs", r.fs), ("gs", r.gs)]
        .into_iter()
        .filter_map(|(name, value)| Some(format!("{name} {:#06x}", value?)))
        .chain(r.pkru.map(|pkru| format!("pkru {pkru:#010x}")))
        .chain(r.pkrs.map(|pkrs| format!("pkrs {pkrs:#010x}")))
        .chain(r.cpl.map(|cpl| format!("cpl {cpl}")))
        .collect::<Vec<_>>()
        .join("  ");
    let text = table.render();
    [text.lines().filter(|line| !line.is_empty()).collect::<Vec<_>>().join("\n"), selectors]
        .into_iter()
        .filter(|part| !part.is_empty())
        .collect::<Vec<_>>()
        .join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_present_is_shown() {
        let registers =
            Registers { rip: Some(0x1000), cr3: Some(0), cs: Some(8), cpl: Some(3), ..Registers::default() };
        let text = anstream::adapter::strip_str(&table(&registers)).to_string();
        assert_eq!(text, "rip  0x0000000000001000\ncr3  0x0000000000000000\ncs 0x0008  cpl 3");
        assert_eq!(table(&Registers::default()), "");
    }
}
