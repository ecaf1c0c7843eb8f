//! Words of somebody else's, as a person may safely see them.

/// Whether a character steers what shows it instead of being shown: control characters, and those that turn the direction of
/// what stands around them (Unicode Standard Annex 9, "Explicit Directional Embeddings, Overrides and Isolates").
#[must_use]
pub fn steers(one: char) -> bool {
    one.is_control()
        || matches!(one, '\u{61c}' | '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
}

/// The text in one line, without characters that steer a terminal: those are shown escaped.
#[must_use]
pub fn readable(text: &str) -> String {
    let mut line = String::with_capacity(text.len());
    for one in text.chars() {
        if steers(one) {
            line.extend(one.escape_unicode());
        } else {
            line.push(one);
        }
    }
    line
}

/// The same in at most `most` bytes: dots at its end stand for what is left out.
#[must_use]
pub fn readable_within(text: &str, most: usize) -> String {
    const DOTS: &str = "...";
    let mut line = readable(text);
    if line.len() > most {
        line.truncate(line.floor_char_boundary(most.saturating_sub(DOTS.len())));
        line.push_str(DOTS);
    }
    line
}

/// The same of text that may have several lines of its own.
#[must_use]
pub fn readable_lines(text: &str) -> String {
    let lines = text.split('\n').map(|line| readable(line.strip_suffix('\r').unwrap_or(line)));
    lines.collect::<Vec<_>>().join("\n")
}

#[cfg(test)]
mod tests {
    use super::{readable, readable_lines, readable_within};

    #[test]
    fn nothing_steers_a_terminal_and_all_else_stays() {
        assert_eq!(readable("a\nb\u{1b}[2J\u{9b}1m"), r"a\u{a}b\u{1b}[2J\u{9b}1m");
        assert_eq!(readable("\u{202e}cba\u{2069}"), r"\u{202e}cba\u{2069}");
        assert_eq!(readable("größer `\"\\ שלום"), "größer `\"\\ שלום");
        assert_eq!(readable_within("größer", 8), "größer");
        assert_eq!(readable_within("größer\n", 8), "grö...");
        assert_eq!(readable_lines("a\r\n\tb\u{7}\n"), "a\n\\u{9}b\\u{7}\n");
    }
}
