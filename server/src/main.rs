//! The pagewalk daemon.

use std::io::{self, IsTerminal as _, Write as _};
use std::process::ExitCode;
use std::time::Duration;

use clap::Parser as _;
use mimalloc::MiMalloc;
use pagewalk_proto::readable_lines;
use pagewalkd::config::{Cli, Command, Config, LogFormat, Options};
use pagewalkd::machine::Machines;
use pagewalkd::serve::Server;
use pagewalkd::tour;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;
use tokio::time::{Instant, timeout_at};
use tracing_subscriber::EnvFilter;

/// The columns of batches come and go by the half-megabyte: the C library's allocator hands such memory back to the system and has
/// it cleared anew each time.
#[global_allocator]
static ALLOCATOR: MiMalloc = MiMalloc;

/// What comes sooner belongs to the signal before: `timeout`, and programs that pass signals on, send one twice.
const APART: Duration = Duration::from_millis(500);
/// How long the end may take.
const LAST: Duration = Duration::from_secs(5);

type Error = Box<dyn std::error::Error + Send + Sync>;

fn main() -> ExitCode {
    match run(Cli::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // The log may not be set up yet, and the reader is a person at a prompt.
            let _ = writeln!(std::io::stderr(), "pagewalkd: {}", readable_lines(&error.to_string()));
            ExitCode::FAILURE
        }
    }
}

fn is_broken_pipe(error: &Error) -> bool {
    error.downcast_ref::<io::Error>().is_some_and(|error| error.kind() == io::ErrorKind::BrokenPipe)
}

fn run(cli: Cli) -> Result<(), Error> {
    let (options, machines, tour) = match cli.command {
        Command::Demo { once, options } => (demo_options(options, once), vec!["demo".to_owned()], Some(once)),
        Command::Serve { machines, options } => (options, machines, None),
    };
    let quiet = tour.is_some() && options.log.is_none();
    let config = Config::resolve(options, machines)?;
    start_logging(if quiet { "warn" } else { &config.log }, config.log_format)?;
    let machines = Machines::default();
    for spec in &config.machines {
        machines.open(spec)?;
    }
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let served = runtime.block_on(serve(&config, machines, tour));
    // What blocks, on a peer or on a file, is not waited for without end.
    runtime.shutdown_timeout(LAST);
    served
}

/// A tour that ends by itself must not get in the way of a daemon that is there.
fn demo_options(options: Options, once: bool) -> Options {
    match options.listen.as_slice() {
        [] if once => Options { listen: vec![([127, 0, 0, 1], 0).into()], ..options },
        _ => options,
    }
}

async fn serve(config: &Config, machines: Machines, tour: Option<bool>) -> Result<(), Error> {
    let signals = count_signals()?;
    let signalled = async |times| {
        // Whoever counts does so until the runtime ends.
        let _ = signals.clone().wait_for(|count| *count >= times).await;
    };
    let server = Server::bind(config, machines).await?;
    let addresses = server.addresses();
    let mut out = std::io::stdout();
    for address in &addresses {
        writeln!(out, "listening on {address}")?;
    }
    if let Some(path) = server.uds() {
        writeln!(out, "listening on unix:{}", path.display())?;
    }
    out.flush()?;
    let at_once = async {
        signalled(2).await;
        tracing::warn!("a second signal: calls in flight are cut off");
        // Machines are let go of first, and somebody may not let go.
        std::thread::spawn(|| {
            std::thread::sleep(LAST);
            std::process::exit(1);
        });
    };
    let (Some(once), Some(address)) = (tour, addresses.first()) else {
        return tokio::select! {
            served = server.run(signalled(1)) => Ok(served?),
            () = at_once => Ok(()),
        };
    };
    let (toured, tour_is_over) = tokio::sync::oneshot::channel();
    let tour = tokio::spawn(tour::run(*address, once, toured));
    let stop = async {
        tokio::select! {
            () = signalled(1) => {}
            // A tour that goes on serving never says that it is over.
            Ok(()) = tour_is_over => {}
        }
    };
    tokio::select! {
        served = server.run(stop) => served?,
        () = at_once => return Ok(()),
    }
    if !once {
        return Ok(());
    }
    // Whoever read the tour, and left, has seen enough.
    tour.await?.or_else(|error| if is_broken_pipe(&error) { Ok(()) } else { Err(error) })
}

/// How often the daemon was told to stop, by SIGTERM or SIGINT.
fn count_signals() -> io::Result<watch::Receiver<u32>> {
    let (mut terminate, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    let (count, signals) = watch::channel(0);
    tokio::spawn(async move {
        let mut told = async || tokio::select! { _ = terminate.recv() => {}, _ = interrupt.recv() => {} };
        loop {
            told().await;
            count.send_modify(|count| *count += 1);
            let again = Instant::now() + APART;
            while timeout_at(again, told()).await.is_ok() {}
        }
    });
    Ok(signals)
}

fn start_logging(filter: &str, format: LogFormat) -> Result<(), Error> {
    let filter = EnvFilter::try_new(filter).map_err(|error| format!("--log {filter}: {error}"))?;
    let log = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    match format {
        LogFormat::Human => log.with_ansi(std::io::stderr().is_terminal()).init(),
        LogFormat::Json => log.json().init(),
    }
    Ok(())
}
