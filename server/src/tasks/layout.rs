//! Where the kernel keeps what is wanted of a task: offsets, by the kernel's own BTF.

use super::btf::{Btf, Member};
use crate::symbols::{KernelMemory, Placed, Symbols};

/// Largest BTF that is read. Distributions' kernels have five to ten megabytes.
const BTF_MAX: u64 = 32 << 20;
/// Longest name of a task that is believed.
const NAME_MAX: u64 = 64;
/// Bytes of a name that are read: `TASK_COMM_LEN`. An answer has up to 16384 names.
const NAME_READ: u64 = 16;

/// Offsets in `task_struct`, and in `mm_struct`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Layout {
    /// Links to the next and to the last task.
    pub(super) tasks: u64,
    pub(super) pid: u64,
    pub(super) comm: u64,
    /// Bytes of a name.
    pub(super) comm_size: usize,
    pub(super) mm: u64,
    /// In `mm_struct`: the address of the top table.
    pub(super) pgd: u64,
}

impl Layout {
    /// Reads the BTF of the kernel that lies there.
    pub(super) fn read(
        symbols: &Symbols,
        placed: &Placed,
        kernel: &KernelMemory<'_>,
    ) -> Result<Self, String> {
        let address = |name| symbols.address(placed, name);
        let Some((start, stop)) = address("__start_BTF").zip(address("__stop_BTF")) else {
            return Err("the symbols name no `__start_BTF` and `__stop_BTF`: the kernel was built without BTF, by which fields of its \
                        structures are found, or the file leaves them out"
                .to_owned());
        };
        let size = stop.checked_sub(start).filter(|size| *size <= BTF_MAX).ok_or_else(|| {
            format!(
                "its BTF is said to lie from {start:#x} to {stop:#x}, and {BTF_MAX} bytes are read at most"
            )
        })?;
        let mut bytes = vec![0; size as usize];
        if !kernel.read(start, &mut bytes) {
            return Err(format!("its BTF, from {start:#x} to {stop:#x}, is not all in memory"));
        }
        Self::of(bytes, kernel.pointer())
    }

    pub(super) fn of(bytes: Vec<u8>, pointer: u64) -> Result<Self, String> {
        let btf = Btf::new(bytes, pointer).map_err(|problem| format!("its BTF {problem}"))?;
        let member = |structure: &str, name: &str, right: fn(u64, u64) -> bool| {
            let found: Member =
                btf.member(structure, name).map_err(|problem| format!("its BTF {problem}"))?;
            if right(found.size, pointer) {
                return Ok(found);
            }
            Err(format!("its BTF has `{structure}.{name}` of {} bytes, which is another thing", found.size))
        };
        let comm = member("task_struct", "comm", |size, _| (1..=NAME_MAX).contains(&size))?;
        Ok(Self {
            tasks: member("task_struct", "tasks", |size, pointer| size == 2 * pointer)?.offset,
            pid: member("task_struct", "pid", |size, _| size == 4)?.offset,
            comm: comm.offset,
            comm_size: comm.size.min(NAME_READ) as usize,
            mm: member("task_struct", "mm", |size, pointer| size == pointer)?.offset,
            pgd: member("mm_struct", "pgd", |size, pointer| size == pointer)?.offset,
        })
    }
}
