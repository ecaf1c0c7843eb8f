//! Arbitrary text as what an operator says: a machine, a configuration file, a command line. Nothing that it names is opened.
//!
//! Where the first byte is large, the others are not the text but pick its words: of text, little says anything.

use std::path::PathBuf;

use clap::Parser as _;
use pagewalkd::config::{Cli, Command, Config, Options};
use pagewalkd::machine::MachineSpec;

/// What an input comes to.
pub const CLASSES: [&str; 6] =
    ["machine", "no machine", "configuration", "no configuration", "command line", "no command line"];

/// First bytes from here on have the text built.
const BUILT: u8 = 0x80;

/// Sources, and what else there may be to a machine.
const SOURCES: &[&str] =
    &["demo", "demo:plain", "kvm:elf=a", "kvm:kernel=a,initrd=b", "qemu:qmp=a", "dump:a", "image:a.toml"];
const MACHINE: &[&str] =
    &[",mem=#M", ",cpus=#", ",symbols=c", ",cmdline=a,,b", ",console=d", ",pid=#", ",x=#"];
/// Lines of a configuration file.
const CONFIGURATION: &[&str] = &[
    "listen = [\"127.0.0.#:#\"]\n",
    "uds = \"/a/#\"\n",
    "machines = [\"demo\", \"m#=dump:a\"]\n",
    "client-files = \"/\"\n",
    "log = \"debug#\"\n",
    "log-format = \"json\"\n",
    "grace-seconds = #\n",
    "max-calls = #\n",
    "[tls]\ncert = \"a\"\nkey = \"b\"\nclient-ca = \"c\"\n",
    "unknown# = 0\n",
];
/// Words of a command line, each on a line of its own.
const COMMANDS: &[&str] = &["serve", "demo", "demo\n--once"];
const OPTIONS: &[&str] = &[
    "\n--listen\n127.0.0.#:#",
    "\n--uds\n/a/#",
    "\n--client-files\n/a",
    "\n--log\ndebug",
    "\n--log-format\njson",
    "\n--grace-seconds\n#",
    "\n--max-calls\n#",
    "\n--tls-cert\na\n--tls-key\nb\n--client-ca\nc",
    "\n--machine\nm#=demo",
    "\n--unknown\n#",
];

/// Text of these words: one of the first, and as many of the others, each with numbers for its `#`.
fn build(what: u8, choices: &[u8]) -> String {
    let (firsts, others) = match what {
        0 => (SOURCES, MACHINE),
        1 => (&[""][..], CONFIGURATION),
        _ => (COMMANDS, OPTIONS),
    };
    let mut choices = choices.iter().copied();
    let mut byte = || choices.next().unwrap_or_default();
    let mut text = firsts[usize::from(byte()) % firsts.len()].to_owned();
    let wanted = u16::from(byte()) | u16::from(byte()) << 8;
    for (number, word) in others.iter().enumerate() {
        if wanted >> number & 1 == 0 {
            continue;
        }
        for (part, piece) in word.split('#').enumerate() {
            if part > 0 {
                text += &byte().to_string();
            }
            text += piece;
        }
    }
    text
}

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
    /// Parses the text; the first byte says as what, and whether it is written or built.
    ///
    /// # Panics
    /// Where an error says nothing, or the file cannot be written.
    pub fn check(&self, bytes: &[u8], counts: &mut [u64]) {
        let Some((&what, text)) = bytes.split_first() else { return };
        let built;
        let text = if what < BUILT {
            text
        } else {
            built = build(what % 3, text);
            built.as_bytes()
        };
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
