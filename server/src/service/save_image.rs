//! `SaveImage`: a machine as a stream of an image's parts.
//!
//! One task pauses the guest, sends what there is, and lets the guest run on, whatever becomes of the client meanwhile. Memory
//! is read piece by piece on the blocking pool, each once the client is ready for it.

use std::sync::Arc;
use std::time::{Duration, Instant};

use pagewalk_proto::v1::save_image_response::Part;
use pagewalk_proto::{readable_within, v1};
use tokio::task::spawn_blocking;

use super::Daemon;
use super::outlet::{Answers, Outlet};
use super::resolve::{gone, refused, still_there};
use crate::machine::image::{Cpu, Description, LandmarkEntry, MemoryRegion, Number, OF_MAX, VcpuEntry};
use crate::machine::{self, GuestRam, Machine, MemoryError};
use crate::status::Error;
use crate::vcpu::{Hold, Snapshot, VcpuError};

const MEMORY_FILE: &str = "memory.bin";
const NAME_MAX: usize = 255;
const PAGE: usize = machine::PAGE as usize;
/// Most of memory that is looked at and sent at once.
const PIECE: usize = 1 << 20;
/// Most zeroes that are skipped before somebody may look whether the client is still there.
const SKIPPED: u64 = 64 << 20;
/// How long a client may leave its stream unread: the guest stands still meanwhile.
const STALLED: Duration = Duration::from_secs(30);
/// How long the guest has to run on, afterwards.
const RESUME: Duration = Duration::from_secs(5);

type Parts = Outlet<v1::SaveImageResponse>;

/// The memory file's name, as the request wants it.
pub(super) fn memory_file(name: String) -> Result<String, Error> {
    match name.as_str() {
        "" => Ok(MEMORY_FILE.to_owned()),
        "." | ".." => Err(Error::invalid("memory_file", "is a folder")),
        _ if name.len() > NAME_MAX || name.contains(['/', '\0']) => {
            Err(Error::invalid("memory_file", format!("1 to {NAME_MAX} bytes, without `/`")))
        }
        _ => Ok(name),
    }
}

/// Begins to save `machine`.
pub(super) fn start(
    daemon: Daemon,
    machine: Arc<Machine>,
    memory_file: String,
    patience: Instant,
) -> Answers<v1::SaveImageResponse> {
    let (parts, stream) = Outlet::new(STALLED);
    tokio::spawn(async move {
        let mut draining = daemon.draining.clone();
        let mut held = Vec::new();
        let ended = tokio::select! {
            ended = save(&daemon, &machine, memory_file, patience, &mut held, &parts) => ended,
            // The client has gone, and needs no reason.
            () = parts.closed() => Ok(()),
            _ = draining.wait_for(|draining| *draining) => Err(Error::ShuttingDown),
            lost = machine.when_gone() => Err(gone(&machine, lost)),
        };
        let vcpus: Vec<_> = machine.source().vcpus().to_vec();
        // Whatever is under way, QEMU's stop too, they run on after it; they are waited for, so that a daemon that ends does not end
        // before that.
        drop(held);
        let run_on = Instant::now() + RESUME;
        for vcpu in vcpus {
            // What keeps it from running on is in the log.
            let _ = vcpu.sync(run_on).await;
        }
        if let Err(error) = ended {
            parts.end(error);
        }
    });
    stream
}

async fn save(
    daemon: &Daemon,
    machine: &Arc<Machine>,
    memory_file: String,
    patience: Instant,
    held: &mut Vec<Hold>,
    parts: &Parts,
) -> Result<(), Error> {
    let snapshots = pause(machine, patience, held).await?;
    // Now that nothing moves: memory may have been laid out anew before.
    let memory = machine.source().memory();
    let description = describe(machine, &memory, &memory_file, &snapshots)?;
    let start = v1::ImageStart {
        description,
        memory_file_bytes: memory.size(),
        provenance: Some(daemon.machine_provenance(machine)),
    };
    send(parts, Part::Start(start)).await?;

    let mut reader = Reader { memory, region: 0, offset: 0, written: 0 };
    let mut contents_bytes = 0;
    loop {
        let place = daemon.blocking.acquire().await.map_err(|_| Error::ShuttingDown)?;
        let read = spawn_blocking(move || {
            let piece = reader.next();
            (reader, piece)
        });
        let (next, piece) = read.await.map_err(|panicked| Error::Failed(panicked.to_string()))?;
        drop(place);
        reader = next;
        let piece = piece.map_err(|problem| Error::Failed(problem.to_string()));
        // What was read of a machine that has gone is worth nothing, and an error has that reason.
        still_there(machine)?;
        match piece? {
            Found::Piece(piece) => {
                contents_bytes += piece.contents.len() as u64;
                send(parts, Part::Piece(piece)).await?;
            }
            // The client hears how far this is, and that somebody is at work.
            Found::Zeroes => {
                let offset = reader.written + reader.offset;
                send(parts, Part::Piece(v1::ImagePiece { offset, contents: Vec::new() })).await?;
            }
            Found::End => break,
        }
    }
    let at_rest = machine.source().vcpus().iter().zip(&snapshots).all(|(vcpu, then)| {
        let now = vcpu.latest();
        now.run_state == then.run_state && now.registers == then.registers
    });
    if !at_rest {
        return Err(Error::RanOn { machine: machine.id().to_owned() });
    }
    send(parts, Part::End(v1::ImageEnd { contents_bytes })).await
}

async fn send(parts: &Parts, part: Part) -> Result<(), Error> {
    parts.place().await?.send(Ok(v1::SaveImageResponse { part: Some(part) }));
    Ok(())
}

/// Pauses what runs, and gives the state of each vCPU at rest.
async fn pause(
    machine: &Machine,
    patience: Instant,
    held: &mut Vec<Hold>,
) -> Result<Vec<Arc<Snapshot>>, Error> {
    let vcpus = machine.source().vcpus();
    if !machine.source().capabilities().live {
        return Ok(vcpus.iter().map(|vcpu| vcpu.latest()).collect());
    }
    let mut snapshots = Vec::new();
    for vcpu in vcpus {
        let hold = Hold::new(Arc::clone(vcpu));
        let paused = hold.pause(patience).await;
        held.push(hold);
        match paused {
            Ok(_) => {}
            // It is at rest for good.
            Err(VcpuError::Stopped { .. }) => {}
            Err(problem) => return Err(refused(machine, problem)),
        }
    }
    for vcpu in vcpus {
        // Once all of them are: one may have been the last to change another's registers.
        snapshots.push(vcpu.sync(patience).await.map_err(|problem| refused(machine, problem))?);
    }
    Ok(snapshots)
}

fn describe(
    machine: &Machine,
    memory: &GuestRam,
    memory_file: &str,
    snapshots: &[Arc<Snapshot>],
) -> Result<String, Error> {
    let source = machine.source();
    let mut offset = 0;
    let regions = memory.regions().iter().map(|region| {
        let at = offset;
        offset += region.size;
        MemoryRegion {
            gpa: Number(region.start.0),
            size: Number(region.size),
            file: memory_file.to_owned(),
            offset: Number(at),
            read_only: region.read_only,
        }
    });
    let of = format!("machine {}, {}", machine.id(), source.description());
    let description = Description {
        version: Description::VERSION,
        of: Some(readable_within(&of, OF_MAX)),
        cpu: Cpu::of(&source.cpu()),
        regions: regions.collect(),
        vcpus: snapshots.iter().map(|snapshot| VcpuEntry::of(snapshot)).collect(),
        landmarks: source.landmarks().iter().map(LandmarkEntry::of).collect(),
    };
    description.to_toml().map_err(|problem| Error::Failed(problem.to_string()))
}

/// What was found on the way through memory.
enum Found {
    Piece(v1::ImagePiece),
    /// Nothing but zeroes, so far.
    Zeroes,
    End,
}

/// Goes through memory once, region by region.
struct Reader {
    memory: Arc<GuestRam>,
    region: usize,
    /// In the region.
    offset: u64,
    /// Size of the regions before it: where it begins in the file.
    written: u64,
}

impl Reader {
    fn next(&mut self) -> Result<Found, MemoryError> {
        let mut skipped = 0;
        while skipped < SKIPPED {
            let Some(region) = self.memory.regions().get(self.region) else { return Ok(Found::End) };
            if self.offset == region.size {
                self.written += region.size;
                self.region += 1;
                self.offset = 0;
                continue;
            }
            let size = (region.size - self.offset).min(PIECE as u64);
            let mut contents = vec![0; size as usize];
            let gpa = pagewalk::Gpa(region.start.0 + self.offset);
            let read = self.memory.read(gpa, &mut contents)?;
            if read != contents.len() {
                let problem = "memory ends before its region does".to_owned();
                return Err(MemoryError::Access { gpa: gpa.0, problem });
            }
            let at = self.written + self.offset;
            self.offset += size;
            let is_set = |page: &[u8]| page.iter().any(|byte| *byte != 0);
            let Some(first) = contents.chunks(PAGE).position(is_set) else {
                skipped += size;
                continue;
            };
            let last = contents.chunks(PAGE).rposition(is_set).unwrap_or(first);
            contents.truncate((last + 1) * PAGE);
            contents.drain(..first * PAGE);
            return Ok(Found::Piece(v1::ImagePiece { offset: at + (first * PAGE) as u64, contents }));
        }
        Ok(Found::Zeroes)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use pagewalk::Gpa;

    use super::*;
    use crate::machine::Region;

    #[test]
    fn the_reader_meets_every_byte_that_is_set_and_skips_zeroes() {
        let region = |start, size| Region { start: Gpa(start), size, read_only: false };
        let memory = GuestRam::allocate(&[region(0x1000, 3 << 20), region(1 << 30, 0x2000)]).unwrap();
        for gpa in [0x1000, 0x3fff, (2 << 20) + 0x7000, (1 << 30) + 0x1fff] {
            memory.write(Gpa(gpa), &[7]).unwrap();
        }
        let mut reader = Reader { memory: Arc::new(memory), region: 0, offset: 0, written: 0 };
        let mut file = vec![0; (3 << 20) + 0x2000];
        let mut sent = 0;
        loop {
            match reader.next().unwrap() {
                Found::Piece(v1::ImagePiece { offset, contents }) => {
                    file[offset as usize..][..contents.len()].copy_from_slice(&contents);
                    sent += contents.len();
                }
                Found::Zeroes => {}
                Found::End => break,
            }
        }
        let set: Vec<usize> = (0..file.len()).filter(|at| file[*at] != 0).collect();
        assert_eq!(set, [0, 0x2fff, (2 << 20) + 0x6000, (3 << 20) + 0x1fff]);
        // Three pages of the first piece, and two on their own: holes inside a piece are sent.
        assert_eq!(sent, 5 * PAGE);
    }

    #[test]
    fn a_name_of_a_file_is_no_path() {
        assert_eq!(memory_file(String::new()).unwrap(), "memory.bin");
        assert_eq!(memory_file("demo.mem".into()).unwrap(), "demo.mem");
        for name in ["..", ".", "a/b", "/etc/passwd", "a\0b", &"x".repeat(256)] {
            assert!(memory_file(name.into()).is_err(), "{name:?}");
        }
    }
}
