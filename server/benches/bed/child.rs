//! The other process: the daemon over the guests of a bench, and two echoes beside it, one of which wears the daemon's layers.
//!
//! It is this program again, started with `--serve`. It says its addresses on standard output, walks in process when told
//! to on standard input, and ends when that closes.

use std::io::{BufRead as _, BufReader, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use hyper_util::rt::TokioIo;
use pagewalkd::config::Config;
use pagewalkd::listen::widen;
use pagewalkd::machine::{Machine, Machines};
use pagewalkd::serve::{Server, transport};
use tokio::net::{TcpListener, UnixListener, UnixStream};
use tokio_stream::StreamExt as _;
use tokio_stream::wrappers::UnixListenerStream;
use tonic::service::Routes;
use tonic::transport::server::TcpIncoming;
use tonic::transport::{Channel, Endpoint};
use tower::service_fn;

use super::echo::Echo;
use super::guest::{BATCHES, Shape, in_process};

const SERVE: &str = "--serve";
/// As the daemon's own, for the bare echo too.
const CALLS: usize = 1024;

/// Who serves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Who {
    Daemon,
    /// An echo behind the daemon's layers.
    Layered,
    /// An echo with nothing around it.
    Bare,
}

/// By what it is reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Way {
    Unix,
    Tcp,
}

/// Serves, if this process was started to. Never comes back then.
pub(crate) fn serve_if_asked() {
    let arguments: Vec<String> = std::env::args().collect();
    let Some(at) = arguments.iter().position(|argument| argument == SERVE) else { return };
    let directory = PathBuf::from(&arguments[at + 1]);
    let machines: Vec<Machine> =
        arguments[at + 2..].iter().map(|name| Shape::of(name).unwrap().machine()).collect();
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
    let addresses = runtime.block_on(start(&directory, machines.clone()));
    println!("{}", addresses.join(" "));
    let batches: Vec<(Shape, Vec<Vec<u64>>)> = machines
        .iter()
        .map(|machine| Shape::of(machine.id()).unwrap())
        .map(|shape| (shape, (0..BATCHES).map(|at| shape.batch(at)).collect()))
        .collect();
    for line in std::io::stdin().lines() {
        let asked = Shape::of(&line.unwrap()).unwrap();
        let at = batches.iter().position(|(shape, _)| *shape == asked).unwrap();
        println!("{}", in_process(&machines[at], &batches[at].1));
    }
    std::process::exit(0);
}

async fn start(directory: &Path, machines: Vec<Machine>) -> Vec<String> {
    let config =
        Config { uds: Some(socket(directory, Who::Daemon)), max_calls: CALLS, ..Config::on_loopback() };
    let server = Server::bind(&config, Machines::new(machines).unwrap()).await.unwrap();
    let mut addresses = vec![server.addresses()[0].to_string()];
    tokio::spawn(server.run(std::future::pending()));
    for who in [Who::Layered, Who::Bare] {
        let tcp = TcpListener::bind("127.0.0.1:0").await.unwrap();
        addresses.push(tcp.local_addr().unwrap().to_string());
        let tcp = TcpIncoming::from(tcp).with_nodelay(Some(true));
        let unix = UnixListenerStream::new(UnixListener::bind(socket(directory, who)).unwrap());
        let unix = unix.map(|stream| stream.inspect(widen));
        let routes = || Routes::new(Echo);
        if who == Who::Layered {
            let mut server = transport(CALLS);
            tokio::spawn(server.add_routes(routes()).serve_with_incoming(tcp));
            tokio::spawn(server.add_routes(routes()).serve_with_incoming(unix));
        } else {
            // The daemon's windows and frames: they are no layer.
            let mut server = tonic::transport::Server::builder()
                .initial_stream_window_size(2 << 20)
                .initial_connection_window_size(8 << 20)
                .max_frame_size(1 << 20);
            tokio::spawn(server.add_routes(routes()).serve_with_incoming(tcp));
            tokio::spawn(server.add_routes(routes()).serve_with_incoming(unix));
        }
    }
    addresses
}

fn socket(directory: &Path, who: Who) -> PathBuf {
    directory.join(format!("{who:?}"))
}

/// That process.
pub(crate) struct Other {
    child: Child,
    orders: Option<ChildStdin>,
    said: BufReader<ChildStdout>,
    directory: tempfile::TempDir,
    addresses: Vec<String>,
}

impl Other {
    /// Starts it over `shapes`; on processor `cpu` alone where one is given.
    pub(crate) fn start(shapes: &[Shape], cpu: Option<usize>) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let this = std::env::current_exe().unwrap();
        let mut command = match cpu {
            Some(cpu) => {
                let mut command = Command::new("taskset");
                command.args(["-c", &cpu.to_string()]).arg(this);
                command
            }
            None => Command::new(this),
        };
        command.arg(SERVE).arg(directory.path()).args(shapes.iter().map(|shape| shape.name()));
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        let mut said = BufReader::new(child.stdout.take().unwrap());
        let mut line = String::new();
        said.read_line(&mut line).unwrap();
        let addresses = line.split_whitespace().map(str::to_owned).collect();
        Self { orders: child.stdin.take(), child, said, directory, addresses }
    }

    /// Has it walk the batches of `shape` in process: nanoseconds an address.
    pub(crate) fn in_process(&mut self, shape: Shape) -> f64 {
        writeln!(self.orders.as_mut().unwrap(), "{}", shape.name()).unwrap();
        let mut line = String::new();
        self.said.read_line(&mut line).unwrap();
        line.trim().parse().unwrap()
    }

    pub(crate) fn target(&self, who: Who, way: Way) -> String {
        match way {
            Way::Unix => format!("unix:{}", socket(self.directory.path(), who).display()),
            Way::Tcp => self.addresses[who as usize].clone(),
        }
    }

    pub(crate) async fn connect(&self, who: Who, way: Way) -> Channel {
        let uri = format!("http://{}", self.addresses[who as usize]);
        let endpoint = Endpoint::from_shared(uri).unwrap();
        let endpoint = endpoint.initial_stream_window_size(8 << 20).initial_connection_window_size(16 << 20);
        let endpoint = endpoint.max_frame_size(1 << 20).tcp_nodelay(true);
        if way == Way::Tcp {
            return endpoint.connect().await.unwrap();
        }
        let path = socket(self.directory.path(), who);
        let connector = service_fn(move |_| {
            let path = path.clone();
            async move {
                let stream = UnixStream::connect(path).await?;
                widen(&stream);
                Ok::<_, std::io::Error>(TokioIo::new(stream))
            }
        });
        endpoint.connect_with_connector(connector).await.unwrap()
    }

    /// Nanoseconds of processor that it has used.
    pub(crate) fn cpu(&self) -> f64 {
        let tasks = std::fs::read_dir(format!("/proc/{}/task", self.child.id())).unwrap();
        let used = |task: std::fs::DirEntry| {
            let text = std::fs::read_to_string(task.path().join("schedstat")).unwrap_or_default();
            text.split_whitespace().next().and_then(|used| used.parse::<f64>().ok()).unwrap_or_default()
        };
        tasks.map(|task| used(task.unwrap())).sum()
    }

    /// A line of its `/proc/PID/status`, in KiB.
    pub(crate) fn memory(&self, line: &str) -> u64 {
        let text = std::fs::read_to_string(format!("/proc/{}/status", self.child.id())).unwrap();
        let line = text.lines().find_map(|each| each.strip_prefix(line)).unwrap();
        line.trim_start_matches(':').trim().trim_end_matches(" kB").parse().unwrap()
    }

    /// Begins to measure the peak anew.
    pub(crate) fn reset_peak(&self) {
        std::fs::write(format!("/proc/{}/clear_refs", self.child.id()), "5").unwrap();
    }
}

impl Drop for Other {
    fn drop(&mut self) {
        self.orders = None;
        let _ = self.child.wait();
    }
}

/// Keeps this process on one processor.
pub(crate) fn pin(cpu: usize) {
    let this = std::process::id().to_string();
    let pinned =
        Command::new("taskset").args(["-acp", &cpu.to_string(), &this]).stdout(Stdio::null()).status();
    assert!(pinned.unwrap().success(), "taskset does not work here");
}
