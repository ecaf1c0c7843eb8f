//! A peer that speaks QMP as QEMU does, from this process, whose memory the guest's is in: it says and does what a test wants, at
//! the moment that it wants.

use std::io::{BufRead as _, BufReader, Write as _};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::{Arc, Condvar, Mutex, MutexGuard};

use libtest_mimic::Failed;
use serde_json::{Value, json};
use tempfile::TempDir;

const GREETING: &str = r#"{"QMP": {"version": {"qemu": {"micro": 0, "minor": 2, "major": 7}, "package": ""}, "capabilities": []}}"#;
const REGISTERS: &str = "RAX=0 RBX=0 RCX=0 RDX=0\nRSI=0 RDI=0 RBP=0 RSP=0\nR8 =0 R9 =0 R10=0 R11=0\nR12=0 R13=0 R14=0 R15=0\n\
    RIP=fff0 RFL=00000002 [-------] CPL=0 II=0 A20=1 SMM=0 HLT=0\nES =0000 0 0 0\nCS =f000 0 0 0\nSS =0000 0 0 0\n\
    DS =0000 0 0 0\nFS =0000 0 0 0\nGS =0000 0 0 0\nCR0=60000010 CR2=0 CR3=0 CR4=0\nEFER=0\n";

/// A range of guest memory: where it starts, its size, and where it is in this process.
#[derive(Clone, Copy)]
pub(crate) struct Place {
    pub(crate) start: u64,
    pub(crate) size: u64,
    pub(crate) host: u64,
}

/// What the peer says.
pub(crate) struct State {
    /// In `info mtree -f`.
    pub(crate) view: Vec<Place>,
    /// By `gpa2hva`.
    pub(crate) placed: Vec<Place>,
    /// How often `gpa2hva` finds nothing.
    pub(crate) misses: usize,
    pub(crate) status: &'static str,
    /// What the guest does as soon as QEMU has said what it does.
    pub(crate) then: Option<(&'static str, &'static str)>,
    /// The vCPU that is not there any more.
    pub(crate) unplugged: Option<i64>,
    /// `stop` waits.
    pub(crate) gate_closed: bool,
    /// The connection ends in place of an answer to this command.
    pub(crate) ends_at: &'static str,
    /// The commands that were carried out.
    pub(crate) done: Vec<String>,
    client: Option<UnixStream>,
}

impl State {
    fn send(&self, line: &str) {
        if let Some(mut client) = self.client.as_ref() {
            // A client may have left.
            let _ = client.write_all(format!("{line}\r\n").as_bytes());
        }
    }

    /// Sends an event.
    pub(crate) fn tell(&self, event: &str) {
        self.send(&event_line(event));
    }

    fn monitor(&mut self, line: &str, vcpu: Option<i64>) -> Result<Value, String> {
        let address = line.strip_prefix("gpa2hva 0x").map(|digits| u64::from_str_radix(digits, 16).unwrap());
        Ok(Value::String(match (line, address) {
            ("info registers", _) if vcpu.is_some() && vcpu == self.unplugged => {
                return Err("a CPU number is expected".to_owned());
            }
            ("info registers", _) => REGISTERS.to_owned(),
            ("info mtree -f", _) => {
                let lines = self.view.iter().map(|Place { start, size, .. }| {
                    format!("  {start:016x}-{:016x} (prio 0, ram): m{start:x}\n", start + size - 1)
                });
                format!("FlatView #0\n AS \"memory\", root: system\n{}", lines.collect::<String>())
            }
            (_, Some(_)) if self.misses > 0 => {
                self.misses -= 1;
                "No memory is mapped at that address".to_owned()
            }
            (_, Some(at)) => match self.placed.iter().find(|place| place.start == at) {
                Some(place) => format!("Host virtual address for {at:#x} (m) is {:#x}", place.host),
                None => format!("No memory is mapped at address {at:#x}"),
            },
            _ => return Err(format!("unknown command {line}")),
        }))
    }
}

fn event_line(event: &str) -> String {
    json!({"event": event, "data": {}, "timestamp": {"seconds": 1, "microseconds": 0}}).to_string()
}

pub(crate) struct Fake {
    state: Arc<(Mutex<State>, Condvar)>,
    pub(crate) qmp: PathBuf,
    _folder: TempDir,
}

impl Fake {
    /// A guest with this memory and two vCPUs, which runs.
    pub(crate) fn start(places: &[Place]) -> Result<Self, Failed> {
        let folder = tempfile::tempdir()?;
        let qmp = folder.path().join("fake.qmp");
        let listener = UnixListener::bind(&qmp)?;
        let state = State {
            view: places.to_vec(),
            placed: places.to_vec(),
            misses: 0,
            status: "running",
            then: None,
            unplugged: None,
            gate_closed: false,
            ends_at: "",
            done: Vec::new(),
            client: None,
        };
        let state = Arc::new((Mutex::new(state), Condvar::new()));
        std::thread::spawn({
            let state = Arc::clone(&state);
            move || {
                for stream in listener.incoming().map_while(Result::ok) {
                    serve(&stream, &state);
                }
            }
        });
        Ok(Self { state, qmp, _folder: folder })
    }

    /// To be looked at and changed while the peer does nothing.
    pub(crate) fn state(&self) -> MutexGuard<'_, State> {
        self.state.0.lock().unwrap()
    }

    /// Lets `stop` be done.
    pub(crate) fn open_gate(&self) {
        self.state().gate_closed = false;
        self.state.1.notify_all();
    }

    /// How often a command was carried out.
    pub(crate) fn count(&self, command: &str) -> usize {
        self.state().done.iter().filter(|done| *done == command).count()
    }
}

fn serve(stream: &UnixStream, shared: &(Mutex<State>, Condvar)) {
    shared.0.lock().unwrap().client = stream.try_clone().ok();
    shared.0.lock().unwrap().send(GREETING);
    for line in BufReader::new(stream).lines().map_while(Result::ok) {
        let request: Value = serde_json::from_str(&line).unwrap();
        let command = request["execute"].as_str().unwrap_or_default().to_owned();
        let mut state = shared.0.lock().unwrap();
        if command == state.ends_at {
            break;
        }
        if command == "stop" {
            state.done.push("stop begins".to_owned());
            state = shared.1.wait_while(state, |state| state.gate_closed).unwrap();
        }
        let arguments = &request["arguments"];
        let answer = match command.as_str() {
            "qmp_capabilities" => Ok(json!({})),
            "query-kvm" => Ok(json!({"enabled": false, "present": true})),
            "query-version" => Ok(json!({"qemu": {"micro": 0, "minor": 2, "major": 7}, "package": ""})),
            "query-status" => {
                let running = state.status == "running";
                Ok(json!({"running": running, "singlestep": false, "status": state.status}))
            }
            "query-cpus-fast" => Ok((0..2)
                .map(|n| json!({"cpu-index": n, "qom-path": format!("/{n}"), "thread-id": 1, "target": "x86_64"}))
                .collect()),
            "stop" | "cont" => {
                let (status, event) =
                    if command == "stop" { ("paused", "STOP") } else { ("running", "RESUME") };
                if state.status != status {
                    state.status = status;
                    state.tell(event);
                }
                Ok(json!({}))
            }
            "human-monitor-command" => {
                let line = arguments["command-line"].as_str().unwrap_or_default();
                state.monitor(line, arguments["cpu-index"].as_i64())
            }
            _ => Err("no such command".to_owned()),
        };
        let mut said = match answer {
            Ok(answer) => json!({ "return": answer }),
            Err(problem) => json!({"error": {"class": "GenericError", "desc": problem}}),
        }
        .to_string();
        if command == "query-status"
            && let Some((status, event)) = state.then.take()
        {
            // At once: the daemon reads both before anybody has looked at the first.
            state.status = status;
            said = format!("{said}\r\n{}", event_line(event));
        }
        state.send(&said);
        state.done.push(command);
    }
    // The other handle on it would keep it open.
    shared.0.lock().unwrap().client = None;
    let _ = stream.shutdown(std::net::Shutdown::Both);
}
