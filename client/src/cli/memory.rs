//! `read`, `write`: memory, by virtual or by physical address.

use std::process::ExitCode;

use super::{
    Context,
    access::PrivilegeArg,
    address::{Written, address},
    exit::{Failure, NEGATIVE},
    json, number, render,
    vcpu::FreshnessArgs,
    walker_override::OverrideArgs,
};
use crate::v1::{ReadMemoryRequest, WriteMemoryRequest, read_memory_request, write_memory_request};

/// Most bytes of one `ReadMemory`.
const READ_MAX: u64 = 1 << 20;

#[derive(Debug, clap::Args)]
pub(super) struct ReadArgs {
    /// Address of the first byte; a virtual one may be symbol+offset
    #[arg(value_name = "ADDRESS", value_parser = address)]
    address: Written,
    /// Number of bytes
    #[arg(value_name = "LENGTH", value_parser = number::u64)]
    length: u64,
    /// The address is a guest physical one
    #[arg(long)]
    physical: bool,
    /// Write the bytes to standard output as they are
    #[arg(long)]
    raw: bool,
    /// Whose rights a read by virtual address needs
    #[arg(long = "as", value_name = "WHO", default_value = "exempt")]
    privilege: PrivilegeArg,
    #[command(flatten)]
    freshness: FreshnessArgs,
    #[command(flatten)]
    walker: OverrideArgs,
}

#[derive(Debug, clap::Args)]
pub(super) struct WriteArgs {
    /// Address of the first byte; a virtual one may be symbol+offset
    #[arg(value_name = "ADDRESS", value_parser = address)]
    address: Written,
    /// The bytes, as hex digits: 90c3
    #[arg(value_name = "HEX", value_parser = bytes)]
    data: Bytes,
    /// The address is a guest physical one
    #[arg(long)]
    physical: bool,
    #[command(flatten)]
    walker: OverrideArgs,
}

/// Bytes on the command line. A type of their own: a bare list would be several arguments.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Bytes(Vec<u8>);

fn bytes(text: &str) -> Result<Bytes, String> {
    let digits: Vec<u8> = text
        .chars()
        .filter(|c| *c != '_')
        .map(|c| c.to_digit(16).and_then(|digit| u8::try_from(digit).ok()))
        .collect::<Option<_>>()
        .ok_or("write hex digits and nothing else, two a byte: 90c3")?;
    if digits.is_empty() || !digits.len().is_multiple_of(2) {
        return Err("two hex digits make a byte: 90c3".into());
    }
    Ok(Bytes(digits.chunks(2).map(|pair| pair.iter().fold(0, |byte, digit| byte << 4 | digit)).collect()))
}

/// Refuses bytes of which the last has no address, as the daemon does where it reads them all at once.
fn check_reach(first: u64, length: u64) -> Result<(), Failure> {
    match first.checked_add(length.saturating_sub(1)) {
        Some(_) => Ok(()),
        None => Err(Failure::Usage(format!("{first:#x} and {length} bytes reach beyond 64 bits"))),
    }
}

pub(super) async fn read(context: &Context, args: &ReadArgs) -> Result<ExitCode, Failure> {
    if let Written::Number(first) = args.address {
        check_reach(first, args.length)?;
    }
    let client = context.client().await?;
    let mut done = 0;
    let mut start = args.address.clone();
    let mut documents = Vec::new();
    let stopped = loop {
        let at = match start {
            Written::Number(first) => Written::Number(first + done).message(),
            Written::Symbol(_) => start.message(),
        };
        let request = ReadMemoryRequest {
            vcpu: context.vcpu.reference(),
            at: Some(if args.physical {
                read_memory_request::At::Gpa(at)
            } else {
                read_memory_request::At::Gva(at)
            }),
            // At least once, so that the daemon says what is wrong with a length of 0.
            length: args.length.saturating_sub(done).min(READ_MAX),
            privilege: args.privilege.message().into(),
            freshness: args.freshness.freshness().into(),
            r#override: args.walker.message(),
        };
        let answer = client.read_memory(request).await?;
        // What is read next follows what was read first, wherever a symbol is by then.
        let begin = start.number(answer.address);
        check_reach(begin, args.length)?;
        start = Written::Number(begin);
        let first = begin + done;
        done += answer.data.len() as u64;
        let last = answer.stop.is_some() || answer.data.is_empty() || done >= args.length;
        if context.output.is_json() {
            documents.push(json::document("ReadMemoryResponse", &answer)?);
        } else if args.raw {
            context.output.bytes(&answer.data)?;
            if let Some(stop) = &answer.stop {
                context.output.complain(&render::memory::stop(stop));
            }
        } else {
            context.output.print(&render::memory::dump(first, &answer, last))?;
        }
        if last {
            break answer.stop.is_some();
        }
    };
    if context.output.is_json() {
        let text = match documents.as_slice() {
            [only] => json::pretty(only)?,
            several => json::pretty(&several)?,
        };
        context.output.print(&text)?;
    }
    Ok(if stopped { ExitCode::from(NEGATIVE) } else { ExitCode::SUCCESS })
}

pub(super) async fn write(context: &Context, args: &WriteArgs) -> Result<ExitCode, Failure> {
    let at = args.address.message();
    let request = WriteMemoryRequest {
        vcpu: context.vcpu.reference(),
        at: Some(if args.physical {
            write_memory_request::At::Gpa(at)
        } else {
            write_memory_request::At::Gva(at)
        }),
        data: args.data.0.clone(),
        freshness: 0,
        r#override: args.walker.message(),
    };
    let answer = context.client().await?.write_memory(request).await?;
    context.output.answer("WriteMemoryResponse", &answer, render::memory::written)?;
    Ok(if answer.stop.is_some() { ExitCode::from(NEGATIVE) } else { ExitCode::SUCCESS })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hex_digits_are_bytes() {
        assert_eq!(bytes("90_c3"), Ok(Bytes(vec![0x90, 0xc3])));
        for text in ["", "9", "0x90", "90 c3", "zz", "٣٣"] {
            assert!(bytes(text).is_err(), "{text}");
        }
    }
}
