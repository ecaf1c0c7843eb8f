//! A table of symbols, by address and by name.

use super::SymbolsProblem;

/// Symbols that are kept. A kernel with all its modules has some 200,000.
const SYMBOLS_MAX: usize = 1 << 21;
/// Bytes of all their names.
const NAMES_MAX: usize = 128 << 20;
/// Longest name: the kernel's own limit.
pub(super) const NAME_MAX: usize = 511;

/// Symbols, complete and in order. Addresses are the file's.
#[derive(Debug, Default)]
pub(super) struct SymbolTable {
    /// All names, one behind the other.
    names: String,
    /// By address; of those at the same one, global symbols are first.
    symbols: Vec<Symbol>,
    /// Places in `symbols`, by name.
    by_name: Vec<u32>,
    /// What `linux_banner` holds, where the file knows.
    pub(super) banner: Option<Vec<u8>>,
}

#[derive(Clone, Copy, Debug)]
struct Symbol {
    address: u64,
    /// Where its name begins.
    name: u32,
    length: u16,
    global: bool,
}

impl SymbolTable {
    /// Takes a symbol in. One whose name cannot be printed is left out.
    pub(super) fn push(&mut self, address: u64, name: &str, global: bool) -> Result<(), SymbolsProblem> {
        if name.is_empty() || name.len() > NAME_MAX || !name.bytes().all(|byte| byte.is_ascii_graphic()) {
            return Ok(());
        }
        if self.symbols.len() >= SYMBOLS_MAX {
            return Err(SymbolsProblem::TooMany { what: "symbols", most: SYMBOLS_MAX as u64 });
        }
        let too_long = SymbolsProblem::TooMany { what: "bytes of names", most: NAMES_MAX as u64 };
        let (Ok(start), Ok(length)) = (u32::try_from(self.names.len()), u16::try_from(name.len())) else {
            return Err(too_long);
        };
        if self.names.len() + name.len() > NAMES_MAX {
            return Err(too_long);
        }
        self.names.push_str(name);
        self.symbols.push(Symbol { address, name: start, length, global });
        Ok(())
    }

    /// Puts what was taken in in order.
    pub(super) fn complete(mut self) -> Result<Self, SymbolsProblem> {
        if self.symbols.is_empty() {
            return Err(SymbolsProblem::Empty);
        }
        if self.symbols.iter().all(|symbol| symbol.address == 0) {
            return Err(SymbolsProblem::Hidden);
        }
        self.symbols.sort_by_key(|symbol| (symbol.address, !symbol.global));
        let count = u32::try_from(self.symbols.len()).unwrap_or(u32::MAX);
        let mut by_name: Vec<u32> = (0..count).collect();
        by_name.sort_by(|a, b| self.name_at(*a).cmp(self.name_at(*b)));
        self.by_name = by_name;
        Ok(self)
    }

    pub(super) fn count(&self) -> usize {
        self.symbols.len()
    }

    fn name(&self, symbol: &Symbol) -> &str {
        let start = symbol.name as usize;
        self.names.get(start..start + usize::from(symbol.length)).unwrap_or_default()
    }

    fn name_at(&self, place: u32) -> &str {
        self.symbols.get(place as usize).map_or("", |symbol| self.name(symbol))
    }

    /// The names, in order; one that several symbols have comes as often.
    pub(super) fn names(&self) -> impl Iterator<Item = &str> {
        self.by_name.iter().map(|place| self.name_at(*place))
    }

    /// The addresses of a name, ascending, each once.
    pub(super) fn addresses(&self, name: &str) -> Vec<u64> {
        let start = self.by_name.partition_point(|place| self.name_at(*place) < name);
        let mut addresses: Vec<u64> = self.by_name[start..]
            .iter()
            .take_while(|place| self.name_at(**place) == name)
            .filter_map(|place| self.symbols.get(*place as usize).map(|symbol| symbol.address))
            .collect();
        addresses.sort_unstable();
        addresses.dedup();
        addresses
    }

    /// The address of a name that has one only.
    pub(super) fn only(&self, name: &str) -> Option<u64> {
        match self.addresses(name)[..] {
            [only] => Some(only),
            _ => None,
        }
    }

    /// The last symbol at or before an address.
    pub(super) fn at_or_before(&self, address: u64) -> Option<(u64, &str)> {
        let behind = self.symbols.partition_point(|symbol| symbol.address <= address);
        let last = self.symbols.get(behind.checked_sub(1)?)?;
        let first = self.symbols.partition_point(|symbol| symbol.address < last.address);
        self.symbols.get(first).map(|symbol| (symbol.address, self.name(symbol)))
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test")]
mod tests {
    use super::*;

    #[test]
    fn by_name_and_by_address() {
        let mut table = SymbolTable::default();
        for (address, name, global) in [
            (0x3000, "late", true),
            (0x1000, "local", false),
            (0x1000, "global", true),
            (0x2000, "twice", false),
            (0x2800, "twice", false),
            (0x2800, "not\tprintable", false),
            (0x2900, "", false),
        ] {
            table.push(address, name, global).unwrap();
        }
        let table = table.complete().unwrap();
        assert_eq!(table.count(), 5);
        assert_eq!(table.addresses("twice"), [0x2000, 0x2800]);
        assert_eq!((table.only("late"), table.only("twice"), table.only("none")), (Some(0x3000), None, None));
        assert_eq!(table.at_or_before(0xfff), None);
        assert_eq!(table.at_or_before(0x1fff), Some((0x1000, "global")));
        assert_eq!(table.at_or_before(u64::MAX), Some((0x3000, "late")));
        assert_eq!(table.names().collect::<Vec<_>>(), ["global", "late", "local", "twice", "twice"]);
    }

    #[test]
    fn nothing_is_no_table() {
        assert!(matches!(SymbolTable::default().complete(), Err(SymbolsProblem::Empty)));
        let mut hidden = SymbolTable::default();
        hidden.push(0, "a", true).unwrap();
        assert!(matches!(hidden.complete(), Err(SymbolsProblem::Hidden)));
    }
}
