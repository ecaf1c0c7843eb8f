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
            "ngpa.wrapping_sub(start) < bytes && rights == guest",
            "ngpa.wrapping_sub(start) < bytes",
        )],
    ),
    mutant(
        "a fault of a map's second dimension holds for a byte too many",
        &[("map/second.rs", "(below & !ngpa).saturating_add(1)", "(below & !ngpa).saturating_add(2)")],
    ),
    mutant(
        "a map's filter takes pages with a right that they must not have",
        &[("map/filter.rs", "&& page.rights().and(self.forbidden) == Rights::NONE", "")],
    ),
    mutant(
        "a map's access is not asked of each page",
        &[("map/scan.rs", "let own = if self.page_by_page {", "let own = if false {")],
    ),
];
