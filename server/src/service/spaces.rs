//! `ListAddressSpaces` and `TranslateAcross`: the address spaces of a machine, and one address in many of them.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Instant;

use pagewalk::{Gpa, Gva, PagingMode, Walker};
use pagewalk_proto::v1;
use pagewalk_proto::v1::space_translation::Outcome;
use tokio::time::timeout_at;

use super::Daemon;
use super::resolve::{Target, still_there};
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

/// What the guest's memory tells of address spaces.
struct Looked {
    /// The spaces, by their roots, and whether each is a half under page-table isolation.
    spaces: Vec<(u64, bool)>,
    left_out: u64,
    tasks: Result<TaskList, String>,
}

/// Looks at the spaces with these roots, and with `all` at those of the guest's processes behind them.
async fn look(
    daemon: &Daemon,
    target: &Target,
    patience: Instant,
    mut roots: Vec<u64>,
    all: bool,
) -> Result<Looked, Error> {
    let snapshot = target.vcpu.latest();
    let mode = snapshot.walker.as_ref().map(|walker| walker.gva_walk().format().mode());
    let four_or_five = matches!(mode, Ok(PagingMode::FourLevel | PagingMode::FiveLevel));
    let machine = Arc::clone(&target.machine);
    let looked = target.read_at_length(daemon, &daemon.looks, move |memory| {
        // A list that takes too long leaves time to say so.
        let now = Instant::now();
        let until = now + patience.saturating_duration_since(now) / 2;
        let tasks = tasks::list(&machine, memory, until);
        if all {
            let mut known: BTreeSet<u64> = roots.iter().copied().collect();
            let processes = tasks.iter().flat_map(|list| &list.tasks).map(|task| task.root);
            roots.extend(processes.filter(|root| known.insert(*root)));
        }
        let left_out = roots.len().saturating_sub(MOST) as u64;
        roots.truncate(MOST);
        let isolated = |root| four_or_five && is_isolated(memory, root);
        Looked { spaces: roots.into_iter().map(|root| (root, isolated(root))).collect(), left_out, tasks }
    });
    timeout_at(patience.into(), looked).await.map_err(|_| Error::Deadline)?
}

impl Looked {
    /// The tasks of each space, in the contract's words, and how many more it has.
    fn tasks(&self) -> impl Iterator<Item = (Vec<v1::Task>, u32)> {
        let mut by_root = BTreeMap::<u64, Vec<&Task>>::new();
        for task in self.tasks.iter().flat_map(|list| &list.tasks) {
            by_root.entry(task.root).or_default().push(task);
        }
        self.spaces.iter().map(move |(root, isolated)| {
            let kernel_half = if *isolated { root & !USER_ROOT } else { *root };
            let tasks = by_root.get(&kernel_half).map_or(&[][..], Vec::as_slice);
            let task = |task: &&Task| v1::Task { pid: task.pid, name: task.name.clone() };
            // There are no more tasks than 32 bits can count.
            let more = tasks.len().saturating_sub(MOST_TASKS) as u32;
            (tasks.iter().take(MOST_TASKS).map(task).collect(), more)
        })
    }

    fn task_list(&self) -> v1::TaskList {
        let (state, count, reason) = match &self.tasks {
            Ok(TaskList { count, incomplete: None, .. }) => {
                (v1::TaskListState::Complete, *count, String::new())
            }
            Ok(TaskList { count, incomplete: Some(why), .. }) => {
                (v1::TaskListState::Incomplete, *count, format!("the guest's list of tasks: {why}"))
            }
            Err(why) => (v1::TaskListState::Unknown, 0, why.clone()),
        };
        v1::TaskList { state: state.into(), count, reason }
    }
}

pub(super) async fn list(
    daemon: &Daemon,
    target: &Target,
    patience: Instant,
) -> Result<v1::ListAddressSpacesResponse, Error> {
    let (seen, left_out) = seen(&target.machine);
    let roots = seen.iter().map(|seen| seen.space.root).collect();
    let looked = look(daemon, target, patience, roots, true).await?;
    // The machine has to be there still, for what was read of it to be worth anything.
    still_there(&target.machine)?;
    // Those that were seen come first.
    let seen = seen.into_iter().map(Some).chain(std::iter::repeat_with(|| None));
    let spaces = looked.spaces.iter().zip(seen).zip(looked.tasks());
    let spaces = spaces.map(|(((root, isolated), seen), (tasks, tasks_left_out))| {
        let seen = seen.map_or_else(v1::AddressSpace::default, |Seen { vcpu, space }| v1::AddressSpace {
            sightings: space.sightings,
            vcpu,
            generation: space.generation,
            age: space.last.elapsed().try_into().ok(),
            ..v1::AddressSpace::default()
        });
        v1::AddressSpace {
            cr3: *root,
            isolation_pair: isolated.then_some(root ^ USER_ROOT),
            user_half: *isolated && root & USER_ROOT != 0,
            tasks,
            tasks_left_out,
            ..seen
        }
    });
    Ok(v1::ListAddressSpacesResponse {
        spaces: spaces.collect(),
        left_out: left_out + looked.left_out,
        provenance: Some(daemon.machine_provenance(&target.machine)),
        task_list: Some(looked.task_list()),
    })
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
    patience: Instant,
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
    let gva = target.gva(daemon, patience, request.address, "address").await?;
    let access = convert::access::access(request.access, &snapshot.registers)?;
    let state = request.r#override.unwrap_or_default();
    let of_l2 = snapshot.nested != NestedMode::Off || brings_second_dimension(&state);
    let walkers = |cr3s: Vec<u64>| {
        let walker = |cr3| {
            let state = v1::WalkerOverride { cr3: Some(cr3), ..state.clone() };
            let walker = walker(Some(&state), snapshot)?.into_owned();
            check_width(&walker, gva, "address")?;
            convert::access::check(&access, &walker)?;
            Ok((cr3, walker))
        };
        cr3s.into_iter().map(walker).collect::<Result<Vec<_>, Error>>()
    };
    let (walkers, looked) = if request.cr3s.is_empty() {
        if of_l2 {
            return Err(Error::Precondition(
                "the address spaces that were seen are the machine's own, and this walk is an L2's: name the L2's in `cr3s`"
                    .to_owned(),
            ));
        }
        let roots = seen(&target.machine).0.iter().map(|seen| seen.space.root).collect();
        let looked = look(daemon, target, patience, roots, true).await?;
        (walkers(looked.spaces.iter().map(|(root, _)| *root).collect())?, looked)
    } else {
        let walkers = walkers(request.cr3s)?;
        let roots: Vec<u64> = walkers.iter().map(|(_, walker)| walker.gva_walk().root()).collect();
        let looked = if of_l2 {
            let tasks =
                Err("the walk is an L2's, and tasks are known of the machine's own kernel".to_owned());
            Looked { spaces: roots.into_iter().map(|root| (root, false)).collect(), left_out: 0, tasks }
        } else {
            look(daemon, target, patience, roots, false).await?
        };
        (walkers, looked)
    };
    let translate = |memory: &GuestRam| {
        let outcome = |walker: &Walker| match walker.translate(memory, Gva(gva), &access) {
            Ok(page) => {
                Outcome::Translation(convert::translation::translation(&page, walker.gva_walk().format()))
            }
            Err(fault) => Outcome::Fault(convert::fault::fault(&fault)),
        };
        let outcomes: Vec<_> = walkers.iter().map(|(_, walker)| outcome(walker)).collect();
        let names = walkers.first().map(|(_, walker)| target.names(memory, snapshot, walker, gva, &[]));
        (outcomes, names.and_then(|names| names.gva))
    };
    let (outcomes, name) = target.read(daemon, patience, translate).await?;
    let spaces = walkers.iter().zip(outcomes).zip(looked.tasks());
    let spaces = spaces.map(|(((cr3, _), outcome), (tasks, tasks_left_out))| v1::SpaceTranslation {
        cr3: *cr3,
        outcome: Some(outcome),
        tasks,
        tasks_left_out,
    });
    Ok(v1::TranslateAcrossResponse {
        address: gva,
        symbol: name.map(convert::symbol::symbol),
        spaces: spaces.collect(),
        provenance: Some(daemon.provenance(target, snapshot)?),
        task_list: Some(looked.task_list()),
    })
}
