//! `batch`: what many guest virtual addresses mean, for one access.

use std::{path::PathBuf, process::ExitCode};

use super::{
    Context,
    access::LinearAccessArgs,
    addresses::Addresses,
    exit::{Failure, NEGATIVE},
    json, number,
    progress::Progress,
    render,
    vcpu::FreshnessArgs,
    walker_override::OverrideArgs,
};
use crate::v1::{BatchTranslateRequest, BatchTranslateRequestHead, BatchTranslateResponse};

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
    access: LinearAccessArgs,
    #[command(flatten)]
    walker: OverrideArgs,
}

impl Args {
    fn source(&self) -> Result<Addresses<'_>, Failure> {
        match &self.file {
            Some(path) => Addresses::of(path, self.raw),
            None => Ok(Addresses::given(&self.addresses)),
        }
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

pub(super) async fn run(context: &Context, args: &Args) -> Result<ExitCode, Failure> {
    let mut source = args.source()?;
    let Some(mut addresses) = source.next()? else {
        let name = args.file.as_ref().map(|path| path.display().to_string()).unwrap_or_default();
        return Err(Failure::Usage(format!("{name}: there is no address in it")));
    };
    let client = context.client().await?;
    let progress = Progress::new();
    let (mut requests, mut answered, mut faults) = (0_u64, 0_u64, 0_u64);
    loop {
        // One answer is a document, several are an array: what comes next has to be known. A problem with it is told after this.
        let next = source.next();
        let answer = client.batch_translate(args.request(context, &addresses)).await?;
        if answer.column.len() != Some(addresses.len()) {
            let problem = "the answer has not as many words as there were addresses; update this client";
            return Err(Failure::Own(problem.into()));
        }
        requests += 1;
        answered += addresses.len() as u64;
        faults += u64::from(answer.head.fault_count);
        if args.raw {
            progress.aside(|| context.output.bytes(answer.column.as_bytes()))?;
        } else {
            let text = if context.output.is_json() {
                let document = json::document("BatchTranslateResponse", &answer)?;
                json::element(&document, requests == 1, !matches!(next, Ok(Some(_))))?
            } else {
                text(&addresses, &answer)
            };
            progress.aside(|| context.output.print(&text))?;
        }
        match next? {
            Some(next) => addresses = next,
            None => break,
        }
        progress.tell(|| {
            let share = source.percent().map(|percent| format!("{percent} %, ")).unwrap_or_default();
            format!("{share}{answered} addresses, {faults} faults")
        });
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
