//! Symbols of an ELF file: `vmlinux`, or any kernel that was not stripped.
//!
//! System V ABI, "Symbol Table". Headers are checked against bounds before what they promise is read; debug information, by
//! far the most of a `vmlinux`, is never touched.

use std::fs::File;

use object::elf::{
    EM_386, EM_X86_64, ET_DYN, ET_EXEC, FileHeader32, FileHeader64, SHF_ALLOC, SHN_UNDEF, SHT_PROGBITS,
    SHT_SYMTAB, STB_LOCAL, STT_FILE, STT_SECTION, STT_TLS,
};
use object::read::ReadCache;
use object::read::elf::{FileHeader, SectionHeader as _, Sym as _};
use object::{Endianness, ReadRef};

use super::SymbolsProblem;
use super::placement::BANNER;
use super::table::{NAME_MAX, SymbolTable};

/// Sections that are looked at.
const SECTIONS_MAX: usize = 1 << 16;
/// Bytes of the symbol table, and of its names.
const TABLE_MAX: u64 = 128 << 20;
/// What is read of the banner.
const BANNER_MAX: u64 = 512;

pub(super) fn read(file: &File) -> Result<SymbolTable, SymbolsProblem> {
    let cache = ReadCache::new(file);
    parse(&cache)
}

fn parse<'a, R: ReadRef<'a>>(data: R) -> Result<SymbolTable, SymbolsProblem> {
    match data.read_bytes_at(4, 1) {
        Ok([1]) => symbols::<FileHeader32<Endianness>, R>(data),
        Ok([2]) => symbols::<FileHeader64<Endianness>, R>(data),
        _ => Err(broken("its class is neither 32-bit nor 64-bit")),
    }
}

fn broken(problem: &str) -> SymbolsProblem {
    SymbolsProblem::Elf(problem.to_owned())
}

impl From<object::read::Error> for SymbolsProblem {
    fn from(error: object::read::Error) -> Self {
        Self::Elf(error.to_string())
    }
}

fn symbols<'a, E: FileHeader<Endian = Endianness>, R: ReadRef<'a>>(
    data: R,
) -> Result<SymbolTable, SymbolsProblem> {
    let header = E::parse(data)?;
    let endian = header.endian()?;
    if endian != Endianness::Little || !matches!(header.e_machine(endian), EM_386 | EM_X86_64) {
        return Err(broken("it is of another architecture"));
    }
    if !matches!(header.e_type(endian), ET_EXEC | ET_DYN) {
        return Err(broken("it is no executable"));
    }
    if header.shnum(endian, data)? > SECTIONS_MAX {
        return Err(SymbolsProblem::TooMany { what: "sections", most: SECTIONS_MAX as u64 });
    }
    let sections = header.section_headers(endian, data)?;
    let Some(section) = sections.iter().find(|section| section.sh_type(endian) == SHT_SYMTAB) else {
        return Err(broken("it has no symbol table: it was stripped"));
    };
    let Some(strings) = sections.get(section.sh_link(endian) as usize) else {
        return Err(broken("its symbols have no names"));
    };
    for size in [section.sh_size(endian).into(), strings.sh_size(endian).into()] {
        if size > TABLE_MAX {
            return Err(SymbolsProblem::TooMany { what: "bytes of symbols", most: TABLE_MAX });
        }
    }
    let symbols: &[E::Sym] = section.data_as_array(endian, data)?;
    let strings = strings.data(endian, data)?;
    let mut table = SymbolTable::default();
    for symbol in symbols {
        let unwanted = matches!(symbol.st_type(), STT_SECTION | STT_FILE | STT_TLS);
        if unwanted || symbol.st_shndx(endian) == SHN_UNDEF {
            continue;
        }
        // Looked at no further than a name can reach: the file decides how far it is to the next zero.
        let name = strings.get(symbol.st_name(endian) as usize..).unwrap_or_default();
        let name = name.get(..=NAME_MAX).unwrap_or(name).split(|byte| *byte == 0).next().unwrap_or_default();
        // A name that is no text is none that anybody could write.
        if let Ok(name) = std::str::from_utf8(name) {
            table.push(symbol.st_value(endian).into(), name, symbol.st_bind() != STB_LOCAL)?;
        }
    }
    let mut table = table.complete()?;
    let banner = table.only("linux_banner").and_then(|address| {
        let section = sections.iter().find(|section| {
            let start: u64 = section.sh_addr(endian).into();
            let inside = address.checked_sub(start).is_some_and(|at| at < section.sh_size(endian).into());
            let flags: u64 = section.sh_flags(endian).into();
            inside && section.sh_type(endian) == SHT_PROGBITS && flags & u64::from(SHF_ALLOC) != 0
        })?;
        let inside = address - section.sh_addr(endian).into();
        let left = section.sh_size(endian).into() - inside;
        let offset: u64 = section.sh_offset(endian).into();
        let bytes = data.read_bytes_at(offset.checked_add(inside)?, left.min(BANNER_MAX)).ok()?;
        let banner = bytes.split(|byte| *byte == 0).next()?;
        banner.starts_with(BANNER).then(|| banner.to_vec())
    });
    table.banner = banner;
    Ok(table)
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test")]
mod tests {
    use std::time::{Duration, Instant};

    use proptest::prelude::*;

    use super::*;

    fn here() -> Vec<u8> {
        std::fs::read(std::env::current_exe().unwrap()).unwrap()
    }

    /// This very test, as the linker left it.
    #[test]
    fn reads_an_executable() {
        let table = parse(&here()[..]).unwrap();
        assert!(table.count() > 1000, "{}", table.count());
        assert!(table.only("_start").is_some());
        assert_eq!(table.banner, None);
    }

    #[test]
    fn truncated_ones_are_refused() {
        let whole = here();
        for size in [0, 4, 5, 16, 63, 64, 4096, whole.len() / 2, whole.len() - 1] {
            assert!(matches!(parse(&whole[..size]), Err(SymbolsProblem::Elf(_))), "{size}");
        }
    }

    proptest! {
        #[test]
        fn any_bytes_are_read_or_refused(mut bytes in proptest::collection::vec(any::<u8>(), 0..400), class in 1u8..3) {
            let head = [0x7f, b'E', b'L', b'F', class, 1, 1];
            let size = bytes.len().min(head.len());
            bytes[..size].copy_from_slice(&head[..size]);
            let _ = parse(&bytes[..]);
        }

        #[test]
        fn broken_headers_are_read_or_refused(changes in proptest::collection::vec((any::<proptest::sample::Index>(), any::<u8>()), 1..6)) {
            // A whole file of one symbol, and some of its bytes changed.
            let mut bytes = small();
            for (at, value) in changes {
                let at = at.index(bytes.len());
                bytes[at] = value;
            }
            let _ = parse(&bytes[..]);
        }
    }

    /// Each symbol's name would be all that follows.
    #[test]
    fn names_without_end_take_no_longer() {
        const SYMBOLS: usize = 1 << 16;
        const NAMES: usize = 16 << 20;
        let mut bytes = small();
        let (symbols, names) = (bytes.len(), bytes.len() + SYMBOLS * 24);
        for (header, offset, size) in [(1, symbols, SYMBOLS * 24), (2, names, NAMES)] {
            let at = 64 + header * 64 + 24;
            bytes[at..at + 8].copy_from_slice(&(offset as u64).to_le_bytes());
            bytes[at + 8..at + 16].copy_from_slice(&(size as u64).to_le_bytes());
        }
        for _ in 0..SYMBOLS {
            bytes.extend([1, 0, 0, 0, 0x11, 0, 3, 0]);
            bytes.extend(0x1004u64.to_le_bytes());
            bytes.extend(0u64.to_le_bytes());
        }
        bytes.resize(names + NAMES, b'x');
        let begin = Instant::now();
        assert!(matches!(parse(&bytes[..]), Err(SymbolsProblem::Empty)));
        assert!(begin.elapsed() < Duration::from_secs(20), "{:?}", begin.elapsed());
    }

    /// An ELF64 executable of a symbol table, its names and a section with a banner.
    fn small() -> Vec<u8> {
        let mut bytes = vec![0x7f, b'E', b'L', b'F', 2, 1, 1];
        bytes.resize(16, 0);
        bytes.extend([2, 0, 62, 0, 1, 0, 0, 0]);
        bytes.extend([0; 16]);
        bytes.extend(64u64.to_le_bytes());
        bytes.extend([0, 0, 0, 0, 64, 0, 0, 0, 0, 0, 64, 0, 4, 0, 0, 0]);
        let section = |kind: u32, flags: u64, address: u64, offset: u64, size: u64, link: u32, entry: u64| {
            let mut header = Vec::new();
            header.extend(0u32.to_le_bytes());
            header.extend(kind.to_le_bytes());
            for word in [flags, address, offset, size] {
                header.extend(word.to_le_bytes());
            }
            header.extend(link.to_le_bytes());
            header.extend(0u32.to_le_bytes());
            header.extend(8u64.to_le_bytes());
            header.extend(entry.to_le_bytes());
            header
        };
        let data = 64 + 4 * 64;
        bytes.extend(section(0, 0, 0, 0, 0, 0, 0));
        bytes.extend(section(2, 0, 0, data, 48, 2, 24));
        bytes.extend(section(3, 0, 0, data + 48, 16, 0, 0));
        bytes.extend(section(1, 2, 0x1000, data + 64, 32, 0, 0));
        bytes.extend([0; 24]);
        bytes.extend(1u32.to_le_bytes());
        bytes.extend([0x11, 0, 3, 0]);
        bytes.extend(0x1004u64.to_le_bytes());
        bytes.extend(0u64.to_le_bytes());
        bytes.extend(b"\0linux_banner\0\0\0");
        bytes.extend(b"abcdLinux version 9.9 (me)\n\0\0\0\0\0");
        bytes
    }

    #[test]
    fn knows_the_banner() {
        let table = parse(&small()[..]).unwrap();
        assert_eq!(table.only("linux_banner"), Some(0x1004));
        assert_eq!(table.banner.as_deref(), Some(&b"Linux version 9.9 (me)\n"[..]));
    }
}
