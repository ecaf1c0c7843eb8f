//! `save`: a machine as an image, in two files.

use std::io::IsTerminal as _;
use std::path::PathBuf;
use std::process::ExitCode;

use indicatif::{HumanBytes, ProgressBar, ProgressStyle};
use pagewalk_proto::readable;

use super::{Context, exit::Failure, signals::Ending};
use crate::SaveError;
use crate::v1::ImageEnd;

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// The description to write, such as guest.toml; the memory goes next to it, into guest.mem
    #[arg(value_name = "FILE.toml")]
    file: PathBuf,
}

impl From<SaveError> for Failure {
    fn from(error: SaveError) -> Self {
        match error {
            SaveError::Daemon(error) => Self::Client(error),
            SaveError::File { .. } | SaveError::Stream(_) => Self::Own(error.to_string()),
        }
    }
}

pub(super) async fn run(context: &Context, args: &Args) -> Result<ExitCode, Failure> {
    let machine = context.vcpu.machine.clone().unwrap_or_default();
    let bar = if std::io::stderr().is_terminal() && !context.output.is_json() {
        ProgressBar::no_length().with_style(
            ProgressStyle::with_template("{bar:40} {binary_bytes} of {binary_total_bytes}, {eta} left")
                .map_err(|e| Failure::Own(e.to_string()))?,
        )
    } else {
        ProgressBar::hidden()
    };
    let client = context.client().await?;
    let mut ending = Ending::taken().map_err(|e| Failure::Own(format!("cannot wait for signals: {e}")))?;
    let saving = client.save_image(&machine, &args.file, |done, all| {
        bar.set_length(all);
        bar.set_position(done);
    });
    // A signal drops what was begun, and with it the unfinished files.
    let saved = tokio::select! {
        biased;
        () = ending.asked_for() => {
            bar.finish_and_clear();
            return Err(Failure::Own("interrupted: nothing is saved".to_owned()));
        }
        saved = saving => saved,
    };
    bar.finish_and_clear();
    let saved = saved?;
    context.output.answer("ImageEnd", &ImageEnd { contents_bytes: saved.contents_bytes }, |_| {
        let [description, memory] =
            [&saved.description, &saved.memory].map(|path| readable(&path.display().to_string()));
        let (all, sent) = (HumanBytes(saved.memory_bytes), HumanBytes(saved.contents_bytes));
        format!(
            "saved {description} and {memory}: {all} of memory, {sent} of it not zero\n  open it with: pagewalkd serve --machine image:{description}"
        )
    })?;
    Ok(ExitCode::SUCCESS)
}
