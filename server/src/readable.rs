//! Words of somebody else's, as a person may safely see them.

/// The text in one line, without characters that steer a terminal: those are shown escaped.
pub(crate) fn readable(text: &str) -> String {
    let mut line = String::with_capacity(text.len());
    for one in text.chars() {
        if one.is_control() {
            line.extend(one.escape_unicode());
        } else {
            line.push(one);
        }
    }
    line
}

/// The same of text that may have several lines of its own.
#[must_use]
pub fn readable_lines(text: &str) -> String {
    text.lines().map(readable).collect::<Vec<_>>().join("\n")
}

#[cfg(test)]
mod tests {
    use super::{readable, readable_lines};

    #[test]
    fn nothing_steers_a_terminal_and_all_else_stays() {
        assert_eq!(readable("a\nb\u{1b}[2J\u{9b}1m"), r"a\u{a}b\u{1b}[2J\u{9b}1m");
        assert_eq!(readable("größer `\"\\"), "größer `\"\\");
        assert_eq!(readable_lines("a\r\n\tb\u{7}"), "a\n\\u{9}b\\u{7}");
    }
}
