//! Tasks of a guest's Linux kernel: which process has which address space.
//!
//! The kernel links all processes into one list, from `init_task.tasks` on. Of each the number, the name and the top table
//! (`mm->pgd`) are read, at the offsets that the kernel's own BTF says (`layout.rs`), through the kernel's tables. Nothing is
//! guessed: without symbols, without BTF, or where the kernel is not found, there are no tasks, and it is said why.
//!
//! The list is the guest's. It is followed forwards, each step held against the link back, so that it cannot lead in circles;
//! its length is bounded, and so is the time. While the guest runs, processes come and go: a list that does not fit is read
//! again, a few times, and then what was found of it is said to be incomplete.

mod btf;
mod layout;

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use crate::machine::{GuestRam, Machine};
use crate::symbols::{KernelMemory, Placed, Symbols};
use layout::Layout;
use pagewalk_proto::readable;

/// Tasks that are read.
const MOST: u32 = 1 << 16;
/// How often a list is read until it fits.
const ATTEMPTS: u32 = 3;
/// Tasks read between two looks at the clock.
const BETWEEN_LOOKS: u32 = 64;

/// A process with an address space.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Task {
    /// Its number.
    pub(crate) pid: u32,
    /// Its name; control characters and bytes that are no UTF-8 are written as `\u{1b}` and `\xff`.
    pub(crate) name: String,
    /// Where its top table lies; under page-table isolation the kernel's.
    pub(crate) root: u64,
}

/// What was found of the list.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct TaskList {
    /// Processes that have an address space, in the order in which they were made.
    pub(crate) tasks: Vec<Task>,
    /// All in the list, kernel threads among them.
    pub(crate) count: u32,
    /// Why it is not the whole list.
    pub(crate) incomplete: Option<String>,
}

/// The last kernel whose BTF was read, and what it said. The lock is held while it is read: that takes memory.
#[derive(Debug, Default)]
pub(crate) struct Known(Mutex<Option<(Arc<Placed>, Layout)>>);

impl Known {
    fn layout(
        &self,
        symbols: &Symbols,
        placed: &Arc<Placed>,
        kernel: &KernelMemory<'_>,
    ) -> Result<Layout, String> {
        let mut known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((there, layout)) = &*known
            && Arc::ptr_eq(there, placed)
        {
            return Ok(*layout);
        }
        let layout = Layout::read(symbols, placed, kernel)?;
        *known = Some((Arc::clone(placed), layout));
        Ok(layout)
    }
}

/// Reads the list of tasks. Blocks for as long as that takes, until `deadline` at most.
pub(crate) fn list(machine: &Machine, memory: &GuestRam, deadline: Instant) -> Result<TaskList, String> {
    let Some(symbols) = machine.symbols() else {
        return Err("the machine has no symbols: attach it with symbols=FILE".to_owned());
    };
    let placed = symbols.place(machine, memory)?;
    let Some(kernel) = placed.kernel(memory) else {
        return Err("the symbols are of no Linux kernel: they have no `linux_banner`".to_owned());
    };
    let layout = symbols.tasks.layout(symbols, &placed, &kernel)?;
    let Some(init_task) = symbols.address(&placed, "init_task") else {
        return Err("the symbols name no `init_task`".to_owned());
    };
    let mut list = TaskList::default();
    for _ in 0..ATTEMPTS {
        list = follow(&kernel, &layout, init_task.wrapping_add(layout.tasks), deadline);
        if list.incomplete.is_none() || Instant::now() >= deadline {
            break;
        }
    }
    Ok(list)
}

/// Follows the list from `head` until it is back there.
fn follow(kernel: &KernelMemory<'_>, layout: &Layout, head: u64, deadline: Instant) -> TaskList {
    let mut list = TaskList::default();
    let incomplete = |list: TaskList, problem: String| TaskList { incomplete: Some(problem), ..list };
    let (mut last, mut at) = (None, head);
    loop {
        let Some([next, back]) = links(kernel, at) else {
            return incomplete(list, format!("it leads to {at:#x}, where no memory of the kernel's is"));
        };
        if last.is_some_and(|last| last != back) {
            return incomplete(
                list,
                format!(
                    "what lies at {at:#x} is not linked back: it changed while it was read, or is no list"
                ),
            );
        }
        if last.is_some() {
            if at == head {
                return list;
            }
            if list.count >= MOST {
                return incomplete(list, format!("it is longer than {MOST} tasks"));
            }
            if list.count % BETWEEN_LOOKS == 0 && Instant::now() >= deadline {
                return incomplete(list, "the call's time was over".to_owned());
            }
            match task(kernel, layout, at.wrapping_sub(layout.tasks)) {
                Ok(task) => list.tasks.extend(task),
                Err(problem) => return incomplete(list, problem),
            }
            list.count += 1;
        }
        (last, at) = (Some(at), next);
    }
}

fn links(kernel: &KernelMemory<'_>, at: u64) -> Option<[u64; 2]> {
    let size = kernel.pointer() as usize;
    let mut bytes = [0; 16];
    let both = bytes.get_mut(..2 * size)?;
    // A pointer that is not aligned is none.
    if !at.is_multiple_of(size as u64) || !kernel.read(at, both) {
        return None;
    }
    let (next, back) = both.split_at(size);
    Some([number(next), number(back)])
}

/// The task there, if it has an address space.
fn task(kernel: &KernelMemory<'_>, layout: &Layout, at: u64) -> Result<Option<Task>, String> {
    let absent = || format!("of the task at {at:#x} not all is memory of the kernel's");
    let mm = || pointer(kernel, at.wrapping_add(layout.mm)).ok_or_else(absent);
    for _ in 0..ATTEMPTS {
        let before = mm()?;
        if before == 0 {
            return Ok(None);
        }
        let pgd = pointer(kernel, before.wrapping_add(layout.pgd));
        let root = pgd.and_then(|pgd| kernel.root(pgd));
        let mut pid = [0; 4];
        let mut comm = vec![0; layout.comm_size];
        if !kernel.read(at.wrapping_add(layout.pid), &mut pid)
            || !kernel.read(at.wrapping_add(layout.comm), &mut comm)
        {
            return Err(absent());
        }
        // A program that was started, or ended, meanwhile has another address space, or none.
        if mm()? == before {
            let root = root.ok_or_else(|| format!("the task at {at:#x} has no top table in memory"))?;
            return Ok(Some(Task { pid: u32::from_le_bytes(pid), name: name(&comm), root }));
        }
    }
    Err(format!("the task at {at:#x} did not stand still"))
}

fn pointer(kernel: &KernelMemory<'_>, at: u64) -> Option<u64> {
    let mut bytes = [0; 8];
    let pointer = bytes.get_mut(..kernel.pointer() as usize)?;
    kernel.read(at, pointer).then(|| number(pointer))
}

/// A little-endian number of at most eight bytes.
fn number(bytes: &[u8]) -> u64 {
    bytes.iter().rev().fold(0, |number, byte| (number << 8) | u64::from(*byte))
}

/// A name up to its first zero, whose bytes may be of any kind.
fn name(bytes: &[u8]) -> String {
    let bytes = bytes.split(|byte| *byte == 0).next().unwrap_or_default();
    let mut text = String::new();
    for chunk in bytes.utf8_chunks() {
        text.push_str(&readable(chunk.valid()));
        text.extend(chunk.invalid().iter().flat_map(|byte| byte.escape_ascii()).map(char::from));
    }
    text
}

#[cfg(test)]
mod tests;
