//! `batch`: what many guest virtual addresses mean, for one access.

use std::{
    fs,
    io::{self, Read as _},
    path::{Path, PathBuf},
    process::ExitCode,
};

use super::{
    Context,
    access::AccessArgs,
    exit::{Failure, NEGATIVE},
    json, number, render,
    vcpu::FreshnessArgs,
    walker_override::OverrideArgs,
};
use crate::v1::{BatchTranslateRequest, BatchTranslateRequestHead, BatchTranslateResponse};

/// As many addresses as one request may have; more go in several.
const ADDRESSES: usize = 1 << 18;

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Guest virtual addresses, as numbers alone, no symbols: 0x and hex digits, or decimal; `_` may separate digits
    #[arg(value_name = "ADDRESS", value_parser = number::u64, required_unless_present = "file", conflicts_with = "file")]
    addresses: Vec<u64>,
    /// Take the addresses from a file, `-` for standard input: text, separated by blanks or lines, `#` begins a comment
    #[arg(long, value_name = "FILE")]
    file: Option<PathBuf>,
    /// The file, and the output, are columns: little-endian 64-bit words, nothing else
    #[arg(long, requires = "file", conflicts_with_all = ["json", "addresses"])]
    raw: bool,
    /// How many faults to tell in full, of each 262144 addresses; the others by kind, level and code
    #[arg(long, value_name = "COUNT", default_value_t = 4096)]
    max_faults: u32,
    #[command(flatten)]
    freshness: FreshnessArgs,
    /// Read the entries again at the end of the walk, and walk again if one has changed
    #[arg(long)]
    validate: bool,
    #[command(flatten)]
    access: AccessArgs,
    #[command(flatten)]
    walker: OverrideArgs,
}

impl Args {
    fn addresses(&self) -> Result<Vec<u64>, Failure> {
        let Some(path) = &self.file else { return Ok(self.addresses.clone()) };
        let name = path.display();
        let bytes = read(path).map_err(|error| Failure::Usage(format!("{name}: {error}")))?;
        let problem = |what: String| Failure::Usage(format!("{name}: {what}"));
        let addresses = if self.raw {
            let (words, rest) = bytes.as_chunks();
            if !rest.is_empty() {
                return Err(problem(format!("{} bytes are not made of 8-byte words", bytes.len())));
            }
            words.iter().map(|word| u64::from_le_bytes(*word)).collect()
        } else {
            let text = String::from_utf8(bytes)
                .map_err(|_| problem("it is no text; --raw takes columns of 64-bit words".into()))?;
            parse(&text).map_err(problem)?
        };
        if addresses.is_empty() {
            return Err(problem("there is no address in it".into()));
        }
        Ok(addresses)
    }

    fn request(&self, context: &Context, addresses: &[u64]) -> BatchTranslateRequest {
        BatchTranslateRequest {
            head: BatchTranslateRequestHead {
                vcpu: context.vcpu.reference(),
                access: Some(self.access.message()),
                freshness: self.freshness.freshness().into(),
                r#override: self.walker.message(),
                max_faults: Some(self.max_faults),
                validate: self.validate,
            },
            column: addresses.into(),
        }
    }
}

fn read(path: &Path) -> io::Result<Vec<u8>> {
    if path.as_os_str() == "-" {
        let mut bytes = Vec::new();
        io::stdin().lock().read_to_end(&mut bytes)?;
        return Ok(bytes);
    }
    fs::read(path)
}

fn parse(text: &str) -> Result<Vec<u64>, String> {
    let mut addresses = Vec::new();
    for (line, content) in (1..).zip(text.lines()) {
        let content = content.split('#').next().unwrap_or_default();
        for word in content.split_whitespace() {
            let address = number::u64(word).map_err(|problem| format!("line {line}: {word}: {problem}"))?;
            addresses.push(address);
        }
    }
    Ok(addresses)
}

pub(super) async fn run(context: &Context, args: &Args) -> Result<ExitCode, Failure> {
    let addresses = args.addresses()?;
    let client = context.client().await?;
    let mut documents = Vec::new();
    let mut faults = 0;
    for addresses in addresses.chunks(ADDRESSES) {
        let answer = client.batch_translate(args.request(context, addresses)).await?;
        if answer.column.len() != Some(addresses.len()) {
            let problem = "the answer has not as many words as there were addresses; update this client";
            return Err(Failure::Own(problem.into()));
        }
        faults += answer.head.fault_count;
        if context.output.is_json() {
            documents.push(json::document("BatchTranslateResponse", &answer)?);
        } else if args.raw {
            context.output.bytes(answer.column.as_bytes())?;
        } else {
            context.output.print(&text(addresses, &answer))?;
        }
    }
    if context.output.is_json() {
        let text = match documents.as_slice() {
            [document] => json::pretty(document)?,
            several => json::pretty(&several)?,
        };
        context.output.print(&text)?;
    }
    Ok(if faults > 0 { ExitCode::from(NEGATIVE) } else { ExitCode::SUCCESS })
}

fn text(addresses: &[u64], answer: &BatchTranslateResponse) -> String {
    let mut told = answer.head.faults.iter().peekable();
    let mut text = String::new();
    for (at, (address, word)) in addresses.iter().zip(answer.column.iter()).enumerate() {
        let fault = told.next_if(|fault| fault.index as usize == at).and_then(|fault| fault.fault.as_ref());
        text += &render::word::line(*address, word, fault);
        text.push('\n');
    }
    let provenance = render::provenance::short(answer.head.provenance.as_ref());
    text + &format!("{} addresses, {} faults  {provenance}", addresses.len(), answer.head.fault_count)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_has_blanks_lines_and_comments() {
        assert_eq!(parse("0x10 32\n\n# none\n 7 # one\n"), Ok(vec![0x10, 32, 7]));
        let error = parse("1\n2 x3\n").expect_err("no number");
        assert!(error.starts_with("line 2: x3: "), "{error}");
    }
}
