//! `ListAddressSpaces` and `TranslateAcross`: the address spaces of a machine, and one address in many of them.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Instant;

use pagewalk::{Gpa, Gva, PagingMode, Walker};
use pagewalk_proto::v1;
use pagewalk_proto::v1::space_translation::Outcome;
use tokio::time::timeout_at;

use super::Daemon;
use super::resolve::Target;
use super::translation::{check_width, walker};
use crate::convert;
use crate::machine::{GuestRam, Machine};
use crate::status::Error;
use crate::tasks::{self, Task, TaskList};
use crate::vcpu::{NestedMode, SeenSpace, Snapshot};

/// Spaces in one answer, and in one request.
const MOST: usize = 1024;
/// Tasks of one space in an answer.
const MOST_TASKS: usize = 16;
/// Linux's page-table isolation has the user's top table behind the kernel's.
const USER_ROOT: u64 = 1 << 12;
/// What the two halves differ in where they map the same: accessed, and no-execute, by which the kernel keeps itself from
/// running a user's code.
const APART: u64 = 1 << 5 | 1 << 63;
const PRESENT: u64 = 1;
/// Entries of the lower half of a table: user space.
const USER_ENTRIES: usize = 256;

/// A space, and the vCPU that saw it last.
struct Seen {
    vcpu: u32,
    space: SeenSpace,
}

/// What all vCPUs saw: the most recent first, and how many are left out.
fn seen(machine: &Machine) -> (Vec<Seen>, u64) {
    let mut by_root = BTreeMap::<u64, Seen>::new();
    let mut left_out = 0;
    for vcpu in machine.source().vcpus() {
        let (spaces, forgotten) = vcpu.spaces();
        left_out += forgotten;
        for space in spaces {
            let seen = Seen { vcpu: vcpu.index(), space };
            let known = by_root
                .entry(space.root)
                .or_insert(Seen { space: SeenSpace { sightings: 0, ..space }, ..seen });
            let sightings = known.space.sightings + space.sightings;
            if known.space.last <= space.last {
                *known = seen;
            }
            known.space.sightings = sightings;
        }
    }
    let mut all: Vec<Seen> = by_root.into_values().collect();
    all.sort_by_key(|seen| std::cmp::Reverse(seen.space.last));
    left_out += all.len().saturating_sub(MOST) as u64;
    all.truncate(MOST);
    (all, left_out)
}

pub(super) async fn list(
    daemon: &Daemon,
    target: &Target,
    deadline: Instant,
) -> Result<v1::ListAddressSpacesResponse, Error> {
    let (spaces, left_out) = seen(&target.machine);
    let snapshot = target.vcpu.latest();
    let mode = snapshot.walker.as_ref().map(|walker| walker.gva_walk().format().mode());
    let four_or_five = matches!(mode, Ok(PagingMode::FourLevel | PagingMode::FiveLevel));
    let roots: Vec<u64> = spaces.iter().map(|seen| seen.space.root).collect();
    let machine = Arc::clone(&target.machine);
    let looked = target.read_at_length(daemon, move |memory| {
        let isolated: Vec<bool> =
            roots.iter().map(|root| four_or_five && is_isolated(memory, *root)).collect();
        // A list that takes too long leaves time to say so.
        let now = Instant::now();
        let until = now + deadline.saturating_duration_since(now) / 2;
        (isolated, tasks::list(&machine, memory, until))
    });
    let (isolated, tasks) = timeout_at(deadline.into(), looked).await.map_err(|_| Error::Deadline)??;
    let named = named(&tasks);
    // The machine has to be there still, for what was read of it to be worth anything.
    daemon.provenance(target, &snapshot)?;
    let spaces = spaces.iter().zip(isolated).map(|(Seen { vcpu, space }, isolated)| {
        let kernel_half = if isolated { space.root & !USER_ROOT } else { space.root };
        let tasks = named.get(&kernel_half).map_or(&[][..], Vec::as_slice);
        let task = |task: &&Task| v1::Task { pid: task.pid, name: task.name.clone() };
        v1::AddressSpace {
            cr3: space.root,
            sightings: space.sightings,
            vcpu: *vcpu,
            generation: space.generation,
            age: space.last.elapsed().try_into().ok(),
            isolation_pair: isolated.then_some(space.root ^ USER_ROOT),
            user_half: isolated && space.root & USER_ROOT != 0,
            tasks: tasks.iter().take(MOST_TASKS).map(task).collect(),
            // No more than there are tasks.
            tasks_left_out: tasks.len().saturating_sub(MOST_TASKS) as u32,
        }
    });
    Ok(v1::ListAddressSpacesResponse {
        spaces: spaces.collect(),
        left_out,
        provenance: Some(daemon.machine_provenance(&target.machine)),
        task_list: Some(task_list(&tasks)),
    })
}

/// The tasks of each address space.
fn named(tasks: &Result<TaskList, String>) -> BTreeMap<u64, Vec<&Task>> {
    let mut named = BTreeMap::<u64, Vec<&Task>>::new();
    for task in tasks.iter().flat_map(|list| &list.tasks) {
        named.entry(task.root).or_default().push(task);
    }
    named
}

fn task_list(tasks: &Result<TaskList, String>) -> v1::TaskList {
    let (state, count, reason) = match tasks {
        Ok(TaskList { count, incomplete: None, .. }) => (v1::TaskListState::Complete, *count, String::new()),
        Ok(TaskList { count, incomplete: Some(why), .. }) => {
            (v1::TaskListState::Incomplete, *count, format!("the guest's list of tasks: {why}"))
        }
        Err(why) => (v1::TaskListState::Unknown, 0, why.clone()),
    };
    v1::TaskList { state: state.into(), count, reason }
}

/// Whether a root is one half of a pair under page-table isolation: both map the same user space, by the same tables, and not
/// the same kernel.
fn is_isolated(memory: &GuestRam, root: u64) -> bool {
    let table = |root| {
        let mut bytes = [0; 8 * 2 * USER_ENTRIES];
        let whole = memory.read(Gpa(root), &mut bytes).is_ok_and(|read| read == bytes.len());
        let entry = |bytes: &[u8]| bytes.try_into().map_or(0, u64::from_le_bytes);
        whole.then(|| bytes.chunks(8).map(entry).collect::<Vec<u64>>())
    };
    let (Some(kernel), Some(user)) = (table(root & !USER_ROOT), table(root | USER_ROOT)) else {
        return false;
    };
    let same = |(one, other): (&u64, &u64)| (one ^ other) & !APART == 0;
    let users = || kernel.iter().zip(&user).take(USER_ENTRIES);
    let kernels = || kernel.iter().zip(&user).skip(USER_ENTRIES);
    users().all(same) && users().any(|(entry, _)| entry & PRESENT != 0) && !kernels().all(same)
}

fn brings_second_dimension(state: &v1::WalkerOverride) -> bool {
    use v1::walker_override::SecondDimension::{Ept, Npt};
    matches!(state.second_dimension, Some(Npt(_) | Ept(_)))
}

pub(super) async fn across(
    daemon: &Daemon,
    target: &Target,
    snapshot: &Snapshot,
    request: v1::TranslateAcrossRequest,
    deadline: Instant,
) -> Result<v1::TranslateAcrossResponse, Error> {
    if request.r#override.as_ref().is_some_and(|state| state.cr3.is_some()) {
        return Err(Error::invalid("override.cr3", "name the address spaces in `cr3s`"));
    }
    if request.cr3s.len() > MOST {
        return Err(Error::invalid(
            "cr3s",
            format!("{} are more than {MOST}: ask again for more", request.cr3s.len()),
        ));
    }
    let gva = target.gva(daemon, deadline, request.address, "address").await?;
    let access = convert::access::access(request.access, &snapshot.registers)?;
    let state = request.r#override.unwrap_or_default();
    let cr3s = match request.cr3s {
        cr3s if !cr3s.is_empty() => cr3s,
        _ if snapshot.nested != NestedMode::Off || brings_second_dimension(&state) => {
            return Err(Error::Precondition(
                "the address spaces that were seen are the machine's own, and this walk is an L2's: name the L2's in `cr3s`"
                    .to_owned(),
            ));
        }
        _ => seen(&target.machine).0.iter().map(|seen| seen.space.root).collect(),
    };
    let mut walkers = Vec::with_capacity(cr3s.len());
    for cr3 in cr3s {
        let state = v1::WalkerOverride { cr3: Some(cr3), ..state.clone() };
        let walker = walker(Some(&state), snapshot)?.into_owned();
        check_width(&walker, gva, "address")?;
        convert::access::check(&access, &walker)?;
        walkers.push((cr3, walker));
    }
    let translate = |memory: &GuestRam| {
        let outcome = |walker: &Walker| match walker.translate(memory, Gva(gva), &access) {
            Ok(page) => {
                Outcome::Translation(convert::translation::translation(&page, walker.gva_walk().format()))
            }
            Err(fault) => Outcome::Fault(convert::fault::fault(&fault)),
        };
        let spaces: Vec<_> = walkers
            .iter()
            .map(|(cr3, walker)| v1::SpaceTranslation { cr3: *cr3, outcome: Some(outcome(walker)) })
            .collect();
        let names = walkers.first().map(|(_, walker)| target.names(memory, snapshot, walker, gva, &[]));
        (spaces, names.and_then(|names| names.gva))
    };
    let (spaces, name) = target.read(daemon, deadline, translate).await?;
    Ok(v1::TranslateAcrossResponse {
        address: gva,
        symbol: name.map(convert::symbol::symbol),
        spaces,
        provenance: Some(daemon.provenance(target, snapshot)?),
    })
}
