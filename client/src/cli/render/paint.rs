//! Colours, as terminal sequences; the output removes them where they are not wanted.

use std::fmt::Display;

use anstyle::{AnsiColor, Style};

const ADDRESS: Style = AnsiColor::Cyan.on_default();
const GOOD: Style = AnsiColor::Green.on_default();
const WARNING: Style = AnsiColor::Yellow.on_default();
const BAD: Style = AnsiColor::Red.on_default().bold();
const HEADING: Style = Style::new().bold();
const DIM: Style = Style::new().dimmed();

fn painted(style: Style, text: impl Display) -> String {
    format!("{style}{text}{style:#}")
}

pub(in crate::cli) fn address(text: impl Display) -> String {
    painted(ADDRESS, text)
}

pub(in crate::cli) fn good(text: impl Display) -> String {
    painted(GOOD, text)
}

pub(in crate::cli) fn warning(text: impl Display) -> String {
    painted(WARNING, text)
}

pub(in crate::cli) fn bad(text: impl Display) -> String {
    painted(BAD, text)
}

pub(in crate::cli) fn heading(text: impl Display) -> String {
    painted(HEADING, text)
}

pub(in crate::cli) fn dim(text: impl Display) -> String {
    painted(DIM, text)
}
