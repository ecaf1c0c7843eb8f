//! Arbitrary text as what an operator says: a machine, a configuration file, a command line. Nothing that it names is opened.

use std::path::PathBuf;

use clap::Parser as _;
use pagewalkd::config::{Cli, Command, Config, Options};
use pagewalkd::machine::MachineSpec;

/// What an input comes to.
pub const CLASSES: [&str; 6] =
    ["machine", "no machine", "configuration", "no configuration", "command line", "no command line"];

/// A place for configuration files.
pub struct Bed {
    file: PathBuf,
}

impl Default for Bed {
    fn default() -> Self {
        Self { file: std::env::temp_dir().join(format!("pagewalk-fuzz-{}.toml", std::process::id())) }
    }
}

impl Drop for Bed {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.file);
    }
}

impl Bed {
    /// Parses the text; the first byte says as what.
    ///
    /// # Panics
    /// Where an error says nothing, or the file cannot be written.
    pub fn check(&self, bytes: &[u8], counts: &mut [u64]) {
        let Some((&what, text)) = bytes.split_first() else { return };
        let said = match what % 3 {
            0 => {
                let Ok(text) = std::str::from_utf8(text) else { return };
                text.parse::<MachineSpec>().map(drop).map_err(|error| error.to_string())
            }
            1 => {
                std::fs::write(&self.file, text).expect("a file");
                let words =
                    ["pagewalkd".as_ref(), "serve".as_ref(), "--config".as_ref(), self.file.as_os_str()];
                let options = match Cli::try_parse_from(words).map(|cli| cli.command) {
                    Ok(Command::Serve { options, .. }) => options,
                    other => panic!("a command line without its file: {other:?}"),
                };
                resolve(options)
            }
            _ => {
                let Ok(text) = std::str::from_utf8(text) else { return };
                let words = std::iter::once("pagewalkd").chain(text.split('\n'));
                match Cli::try_parse_from(words) {
                    // Files that it names are not to be read.
                    Ok(_) => Ok(()),
                    Err(error) => Err(error.to_string()),
                }
            }
        };
        if let Err(problem) = &said {
            assert!(!problem.trim().is_empty());
        }
        counts[usize::from(what % 3) * 2 + usize::from(said.is_err())] += 1;
    }
}

fn resolve(options: Options) -> Result<(), String> {
    Config::resolve(options, Vec::new()).map(drop).map_err(|error| error.to_string())
}
