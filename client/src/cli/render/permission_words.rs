//! The sixteen permission words as a table: accesses down, kinds of pages across.
//!
//! `PageFormat.permissions` in the contract says how a word is found and what its bits are. Words for writes that are
//! fetches as well do not occur, and pages that cannot be read exist under EPT only.

use super::table::{Cell, Table};

const WRITE: usize = 1;
const USER: usize = 2;
const AC: usize = 4;
const FETCH: usize = 8;

/// Page rights, R(1) + W(2) + U(4) + X(8), with `s` for supervisor pages and `u` for user pages.
const PAGES: [(u32, &str); 8] = [
    (1, "r-- s"),
    (1 | 8, "r-x s"),
    (1 | 2, "rw- s"),
    (1 | 2 | 8, "rwx s"),
    (1 | 4, "r-- u"),
    (1 | 4 | 8, "r-x u"),
    (1 | 2 | 4, "rw- u"),
    (1 | 2 | 4 | 8, "rwx u"),
];

pub(super) fn table(words: &[u32]) -> String {
    let mut headings = vec!["ALLOWED ON PAGES", "WORD"];
    headings.extend(PAGES.iter().map(|(_, name)| *name));
    let mut table = Table::new(&headings).indented(2);
    for (kind, name) in [(0, "read"), (WRITE, "write"), (FETCH, "fetch")] {
        for (who, whose) in [(0, "supervisor"), (USER, "user")] {
            for (suspends, ac) in [(0, ""), (AC, ", AC=1")] {
                let Some(&word) = words.get(kind | who | suspends) else {
                    continue;
                };
                let mut row = vec![format!("{whose} {name}{ac}").into(), format!("{word:#06x}").into()];
                row.extend(PAGES.iter().map(|(rights, _)| {
                    if word >> rights & 1 == 0 { Cell::good("yes") } else { Cell::dim("-") }
                }));
                table.row(row);
            }
        }
    }
    table.render()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_become_yes_and_no() {
        let mut words = [0xffff; 16];
        // A user write without AC, allowed on writable user pages only.
        words[WRITE | USER] = !(1 << 7 | 1 << 15) & 0xffff;
        let text = anstream::adapter::strip_str(&table(&words)).to_string();
        let row = text.lines().find(|line| line.contains("user write ")).unwrap_or_default();
        assert_eq!(
            row.split_whitespace().collect::<Vec<_>>(),
            ["user", "write", "0x7f7f", "-", "-", "-", "-", "-", "-", "yes", "yes"]
        );
        assert_eq!(text.matches("yes").count(), 2);
        assert_eq!(text.lines().count(), 13);
    }

    #[test]
    fn short_answers_do_not_matter() {
        assert_eq!(table(&[0]).lines().count(), 2);
        assert_eq!(table(&[]).lines().count(), 1);
    }
}
