//! The entries read during a walk, as a table.

use super::{
    names, paint,
    table::{Cell, Table},
};
use crate::v1::Step;

pub(in crate::cli) fn table(steps: &[Step]) -> String {
    let mut table = Table::new(&["ENTRY", "INPUT", "INDEX", "AT", "VALUE", "RIGHTS", "VERDICT"]);
    for step in steps {
        table.row([
            names::entry_in(step.dimension(), step.level).into(),
            step.input.map_or(Cell::new(""), |input| Cell::new(super::hex(input))),
            step.index.to_string().into(),
            Cell::address(step.entry_gpa),
            super::hex(step.entry).into(),
            step.rights_so_far.as_ref().map(names::rights).unwrap_or_default().into(),
            paint::plain(&step.verdict).into(),
        ]);
    }
    table.render()
}
