//! Registers.

use pagewalk_proto::v1;

use crate::status::Error;
use crate::vcpu::{L2Registers, RegisterChanges, Registers, UNMODELLED};

pub(crate) fn registers(registers: &Registers) -> v1::Registers {
    let selectors = registers.selectors;
    v1::Registers {
        cr0: Some(registers.cr0),
        cr2: Some(registers.cr2),
        cr3: Some(registers.cr3),
        cr4: Some(registers.cr4),
        efer: Some(registers.efer),
        rax: Some(registers.rax),
        rbx: Some(registers.rbx),
        rcx: Some(registers.rcx),
        rdx: Some(registers.rdx),
        rsi: Some(registers.rsi),
        rdi: Some(registers.rdi),
        rbp: Some(registers.rbp),
        rsp: Some(registers.rsp),
        r8: Some(registers.r8),
        r9: Some(registers.r9),
        r10: Some(registers.r10),
        r11: Some(registers.r11),
        r12: Some(registers.r12),
        r13: Some(registers.r13),
        r14: Some(registers.r14),
        r15: Some(registers.r15),
        rip: Some(registers.rip),
        rflags: Some(registers.rflags),
        cr8: Some(registers.cr8),
        pat: Some(registers.pat),
        pkru: registers.pkru,
        pkrs: registers.pkrs,
        cpl: Some(u32::from(registers.cpl)),
        fs_base: Some(registers.fs_base),
        gs_base: Some(registers.gs_base),
        cs: Some(u32::from(selectors.cs)),
        ss: Some(u32::from(selectors.ss)),
        ds: Some(u32::from(selectors.ds)),
        es: Some(u32::from(selectors.es)),
        fs: Some(u32::from(selectors.fs)),
        gs: Some(u32::from(selectors.gs)),
    }
}

/// CR4 as a client may set it: what the walker does not model is refused rather than ignored.
pub(crate) fn cr4(cr4: Option<u64>, field: &'static str) -> Result<Option<u64>, Error> {
    let set = UNMODELLED.iter().find(|(bit, _)| cr4.unwrap_or_default() & bit != 0);
    match set {
        Some((_, name)) => {
            Err(Error::unimplemented(field, format!("{name} is set, which is not served yet")))
        }
        None => Ok(cr4),
    }
}

/// What `SetRegisters` may write. The rest can only be read.
pub(crate) fn changes(request: Option<v1::Registers>) -> Result<RegisterChanges, Error> {
    let r = request.ok_or_else(|| Error::invalid("registers", "required: the registers to write"))?;
    let read_only = [
        ("registers.cpl", r.cpl),
        ("registers.cs", r.cs),
        ("registers.ss", r.ss),
        ("registers.ds", r.ds),
        ("registers.es", r.es),
        ("registers.fs", r.fs),
        ("registers.gs", r.gs),
        ("registers.pkrs", r.pkrs),
    ];
    if let Some((field, _)) = read_only.into_iter().find(|(_, value)| value.is_some()) {
        return Err(Error::invalid(field, "can only be read: leave it out"));
    }
    Ok(RegisterChanges {
        cr0: r.cr0,
        cr2: r.cr2,
        cr3: r.cr3,
        cr4: cr4(r.cr4, "registers.cr4")?,
        cr8: r.cr8,
        efer: r.efer,
        pat: r.pat,
        rip: r.rip,
        rflags: r.rflags,
        rax: r.rax,
        rbx: r.rbx,
        rcx: r.rcx,
        rdx: r.rdx,
        rsi: r.rsi,
        rdi: r.rdi,
        rbp: r.rbp,
        rsp: r.rsp,
        r8: r.r8,
        r9: r.r9,
        r10: r.r10,
        r11: r.r11,
        r12: r.r12,
        r13: r.r13,
        r14: r.r14,
        r15: r.r15,
        fs_base: r.fs_base,
        gs_base: r.gs_base,
        pkru: r.pkru,
    })
}

/// The registers of an L2 that can be given. Any other one would be dropped silently, so it is refused.
pub(crate) fn l2(request: Option<v1::Registers>) -> Result<L2Registers, Error> {
    let Some(r) = request else { return Ok(L2Registers::default()) };
    let known = v1::Registers {
        cr0: r.cr0,
        cr3: r.cr3,
        cr4: r.cr4,
        efer: r.efer,
        pat: r.pat,
        rip: r.rip,
        rsp: r.rsp,
        rflags: r.rflags,
        ..Default::default()
    };
    if known != r {
        return Err(Error::invalid(
            "l2",
            "only cr0, cr3, cr4, efer, pat, rip, rsp and rflags can be given: leave out the others",
        ));
    }
    Ok(L2Registers {
        cr0: r.cr0,
        cr3: r.cr3,
        cr4: cr4(r.cr4, "l2.cr4")?,
        efer: r.efer,
        pat: r.pat,
        rip: r.rip,
        rsp: r.rsp,
        rflags: r.rflags,
    })
}
