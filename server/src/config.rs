//! What the daemon is told: by flags, the environment and one TOML file, in that order of precedence.

use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::{Args, Parser, Subcommand, ValueEnum};
use serde::Deserialize;

use crate::listen::{Tls, TlsError};
use crate::machine::{MachineSpec, SpecError};
use crate::small_file;

/// Where clients find a daemon that was told nothing else.
const LISTEN: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(std::net::Ipv4Addr::LOCALHOST), 50051);
const GRACE: u64 = 5;
const MAX_CALLS: usize = 1024;

/// Answers over gRPC what guest virtual addresses mean.
#[derive(Debug, Parser)]
#[command(name = "pagewalkd", version)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// What to do.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Serve the demo machine and print a short tour of it
    Demo {
        /// Take a port that is free, and end after the tour
        #[arg(long)]
        once: bool,
        /// Options of the server.
        #[command(flatten)]
        options: Options,
    },
    /// Serve machines
    Serve {
        /// A machine: demo, demo:plain, kvm:elf=FILE,mem=64M,cpus=1, kvm:kernel=FILE,initrd=FILE,console=SOCKET, qemu:qmp=SOCKET, dump:FILE or image:FILE.toml, each optionally with symbols=FILE as one more option; may be repeated, optionally as ID=SPEC [default: demo]
        #[arg(long = "machine", value_name = "SPEC", env = "PAGEWALK_MACHINE")]
        machines: Vec<String>,
        /// Options of the server.
        #[command(flatten)]
        options: Options,
    },
}

/// Options of the server. Each flag has a variable and a key in the file, and wins over both; the variable wins over the
/// file.
#[derive(Args, Clone, Debug, Default)]
pub struct Options {
    /// A TOML file with the same options: listen, uds, machines, client-files, log, log-format, grace-seconds, max-calls, and a table tls
    #[arg(long, value_name = "FILE", env = "PAGEWALK_CONFIG")]
    pub config: Option<PathBuf>,
    /// Address to listen on; may be repeated. Not loopback: only with the three TLS options [default: 127.0.0.1:50051]
    #[arg(long, value_name = "ADDR", env = "PAGEWALK_LISTEN", value_delimiter = ',', value_parser = address)]
    pub listen: Vec<SocketAddr>,
    /// Unix socket to listen on as well [default: $XDG_RUNTIME_DIR/pagewalk.sock, none without that variable or where another daemon has it]
    #[arg(long, value_name = "PATH", env = "PAGEWALK_UDS")]
    pub uds: Option<PathBuf>,
    /// Folder of files that clients may have the daemon make: the sockets and logs of consoles of machines that they attach [default: none, but for the daemon's own user over the Unix socket]
    #[arg(long, value_name = "FOLDER", env = "PAGEWALK_CLIENT_FILES")]
    pub client_files: Option<PathBuf>,
    /// The daemon's certificate, PEM
    #[arg(long, value_name = "FILE", env = "PAGEWALK_TLS_CERT")]
    pub tls_cert: Option<PathBuf>,
    /// The daemon's private key, PEM
    #[arg(long, value_name = "FILE", env = "PAGEWALK_TLS_KEY")]
    pub tls_key: Option<PathBuf>,
    /// The authority that clients' certificates must come from, PEM
    #[arg(long, value_name = "FILE", env = "PAGEWALK_CLIENT_CA")]
    pub client_ca: Option<PathBuf>,
    /// What to log: error, warn, info, debug, trace, or directives such as pagewalkd=debug [default: info]
    #[arg(long, value_name = "FILTER", env = "PAGEWALK_LOG")]
    pub log: Option<String>,
    /// How to log [default: human]
    #[arg(long, value_enum, env = "PAGEWALK_LOG_FORMAT")]
    pub log_format: Option<LogFormat>,
    /// Seconds that calls in flight have to end when the daemon is told to stop; told again, it stops at once [default: 5]
    #[arg(long, value_name = "SECONDS", env = "PAGEWALK_GRACE_SECONDS")]
    pub grace_seconds: Option<u64>,
    /// Calls in flight, over all connections, beyond which further ones are refused. A quarter of them at most are maps and images, a quarter streams that wait for news, and a quarter, no more than 128, batches [default: 1024]
    #[arg(long, value_name = "N", env = "PAGEWALK_MAX_CALLS")]
    pub max_calls: Option<usize>,
}

/// How to log.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    /// Lines for a person, coloured on a terminal.
    #[default]
    Human,
    /// One JSON object a line.
    Json,
}

/// The file: the same options once more. What it does not know is an error.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
struct File {
    #[serde(default)]
    listen: Vec<SocketAddr>,
    uds: Option<PathBuf>,
    #[serde(default)]
    machines: Vec<String>,
    client_files: Option<PathBuf>,
    log: Option<String>,
    log_format: Option<LogFormat>,
    grace_seconds: Option<u64>,
    max_calls: Option<usize>,
    tls: Option<FileTls>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
struct FileTls {
    cert: Option<PathBuf>,
    key: Option<PathBuf>,
    client_ca: Option<PathBuf>,
}

/// Everything the daemon needs to know.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    /// TCP addresses.
    pub listen: Vec<SocketAddr>,
    /// Unix socket.
    pub uds: Option<PathBuf>,
    /// Mutual TLS, for the TCP addresses.
    pub tls: Option<Tls>,
    /// The machines.
    pub machines: Vec<MachineSpec>,
    /// Folder of files that clients may have made.
    pub client_files: Option<PathBuf>,
    /// What to log.
    pub log: String,
    /// How to log.
    pub log_format: LogFormat,
    /// How long calls in flight have to end.
    pub grace: Duration,
    /// Bound on calls in flight.
    pub max_calls: usize,
}

impl Config {
    /// A daemon for programs on this machine that serve it themselves: on a free port of loopback, without machines.
    #[must_use]
    pub fn on_loopback() -> Self {
        Self {
            listen: vec![(Ipv4Addr::LOCALHOST, 0).into()],
            uds: None,
            tls: None,
            machines: Vec::new(),
            client_files: None,
            log: "info".to_owned(),
            log_format: LogFormat::Human,
            grace: Duration::from_secs(GRACE),
            max_calls: MAX_CALLS,
        }
    }
}

/// What is wrong with what the daemon was told.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("cannot read the configuration {path}: {problem}")]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system says.
        problem: std::io::Error,
    },
    /// The file is not what it should be.
    #[error("{path}: {problem}")]
    File {
        /// The file.
        path: PathBuf,
        /// Where and what.
        problem: toml::de::Error,
    },
    /// A machine's specification.
    #[error("--machine {spec}: {problem}")]
    Machine {
        /// The specification.
        spec: String,
        /// What is wrong.
        problem: SpecError,
    },
    /// The folder for clients' files.
    #[error("--client-files {path}: {problem}; name a folder that exists")]
    ClientFiles {
        /// The folder.
        path: PathBuf,
        /// What the system says.
        problem: std::io::Error,
    },
    /// TLS options.
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// A number out of range.
    #[error("{0}")]
    Range(&'static str),
}

impl Config {
    /// Puts flags, environment and file together.
    ///
    /// # Errors
    /// Names the option, or the place in the file.
    pub fn resolve(options: Options, machines: Vec<String>) -> Result<Self, ConfigError> {
        let file = options.config.as_deref().map_or_else(|| Ok(File::default()), read)?;
        let tls = file.tls.unwrap_or_default();
        let specs = first_given([machines, file.machines], || vec!["demo".to_owned()]);
        let machines = specs
            .into_iter()
            .map(|spec| spec.parse().map_err(|problem| ConfigError::Machine { spec, problem }))
            .collect::<Result<_, _>>()?;
        let grace = options.grace_seconds.or(file.grace_seconds).unwrap_or(GRACE);
        if grace > 3600 {
            return Err(ConfigError::Range("--grace-seconds is at most 3600"));
        }
        let max_calls = options.max_calls.or(file.max_calls).unwrap_or(MAX_CALLS);
        if max_calls == 0 {
            return Err(ConfigError::Range("--max-calls is at least 1"));
        }
        Ok(Self {
            listen: first_given([options.listen, file.listen], || vec![LISTEN]),
            uds: options.uds.or(file.uds).or_else(default_uds),
            tls: Tls::from_options(
                options.tls_cert.or(tls.cert),
                options.tls_key.or(tls.key),
                options.client_ca.or(tls.client_ca),
            )?,
            machines,
            client_files: options.client_files.or(file.client_files).map(folder).transpose()?,
            log: options.log.or(file.log).unwrap_or_else(|| "info".to_owned()),
            log_format: options.log_format.or(file.log_format).unwrap_or_default(),
            grace: Duration::from_secs(grace),
            max_calls,
        })
    }
}

fn address(text: &str) -> Result<SocketAddr, String> {
    text.parse().map_err(|_| {
        "write IP:PORT, such as 127.0.0.1:50051 or [::1]:50051; names are not looked up".to_owned()
    })
}

fn first_given<T>(lists: [Vec<T>; 2], default: impl FnOnce() -> Vec<T>) -> Vec<T> {
    lists.into_iter().find(|list| !list.is_empty()).unwrap_or_else(default)
}

fn read(path: &Path) -> Result<File, ConfigError> {
    let failed = |problem| ConfigError::Read { path: path.to_owned(), problem };
    let bytes = small_file::read(path).map_err(failed)?;
    let text = String::from_utf8(bytes).map_err(|_| {
        failed(std::io::Error::other("it is not UTF-8 text: name the daemon's own TOML file"))
    })?;
    toml::from_str(&text).map_err(|problem| ConfigError::File { path: path.to_owned(), problem })
}

/// Where a folder is, wherever its name leads later.
fn folder(path: PathBuf) -> Result<PathBuf, ConfigError> {
    let found = path.canonicalize().and_then(|found| {
        if found.is_dir() { Ok(found) } else { Err(std::io::ErrorKind::NotADirectory.into()) }
    });
    found.map_err(|problem| ConfigError::ClientFiles { path, problem })
}

fn default_uds() -> Option<PathBuf> {
    let folder = PathBuf::from(std::env::var_os("XDG_RUNTIME_DIR")?);
    let socket = folder.is_absolute().then(|| folder.join("pagewalk.sock"))?;
    // Nobody has asked for it: a second daemon, such as a demo, does without.
    std::os::unix::net::UnixStream::connect(&socket).is_err().then_some(socket)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn file(text: &str) -> Result<Config, ConfigError> {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), text).unwrap();
        let options = Options { config: Some(file.path().to_owned()), ..Options::default() };
        Config::resolve(options, Vec::new())
    }

    #[test]
    fn defaults() {
        let config = Config::resolve(Options::default(), Vec::new()).unwrap();
        assert_eq!(config.listen, [LISTEN]);
        assert_eq!(config.machines[0].id, "demo");
        assert_eq!((config.tls, config.grace), (None, Duration::from_secs(5)));
    }

    #[test]
    fn flags_win_over_the_file() {
        let text = "listen = ['127.0.0.1:1']\nmachines = ['a=demo']\nlog-format = 'json'\n";
        assert_eq!(file(text).unwrap().machines[0].id, "a");
        let path = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(path.path(), text).unwrap();
        let options = Options {
            config: Some(path.path().to_owned()),
            listen: vec!["127.0.0.1:2".parse().unwrap()],
            ..Options::default()
        };
        let config = Config::resolve(options, vec!["b=demo".to_owned()]).unwrap();
        assert_eq!(config.listen, ["127.0.0.1:2".parse().unwrap()]);
        assert_eq!((config.machines[0].id.as_str(), config.log_format), ("b", LogFormat::Json));
    }

    #[test]
    fn refusals_say_where() {
        for (text, said) in [
            ("lisen = []", "lisen"),
            ("[tls]\ncerts = 'x'", "certs"),
            ("listen = ['localhost']", "listen"),
            ("machines = ['nothing']", "nothing"),
            ("[tls]\ncert = 'x'", "--tls-key"),
            ("grace-seconds = 99999", "--grace-seconds"),
            ("max-calls = 0", "--max-calls"),
            ("client-files = '/nonexistent'", "--client-files /nonexistent"),
            ("client-files = '/dev/null'", "--client-files /dev/null"),
            ("log = 1", "log"),
            ("= =", "1"),
        ] {
            let error = file(text).unwrap_err().to_string();
            assert!(error.contains(said), "{text}: {error}");
        }
        // Cut off, it would parse and mean something else.
        let long = format!("{}\nmax-calls = 1", "#\n".repeat(1 << 19));
        assert!(file(&long).unwrap_err().to_string().contains("1 MiB"));
        let missing = Options { config: Some("/nonexistent/x.toml".into()), ..Options::default() };
        assert!(
            Config::resolve(missing, Vec::new()).unwrap_err().to_string().contains("/nonexistent/x.toml")
        );
    }
}
