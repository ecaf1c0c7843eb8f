//! Symbols of a guest's kernel: addresses by name, and names by address.
//!
//! They come from a file that is named together with the machine: `System.map`, `/proc/kallsyms` as text, or an ELF file with
//! a symbol table, such as `vmlinux`. The file is read once and believed nothing: sizes and counts are bounded. Where a
//! Linux kernel lies in its guest is looked for in the guest's own memory, and looked at again before each use
//! (`placement.rs`).

mod elf;
mod placement;
mod similar;
mod table;
mod text;

use std::io::{self, Read as _, Seek as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use arc_swap::ArcSwap;

use crate::convert::address::hex_hint;
use crate::machine::{GuestRam, Machine, regular_file};
use crate::tasks::Known;
pub(crate) use placement::{KernelMemory, Placed};
use table::SymbolTable;

/// Furthest from a symbol that an address is named after it.
const NEAR: u64 = 1 << 20;
/// Addresses of one name that an error lists.
const LISTED: usize = 4;
/// Once the kernel was looked for in vain, names that nobody asked for do without it for so long.
const IN_VAIN: Duration = Duration::from_millis(250);

/// What is wrong with a file of symbols.
#[derive(Debug, thiserror::Error)]
pub enum SymbolsProblem {
    /// It cannot be read.
    #[error("cannot be read: {0}")]
    Read(#[from] io::Error),
    /// It is none.
    #[error(
        "is {0}: name a System.map, a copy of /proc/kallsyms, or an ELF file with symbols, such as vmlinux"
    )]
    Format(&'static str),
    /// A line is none of a list of symbols.
    #[error("line {line}: {problem}")]
    Line {
        /// Its number, from 1.
        line: usize,
        /// What is wrong with it.
        problem: String,
    },
    /// An ELF header says what cannot be.
    #[error("is no ELF file with symbols of an x86 kernel: {0}")]
    Elf(String),
    /// It is larger than is read here.
    #[error("has too many {what}: {most} at most are read")]
    TooMany {
        /// Of what.
        what: &'static str,
        /// How many there may be.
        most: u64,
    },
    /// It has no address.
    #[error(
        "has only addresses that are zero: the kernel hides them from whoever may not see them; copy /proc/kallsyms as root"
    )]
    Hidden,
    /// It has no symbol.
    #[error("has no symbols")]
    Empty,
}

/// Why symbols cannot be had.
#[derive(Debug, thiserror::Error)]
#[error("{}: {problem}", .file.display())]
pub struct SymbolsError {
    /// The file.
    pub file: PathBuf,
    /// What is wrong with it.
    pub problem: SymbolsProblem,
}

/// Why a symbol means no address.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Unresolved {
    /// It is not the name of one address.
    Name(String),
    /// The kernel is not where it could be looked for.
    Placement(String),
}

/// The nearest symbol at or before an address, and how far behind it the address lies.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Near {
    pub(crate) name: String,
    pub(crate) offset: u64,
}

impl std::fmt::Display for Near {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.offset {
            0 => f.write_str(&self.name),
            offset => write!(f, "{}+{offset:#x}", self.name),
        }
    }
}

/// The symbols of one machine's kernel.
#[derive(Debug)]
pub struct Symbols {
    file: PathBuf,
    table: SymbolTable,
    last: ArcSwap<Looked>,
    /// What else was learned of the kernel there.
    pub(crate) tasks: Known,
}

/// The last time that the kernel was looked for.
#[derive(Debug)]
struct Looked {
    /// Where it was found, or why it was not.
    placed: Result<Arc<Placed>, String>,
    /// When; `None` before the first time.
    at: Option<Instant>,
}

impl Symbols {
    /// Reads the symbols in `path`. Blocks, for as long as the file takes.
    ///
    /// # Errors
    /// Names what is wrong with the file, by line where it has lines.
    pub fn read(path: &Path) -> Result<Self, SymbolsError> {
        let table = read(path).map_err(|problem| SymbolsError { file: path.to_owned(), problem })?;
        let placed = Err("it has not been looked for yet".to_owned());
        Ok(Self {
            file: path.to_owned(),
            table,
            last: ArcSwap::from_pointee(Looked { placed, at: None }),
            tasks: Known::default(),
        })
    }

    /// The file that they come from.
    #[must_use]
    pub fn file(&self) -> &Path {
        &self.file
    }

    /// How many there are.
    #[must_use]
    pub fn count(&self) -> usize {
        self.table.count()
    }

    /// Where the kernel was when it was last looked for, or why it was not found.
    pub(crate) fn last_placed(&self) -> Result<Arc<Placed>, String> {
        self.last.load().placed.clone()
    }

    /// Where the kernel is now. Looking for it takes milliseconds, and as many as the guest likes to make of them.
    pub(crate) fn place(&self, machine: &Machine, memory: &GuestRam) -> Result<Arc<Placed>, String> {
        if let Ok(placed) = &self.last.load().placed
            && placed.holds(&self.table, memory)
        {
            return Ok(Arc::clone(placed));
        }
        let placed = placement::find(&self.table, &placement::states(machine), memory).map(Arc::new);
        self.last.store(Arc::new(Looked { placed: placed.clone(), at: Some(Instant::now()) }));
        placed
    }

    /// The same, for those who can do without: a kernel that was not there a moment ago is not looked for.
    pub(crate) fn place_if_quick(&self, machine: &Machine, memory: &GuestRam) -> Option<Arc<Placed>> {
        let last = self.last.load();
        let in_vain = last.placed.is_err() && last.at.is_some_and(|at| at.elapsed() < IN_VAIN);
        if in_vain { None } else { self.place(machine, memory).ok() }
    }

    /// The address of `name`. Looks through all names where there is none like it.
    pub(crate) fn resolve(
        &self,
        machine: &Machine,
        memory: &GuestRam,
        name: &str,
    ) -> Result<u64, Unresolved> {
        let addresses = self.table.addresses(name);
        let Some(first) = addresses.first() else {
            return Err(Unresolved::Name(self.unknown(name)));
        };
        let placed = self.place(machine, memory).map_err(|why| {
            let file = self.file.display();
            Unresolved::Placement(format!("where `{name}` of {file} lies is not known: {why}"))
        })?;
        if addresses.len() == 1 {
            return placed.address(*first).map_err(|why| Unresolved::Name(format!("`{name}` {why}")));
        }
        let places = addresses.iter().filter_map(|a| placed.address(*a).ok()).take(LISTED + 1);
        let places: Vec<String> = places.map(|a| format!("{a:#x}")).collect();
        let more = if places.len() > LISTED { ", ..." } else { "" };
        let listed = places[..places.len().min(LISTED)].join(", ");
        let count = addresses.len();
        Err(Unresolved::Name(format!(
            "`{name}` is the name of {count} addresses, {listed}{more}: write the one that is meant"
        )))
    }

    /// Where the one thing of this name is.
    pub(crate) fn address(&self, placed: &Placed, name: &str) -> Option<u64> {
        placed.address(self.table.only(name)?).ok()
    }

    fn unknown(&self, name: &str) -> String {
        let close = similar::similar(&self.table, name);
        let close = if close.is_empty() {
            String::new()
        } else {
            format!("; close to it are `{}`", close.join("`, `"))
        };
        format!("there is no symbol `{name}` in {}{}{close}", self.file.display(), hex_hint(name))
    }

    /// The nearest symbol of a virtual address.
    pub(crate) fn nearest(&self, placed: &Placed, gva: u64) -> Option<Near> {
        let at = placed.in_file(gva)?;
        self.near(at, placed)
    }

    /// The nearest symbol of a physical address, where that is in the kernel's image: the tables that it was built with are.
    pub(crate) fn nearest_physical(&self, placed: &Placed, gpa: u64) -> Option<Near> {
        let at = placed.in_file_physical(gpa)?;
        self.near(at, placed)
    }

    fn near(&self, at: u64, placed: &Placed) -> Option<Near> {
        let (address, name) = self.table.at_or_before(at)?;
        let offset = at - address;
        // What lies behind the image's end, or a module, belongs to neither.
        (offset < NEAR && placed.joins(address, at)).then(|| Near { name: name.to_owned(), offset })
    }
}

fn read(path: &Path) -> Result<SymbolTable, SymbolsProblem> {
    let mut file = regular_file(path)?;
    let mut magic = Vec::new();
    (&file).take(8).read_to_end(&mut magic)?;
    file.rewind()?;
    for (begin, what) in [
        (&b"MZ"[..], "a compressed kernel (bzImage)"),
        (b"\x1f\x8b", "compressed (gzip)"),
        (b"\xfd7zXZ", "compressed (xz)"),
        (b"BZh", "compressed (bzip2)"),
        (b"\x28\xb5\x2f\xfd", "compressed (zstd)"),
    ] {
        if magic.starts_with(begin) {
            return Err(SymbolsProblem::Format(what));
        }
    }
    if magic.starts_with(b"\x7fELF") {
        return elf::read(&file);
    }
    let mut bytes = Vec::new();
    file.take(text::BYTES_MAX + 1).read_to_end(&mut bytes)?;
    text::read(&bytes)
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test")]
mod tests {
    use std::io::Write as _;

    use super::*;
    use crate::machine::MachineSpec;

    /// Whatever a guest has in its memory, calls that want no more than names do not look for its kernel each time.
    #[test]
    fn names_do_without_a_kernel_that_was_not_there_a_moment_ago() {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(b"ffffffff81000000 T _text\nffffffff81001000 R linux_banner\n").unwrap();
        let machine = "demo:plain".parse::<MachineSpec>().unwrap().open().unwrap();
        let memory = machine.source().memory();
        let symbols = Symbols::read(file.path()).unwrap();
        assert!(symbols.place_if_quick(&machine, &memory).is_none());
        let first = symbols.last.load().at;
        assert!(first.is_some());
        assert!(symbols.place_if_quick(&machine, &memory).is_none());
        let second = symbols.last.load().at;
        assert!(second == first || second > first.map(|at| at + IN_VAIN));
        // Whoever cannot do without has it looked for.
        assert!(symbols.place(&machine, &memory).is_err());
        assert!(symbols.last.load().at > second);
    }
}
