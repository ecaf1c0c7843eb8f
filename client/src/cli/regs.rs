//! `regs`: prints a vCPU's registers, or writes some.

use std::{collections::HashSet, process::ExitCode};

use clap::Subcommand;

use super::{Context, exit::Failure, number, render, vcpu::FreshnessArgs};
use crate::v1::{GetRegistersRequest, Registers, SetRegistersRequest};

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    #[command(subcommand)]
    action: Option<Action>,
    #[command(flatten)]
    freshness: FreshnessArgs,
}

#[derive(Debug, Subcommand)]
enum Action {
    /// Write registers, all of them or none
    #[command(after_help = super::examples::REGS)]
    Set {
        /// Registers to write: `rip=0x1000`, `rax=0`, `cr3=…`
        #[arg(required = true, value_name = "NAME=VALUE", value_parser = assignment)]
        assignments: Vec<Assignment>,
    },
}

#[derive(Clone, Copy, Debug)]
struct Assignment {
    register: &'static Writable,
    value: u64,
}

/// A register that can be written: its name, its width in bits, and how to set it.
#[derive(Debug)]
struct Writable(&'static str, u32, fn(&mut Registers, u64));

macro_rules! wide {
    ($($name:ident)*) => {
        [$(Writable(stringify!($name), 64, |registers, value| registers.$name = Some(value)),)*
         Writable("pkru", 32, |registers, value| registers.pkru = u32::try_from(value).ok())]
    };
}

static WRITABLE: [Writable; 28] = wide!(
    cr0 cr2 cr3 cr4 cr8 efer pat rax rbx rcx rdx rsi rdi rbp rsp r8 r9 r10 r11 r12 r13 r14 r15 rip rflags
    fs_base gs_base
);

const READ_ONLY: [&str; 8] = ["cpl", "cs", "ss", "ds", "es", "fs", "gs", "pkrs"];

fn assignment(text: &str) -> Result<Assignment, String> {
    let (name, value) = text.split_once('=').ok_or("write NAME=VALUE, as in rip=0x1000")?;
    let name = name.to_ascii_lowercase();
    if READ_ONLY.contains(&name.as_str()) {
        return Err(format!("{name} is read-only"));
    }
    let register = WRITABLE.iter().find(|register| register.0 == name).ok_or_else(|| {
        let names: Vec<&str> = WRITABLE.iter().map(|register| register.0).collect();
        format!("there is no register `{name}`; there are {}", names.join(", "))
    })?;
    let value = match register.1 {
        32 => number::u32(value)?.into(),
        _ => number::u64(value)?,
    };
    Ok(Assignment { register, value })
}

fn registers(assignments: &[Assignment]) -> Result<Registers, Failure> {
    let mut seen = HashSet::new();
    let mut registers = Registers::default();
    for Assignment { register: Writable(name, _, set), value } in assignments {
        if !seen.insert(*name) {
            return Err(Failure::Usage(format!("{name} is given twice")));
        }
        set(&mut registers, *value);
    }
    Ok(registers)
}

pub(super) async fn run(context: &Context, args: &Args) -> Result<ExitCode, Failure> {
    let vcpu = context.vcpu.reference();
    if let Some(Action::Set { assignments }) = &args.action {
        if args.freshness.is_sync() {
            return Err(Failure::Usage(
                "--sync is for printing: a write has the vCPU come out by itself".into(),
            ));
        }
        let request = SetRegistersRequest { vcpu, registers: Some(registers(assignments)?) };
        let answer = context.client().await?.set_registers(request).await?;
        context.output.answer("SetRegistersResponse", &answer, |answer| {
            render::registers::answer(answer.registers.as_ref(), answer.provenance.as_ref())
        })?;
    } else {
        let request = GetRegistersRequest { vcpu, freshness: args.freshness.freshness().into() };
        let answer = context.client().await?.get_registers(request).await?;
        context.output.answer("GetRegistersResponse", &answer, |answer| {
            render::registers::answer(answer.registers.as_ref(), answer.provenance.as_ref())
        })?;
    }
    Ok(ExitCode::SUCCESS)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn assignments_reach_their_registers() {
        let given: Vec<_> = ["rip=0x1000", "RAX=7", "pkru=0x55555554", "fs_base=0xffff_8000_0000_0000"]
            .map(|text| assignment(text).unwrap())
            .into();
        let expected = Registers {
            rip: Some(0x1000),
            rax: Some(7),
            pkru: Some(0x5555_5554),
            fs_base: Some(0xffff_8000_0000_0000),
            ..Registers::default()
        };
        assert_eq!(registers(&given).unwrap(), expected);
    }

    #[test]
    fn every_register_is_set_by_its_own_name() {
        for register in &WRITABLE {
            let mut registers = Registers::default();
            register.2(&mut registers, 1);
            let shown = format!("{registers:?}");
            assert!(shown.contains(&format!(" {}: Some(1)", register.0)), "{shown}");
            assert_eq!(shown.matches("Some").count(), 1, "{shown}");
        }
    }

    #[test]
    fn wrong_assignments_say_why() {
        for (text, reason) in [
            ("rip", "NAME=VALUE"),
            ("=1", "no register"),
            ("xyz=1", "rflags"),
            ("cs=8", "read-only"),
            ("rip=", "missing"),
            ("pkru=0x1_0000_0000", "32 bits"),
            ("rip=0x1_0000_0000_0000_0000", "64 bits"),
        ] {
            let error = assignment(text).unwrap_err();
            assert!(error.contains(reason), "{text}: {error}");
        }
        let twice = [assignment("rip=1").unwrap(), assignment("rip=2").unwrap()];
        assert!(matches!(registers(&twice), Err(Failure::Usage(text)) if text.contains("twice")));
    }
}
