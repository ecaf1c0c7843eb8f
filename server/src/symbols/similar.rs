//! Names that somebody who wrote another one may have meant.

use super::table::SymbolTable;

/// How many are named.
const MOST: usize = 5;
/// Changes of a byte that make a slip.
const SLIPS: usize = 2;
/// Names that are so long are compared as a whole only.
const LONG: usize = 64;

/// The closest names: those that are a slip or two away, then the shortest that have this one in them.
pub(super) fn similar<'a>(table: &'a SymbolTable, wanted: &str) -> Vec<&'a str> {
    // A single letter is two slips away from any other.
    let slips = if wanted.len() < 5 { 1 } else { SLIPS };
    let mut close: Vec<(usize, usize, &str)> = Vec::new();
    let mut last = "";
    for name in table.names() {
        if std::mem::replace(&mut last, name) == name {
            continue;
        }
        let rank = if name.len().abs_diff(wanted.len()) <= slips
            && let Some(distance) = distance(wanted, name, slips)
        {
            distance
        } else if wanted.len() >= 3 && name.contains(wanted) {
            SLIPS + 1
        } else {
            continue;
        };
        let place = close.partition_point(|other| *other <= (rank, name.len(), name));
        if place < MOST {
            close.insert(place, (rank, name.len(), name));
            close.truncate(MOST);
        }
    }
    close.into_iter().map(|(_, _, name)| name).collect()
}

/// How many bytes have to be put in, taken out or changed, if no more than `most`.
fn distance(a: &str, b: &str, most: usize) -> Option<usize> {
    let (a, b) = (a.as_bytes(), b.as_bytes());
    if b.len() > LONG || a.len() > LONG {
        return None;
    }
    let mut row = [0; LONG + 1];
    for (place, cell) in row.iter_mut().enumerate() {
        *cell = place;
    }
    for (above, byte) in a.iter().enumerate() {
        let mut diagonal = std::mem::replace(&mut row[0], above + 1);
        let mut least = above + 1;
        for (place, other) in b.iter().enumerate() {
            let changed = diagonal + usize::from(byte != other);
            diagonal = row[place + 1];
            let cell = changed.min(diagonal + 1).min(row[place] + 1);
            row[place + 1] = cell;
            least = least.min(cell);
        }
        if least > most {
            return None;
        }
    }
    Some(row[b.len()]).filter(|distance| *distance <= most)
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test")]
mod tests {
    use super::*;

    #[test]
    fn slips_before_parts() {
        let mut table = SymbolTable::default();
        for name in
            ["linux_banner", "linux_proc_banner", "init_task", "_printk", "vprintk_emit", "a", "b", "printk"]
        {
            table.push(1, name, true).unwrap();
        }
        let table = table.complete().unwrap();
        assert_eq!(similar(&table, "linux_baner"), ["linux_banner"]);
        assert_eq!(similar(&table, "print"), ["printk", "_printk", "vprintk_emit"]);
        assert_eq!(similar(&table, "intask"), [""; 0]);
        assert_eq!(similar(&table, "c"), ["a", "b"]);
        assert_eq!(similar(&table, &"x".repeat(500)), [""; 0]);
    }

    #[test]
    fn distances() {
        assert_eq!(distance("", "", 2), Some(0));
        assert_eq!(distance("abc", "abd", 2), Some(1));
        assert_eq!(distance("abc", "xabcy", 2), Some(2));
        assert_eq!(distance("abc", "cba", 1), None);
    }
}
