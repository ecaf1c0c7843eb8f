//! `MemoryService`.

use std::ops::Range;

use pagewalk::{Access, AccessKind, Backing, Fault, Gpa, Gva, Memory as _, Privilege, Walker};
use pagewalk_proto::v1;
use pagewalk_proto::v1::memory_service_server::MemoryService;
use tonic::{Request, Response, Status};

use super::Daemon;
use super::resolve::patience;
use super::translation::{check_width, walker};
use crate::convert::{self, access::by_vcpu};
use crate::machine::{GuestRam, MemoryError, PAGE};
use crate::status::Error;
use crate::vcpu::Registers;

/// Most bytes of one read.
const READ_MAX: u64 = 1 << 20;
/// Most bytes of one write: they fit into a request.
const WRITE_MAX: usize = 32 << 10;

#[tonic::async_trait]
impl MemoryService for Daemon {
    async fn read_memory(
        &self,
        request: Request<v1::ReadMemoryRequest>,
    ) -> Result<Response<v1::ReadMemoryResponse>, Status> {
        use v1::read_memory_request::At;
        let patience = patience(&request);
        let request = request.into_inner();
        if !(1..=READ_MAX).contains(&request.length) {
            let problem = format!("{}: from 1 to {READ_MAX} bytes; ask again for more", request.length);
            return Err(Error::invalid("length", problem).into());
        }
        let target = self.target(request.vcpu)?;
        let snapshot = target.snapshot(request.freshness, patience).await?;
        let at = match request.at {
            Some(At::Gva(gva)) => {
                let privilege = privilege(request.privilege, &snapshot.registers)?;
                let access = by_vcpu(AccessKind::Read, privilege, &snapshot.registers);
                let walker = walker(request.r#override.as_ref(), &snapshot)?.into_owned();
                let gva = target.gva(self, patience, Some(gva), "gva").await?;
                Space::virtual_at(gva, walker, access, "gva", request.length)?
            }
            Some(At::Gpa(gpa)) => {
                Space::physical_at(convert::address::number(Some(gpa), "gpa")?, "gpa", request.length)?
            }
            None => return Err(Error::invalid("at", "required: gva or gpa").into()),
        };
        let (data, stop) = target.read(self, patience, |memory| at.read(memory)).await?;
        Ok(Response::new(v1::ReadMemoryResponse {
            data,
            stop,
            provenance: Some(self.provenance(&target, &snapshot)?),
            address: at.first,
        }))
    }

    async fn write_memory(
        &self,
        request: Request<v1::WriteMemoryRequest>,
    ) -> Result<Response<v1::WriteMemoryResponse>, Status> {
        use v1::write_memory_request::At;
        let patience = patience(&request);
        let request = request.into_inner();
        if !(1..=WRITE_MAX).contains(&request.data.len()) {
            let problem =
                format!("{} bytes: from 1 to {WRITE_MAX}; write again for more", request.data.len());
            return Err(Error::invalid("data", problem).into());
        }
        let target = self.target(request.vcpu)?;
        let source = target.machine.source();
        if !source.capabilities().can_write_memory {
            return Err(Error::Precondition(format!(
                "the memory of a machine from source `{}` is only read: whoever runs the guest would not know of a write",
                source.kind()
            ))
            .into());
        }
        let snapshot = target.snapshot(request.freshness, patience).await?;
        let length = request.data.len() as u64;
        let at = match request.at {
            Some(At::Gva(gva)) => {
                let access = by_vcpu(AccessKind::Write, Privilege::Exempt, &snapshot.registers);
                let walker = walker(request.r#override.as_ref(), &snapshot)?.into_owned();
                let gva = target.gva(self, patience, Some(gva), "gva").await?;
                Space::virtual_at(gva, walker, access, "gva", length)?
            }
            Some(At::Gpa(gpa)) => {
                Space::physical_at(convert::address::number(Some(gpa), "gpa")?, "gpa", length)?
            }
            None => return Err(Error::invalid("at", "required: gva or gpa").into()),
        };
        let written = target.read(self, patience, |memory| at.write(memory, &request.data)).await?;
        let stop = written.map_err(|problem| Error::Failed(problem.to_string()))?;
        Ok(Response::new(v1::WriteMemoryResponse {
            written: if stop.is_none() { length } else { 0 },
            stop,
            provenance: Some(self.provenance(&target, &snapshot)?),
        }))
    }
}

/// Whose rights a read needs. As a debugger reads, unless it is said.
fn privilege(privilege: i32, registers: &Registers) -> Result<Privilege, Error> {
    match v1::Privilege::try_from(privilege) {
        Ok(v1::Privilege::Unspecified) => Ok(Privilege::Exempt),
        _ => convert::access::privilege(privilege, registers, "privilege"),
    }
}

/// Bytes of an address space, by their addresses there.
struct Space {
    /// First and last: the last byte of all has no address behind it.
    first: u64,
    last: u64,
    /// How an address there becomes a GPA; physical ones are that already.
    through: Option<(Walker, Access)>,
}

/// Why an address has no GPA that can be used.
enum Refused {
    Fault(Fault),
    Backing { gpa: u64, reason: &'static str },
}

impl Space {
    fn physical_at(first: u64, field: &'static str, length: u64) -> Result<Self, Error> {
        let last = first.checked_add(length - 1).ok_or_else(|| {
            Error::invalid(field, format!("{first:#x} and {length} bytes reach beyond 64 bits"))
        })?;
        Ok(Self { first, last, through: None })
    }

    fn virtual_at(
        first: u64,
        walker: Walker,
        access: Access,
        field: &'static str,
        length: u64,
    ) -> Result<Self, Error> {
        let space = Self::physical_at(first, field, length)?;
        check_width(&walker, first, field)?;
        check_width(&walker, space.last, field)?;
        Ok(Self { through: Some((walker, access)), ..space })
    }

    /// The addresses of the bytes, page by page: the first one's, and their number. Every walk is good for one: leaves of any size,
    /// in either dimension, are made of such pages.
    fn pages(&self) -> impl Iterator<Item = (u64, usize)> {
        let mut next = Some(self.first);
        let last = self.last;
        std::iter::from_fn(move || {
            let at = next?;
            let page_last = (at | (PAGE - 1)).min(last);
            next = (page_last < last).then(|| page_last + 1);
            // At most a page.
            Some((at, (page_last - at + 1) as usize))
        })
    }

    fn gpa(&self, memory: &GuestRam, at: u64) -> Result<u64, Refused> {
        match &self.through {
            None => Ok(at),
            Some((walker, access)) => {
                walker.translate(memory, Gva(at), access).map(|page| page.gpa.0).map_err(Refused::Fault)
            }
        }
    }

    fn read(&self, memory: &GuestRam) -> (Vec<u8>, Option<v1::MemoryStop>) {
        // At most `READ_MAX`.
        let mut data = vec![0; (self.last - self.first + 1) as usize];
        let mut done = 0;
        for (at, size) in self.pages() {
            let Range { start, end } = done..done + size;
            let read = self.gpa(memory, at).and_then(|gpa| {
                let into = data.get_mut(start..end).unwrap_or_default();
                match memory.read(Gpa(gpa), into) {
                    Ok(read) if read == size => Ok(()),
                    Ok(read) => {
                        done += read;
                        let reason = "no memory is behind that physical address: a device, or nothing";
                        Err(Refused::Backing { gpa: gpa + read as u64, reason })
                    }
                    Err(_) => Err(Refused::Backing { gpa, reason: "the host does not give that memory" }),
                }
            });
            match read {
                Ok(()) => done = end,
                Err(refused) => {
                    data.truncate(done);
                    let stop = refused.stop(self.first + done as u64);
                    return (data, Some(stop));
                }
            }
        }
        (data, None)
    }

    /// Writes all, or says why nothing was written.
    fn write(&self, memory: &GuestRam, data: &[u8]) -> Result<Option<v1::MemoryStop>, MemoryError> {
        let mut places = Vec::new();
        for (at, size) in self.pages() {
            let place = self.gpa(memory, at).and_then(|gpa| match memory.backing(Gpa(gpa)) {
                Backing::Ram => Ok(gpa),
                Backing::ReadOnly => {
                    Err(Refused::Backing { gpa, reason: "the memory there can only be read by the guest" })
                }
                Backing::None => Err(Refused::Backing {
                    gpa,
                    reason: "no memory is behind that physical address: a device, or nothing",
                }),
            });
            match place {
                Ok(gpa) => places.push((gpa, size)),
                Err(refused) => return Ok(Some(refused.stop(at))),
            }
        }
        let mut rest = data;
        for (gpa, size) in places {
            let (page, after) = rest.split_at_checked(size).unwrap_or((rest, &[]));
            memory.write(Gpa(gpa), page)?;
            rest = after;
        }
        Ok(None)
    }
}

impl Refused {
    fn stop(self, address: u64) -> v1::MemoryStop {
        match self {
            Self::Fault(fault) => v1::MemoryStop {
                address,
                gpa: 0,
                reason: fault.reason.to_string(),
                fault: Some(convert::fault::fault(&fault)),
            },
            Self::Backing { gpa, reason } => {
                v1::MemoryStop { address, gpa, reason: reason.to_owned(), fault: None }
            }
        }
    }
}
