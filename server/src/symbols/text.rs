//! `System.map`, `/proc/kallsyms`, and what `nm` prints: a symbol a line.
//!
//! `ffffffff81000000 T _text`, and behind the symbols of a module its name, `[kvm]`. A capital letter says that a symbol is
//! global.

use super::SymbolsProblem;
use super::table::SymbolTable;

/// Largest file that is read.
pub(super) const BYTES_MAX: u64 = 64 << 20;
/// What an error quotes of a line.
const QUOTED: usize = 60;

pub(super) fn read(bytes: &[u8]) -> Result<SymbolTable, SymbolsProblem> {
    if bytes.len() as u64 > BYTES_MAX {
        return Err(SymbolsProblem::TooMany { what: "bytes", most: BYTES_MAX });
    }
    let mut table = SymbolTable::default();
    for (number, line) in (1..).zip(bytes.split(|byte| *byte == b'\n')) {
        let fail = |problem: String| SymbolsProblem::Line { line: number, problem };
        let line = std::str::from_utf8(line).map_err(|_| fail("is no text".to_owned()))?;
        match symbol(line) {
            Ok(Some((address, name, global))) => table.push(address, name, global)?,
            Ok(None) => {}
            Err(problem) => {
                let quoted: String = line.chars().take(QUOTED).flat_map(char::escape_default).collect();
                return Err(fail(format!("`{quoted}` {problem}")));
            }
        }
    }
    table.complete()
}

/// Address, name, and whether it is global; nothing in an empty line, and in one of a symbol that is only referred to.
fn symbol(line: &str) -> Result<Option<(u64, &str, bool)>, &'static str> {
    const EXPECTED: &str =
        "is no symbol: a line is an address in hex, a letter and a name, as in `ffffffff81000000 T _text`";
    let mut words = line.split_ascii_whitespace();
    let Some(address) = words.next() else { return Ok(None) };
    if let "U" | "w" | "v" = address {
        return Ok(None);
    }
    let (kind, name) = words.next().zip(words.next()).ok_or(EXPECTED)?;
    if line.contains("The real System.map is in") {
        return Err("is Debian's stand-in for a System.map: copy the guest's /proc/kallsyms as root");
    }
    let valid = (1..=16).contains(&address.len()) && address.bytes().all(|byte| byte.is_ascii_hexdigit());
    let address = u64::from_str_radix(address, 16).ok().filter(|_| valid).ok_or(EXPECTED)?;
    let &[kind] = kind.as_bytes() else { return Err(EXPECTED) };
    if !kind.is_ascii_alphabetic() && kind != b'?' {
        return Err(EXPECTED);
    }
    match (words.next(), words.next()) {
        (None, _) => {}
        (Some(module), None) if module.starts_with('[') && module.ends_with(']') => {}
        _ => return Err("has more behind the name than a module's name, `[kvm]`"),
    }
    Ok(Some((address, name, kind.is_ascii_uppercase())))
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test")]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn lines_of_all_three() {
        let table = read(
            b"0000000000000000 A fixed_percpu_data\nffffffff81000000 T _text\r\n\nffffffff81000000 t startup_64\n\
              ffffffffc0123000 t kvm_init\t[kvm]\n                 U printk\nc1000000 D data",
        )
        .unwrap();
        assert_eq!(table.count(), 5);
        assert_eq!(table.only("kvm_init"), Some(0xffff_ffff_c012_3000));
        assert_eq!(table.at_or_before(0xffff_ffff_8100_0001), Some((0xffff_ffff_8100_0000, "_text")));
    }

    #[test]
    fn a_refusal_names_the_line() {
        for (text, line, said) in [
            ("ffffffff81000000 T _text\nnonsense\n", 2, "nonsense"),
            ("ffffffff81000000 T\n", 1, "a name"),
            ("ffffffff81000000 TT x\n", 1, "a letter"),
            ("ffffffff81000000 1 x\n", 1, "a letter"),
            ("0xffffffff81000000 T x\n", 1, "in hex"),
            ("+fffffff81000000 T x\n", 1, "in hex"),
            ("1ffffffff81000000 T x\n", 1, "in hex"),
            ("\n\nffffffff81000000 T x y\n", 3, "module"),
            ("ffffffff81000000 T x [a] [b]\n", 1, "module"),
            ("ffffffffffffffff B The real System.map is in the linux-image-6.1.0-dbg package\n", 1, "Debian"),
            ("\u{1b}[2Jx\n", 1, r"\u{1b}"),
        ] {
            let problem = read(text.as_bytes()).unwrap_err();
            assert!(matches!(problem, SymbolsProblem::Line { line: at, .. } if at == line), "{problem}");
            assert!(problem.to_string().contains(said), "{text:?}: {problem}");
        }
        assert!(matches!(read(b"\xff\xfe"), Err(SymbolsProblem::Line { line: 1, .. })));
        assert!(matches!(read(b""), Err(SymbolsProblem::Empty)));
        let hidden = read(b"0000000000000000 T _text\n0000000000000000 T _end\n").unwrap_err();
        assert!(hidden.to_string().contains("as root"), "{hidden}");
    }

    proptest! {
        #[test]
        fn any_bytes_are_read_or_refused(bytes in proptest::collection::vec(any::<u8>(), 0..2000)) {
            let _ = read(&bytes);
        }

        #[test]
        fn any_words_are_read_or_refused(words in proptest::collection::vec("[0-9a-fTt\\[\\] \n\t_x]{0,20}", 0..40)) {
            let _ = read(words.join(" ").as_bytes());
        }

        #[test]
        fn what_is_written_is_read(
            symbols in proptest::collection::btree_map("[a-z_.$][A-Za-z0-9_.$]{0,30}", 1u64.., 1..50),
            at in any::<proptest::sample::Index>(),
        ) {
            let text: String =
                symbols.iter().map(|(name, address)| format!("{address:016x} T {name}\n")).collect();
            let table = read(text.as_bytes()).unwrap();
            prop_assert_eq!(table.count(), symbols.len());
            let (name, address) = symbols.iter().nth(at.index(symbols.len())).unwrap();
            prop_assert_eq!(table.only(name), Some(*address));
            let (found, _) = table.at_or_before(*address).unwrap();
            prop_assert_eq!(found, *address);
        }
    }
}
