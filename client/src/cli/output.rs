//! Where answers go: one document on standard output, complaints on standard error, colours only on a terminal.

use std::io::{self, Write as _};

use clap::{Args, ValueEnum};
use pagewalk_proto::readable_lines;
use prost::Message;

use super::{json, render::paint};

/// When to use colours.
#[derive(Clone, Copy, Debug, ValueEnum)]
enum Color {
    Auto,
    Always,
    Never,
}

#[derive(Debug, Args)]
#[command(next_help_heading = "Output")]
pub(super) struct OutputArgs {
    /// Print JSON: the canonical form of the RPC's answer, as grpcurl prints it; errors too, on standard error
    #[arg(long, global = true)]
    json: bool,
    /// When to use colours; `auto` means on a terminal, unless NO_COLOR is set
    #[arg(long, global = true, value_name = "WHEN", default_value = "auto")]
    color: Color,
}

/// Writes answers and complaints.
#[derive(Clone, Copy, Debug)]
pub(super) struct Output {
    json: bool,
}

impl Output {
    pub(super) fn new(args: &OutputArgs) -> Self {
        match args.color {
            Color::Auto => anstream::ColorChoice::Auto,
            Color::Always => anstream::ColorChoice::Always,
            Color::Never => anstream::ColorChoice::Never,
        }
        .write_global();
        Self { json: args.json }
    }

    pub(super) fn is_json(self) -> bool {
        self.json
    }

    /// Writes one answer: as JSON if asked for, else as `text` says.
    pub(super) fn answer<M: Message>(
        self,
        message_name: &str,
        message: &M,
        text: impl FnOnce(&M) -> String,
    ) -> io::Result<()> {
        if self.json {
            self.print(&json::pretty(&json::document(message_name, message)?)?)
        } else {
            self.print(&text(message))
        }
    }

    /// Writes text, with a newline at its end.
    pub(super) fn print(self, text: &str) -> io::Result<()> {
        let mut text = text.trim_end_matches('\n').to_owned();
        text.push('\n');
        // Written at once: a stream that strips colours itself writes line by line.
        if anstream::AutoStream::choice(&io::stdout()) == anstream::ColorChoice::Never {
            text = anstream::adapter::strip_str(&text).to_string();
        }
        self.bytes(text.as_bytes())
    }

    /// Writes bytes as they are.
    pub(super) fn bytes(self, bytes: &[u8]) -> io::Result<()> {
        let mut stdout = io::stdout().lock();
        stdout.write_all(bytes)?;
        stdout.flush()
    }

    /// Tells a failure, in words from anywhere.
    pub(super) fn complain_line(self, message: &str) {
        self.complain(&format!("{} {}", paint::bad("error:"), readable_lines(message)));
    }

    /// Writes what `render` or `json` made, which has the colours and no word that steers the terminal. Nobody is left to tell if
    /// this cannot be written.
    pub(super) fn complain(self, text: &str) {
        let _ = writeln!(anstream::stderr().lock(), "{text}");
    }
}
