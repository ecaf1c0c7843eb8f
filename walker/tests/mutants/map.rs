//! Maps, put before the single walk.

use crate::{MAP, Mutant};

const fn mutant(
    slip: &'static str,
    changes: &'static [(&'static str, &'static str, &'static str)],
) -> Mutant {
    Mutant { slip, judges: MAP, changes }
}

pub(crate) const MUTANTS: &[Mutant] = &[
    mutant(
        "a map knows no rights but the leaf's",
        &[(
            "map/scan.rs",
            "let grants = E::through(above.grants, level, entry);",
            "let grants = Grants::ALL;",
        )],
    ),
    mutant(
        "a map's second dimension is asked once for all rights of the guest",
        &[(
            "map/second.rs",
            "let kept = self.pages.filter(|_| self.guest == page.rights());",
            "let kept = self.pages;",
        )],
    ),
    mutant(
        "a map's second dimension is asked for a read, whatever the access",
        &[("map/scan.rs", "if exempt { cursor.access } else { EXEMPT }", "EXEMPT")],
    ),
    mutant(
        "a fault of a map's second dimension holds for a byte too many",
        &[("map/second.rs", "(below & !ngpa).saturating_add(1)", "(below & !ngpa).saturating_add(2)")],
    ),
    mutant(
        "a map's filter takes pages with a right that they must not have",
        &[("map/filter.rs", "&& rights.and(self.forbidden) == Rights::NONE", "")],
    ),
    mutant(
        "a map's access is not asked of each page",
        &[("map/scan.rs", "let own = if self.page_by_page {", "let own = if false {")],
    ),
    mutant(
        "a map joins pages that differ in execute-disable",
        &[("map/entries.rs", "        | NO_EXECUTE\n", "")],
    ),
    mutant(
        "a map's run goes on where its frames carry",
        &[(
            "map/entries.rs",
            "entry & self.meant == further && entry & self.counter != 0",
            "entry & self.meant == further",
        )],
    ),
    mutant(
        "a map's group is of one run although its frames carry",
        &[("map/entries.rs", "} else if differs == 0 && last <= counter {", "} else if differs == 0 {")],
    ),
    mutant(
        "a map that looks for memory misses its last page",
        &[(
            "map/entries.rs",
            "span: sought.last.0.saturating_sub(first),",
            "span: sought.last.0.saturating_sub(first + 0x1000),",
        )],
    ),
    mutant(
        "a map's lane knows no rights but the leaf's",
        &[(
            "map/lane.rs",
            "let rights = E::rights(E::through(table.grants, 1, entry));",
            "let rights = E::rights(E::through(crate::entry::Grants::ALL, 1, entry));",
        )],
    ),
    mutant(
        "a map's lane takes what lies behind a page for what lies behind all that continue it",
        &[("map/lane.rs", "self.behind.known(gpa, bytes)", "self.behind.known(gpa, 1)")],
    ),
    mutant(
        "a map takes any entry beside a judged one of the second dimension for another such page",
        &[(
            "map/second.rs",
            "(entry & !(self.frame | self.accessed_dirty) == self.judged).then_some(entry & self.frame)",
            "(entry & 1 != 0).then_some(entry & self.frame)",
        )],
    ),
    mutant(
        "a map's stretch of the second dimension is as long as it is wanted",
        &[(
            "map/second.rs",
            "                if differs != 0 {\n",
            "                if differs == u64::MAX {\n",
        )],
    ),
    mutant(
        "a map goes along a table again whose last entry's table is refused",
        &[(
            "map/scan.rs",
            "self.refused(end, fault)?;\n                            true",
            "self.refused(end, fault)?;\n                            false",
        )],
    ),
];
