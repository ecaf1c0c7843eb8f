//! The daemon's ladder, lightly coloured. Its layout is the daemon's affair, so only its words are looked at.

use pagewalk_proto::readable_lines;

use super::paint;

pub(in crate::cli) fn coloured(text: &str) -> String {
    let text = readable_lines(text.trim_end_matches('\n'));
    text.split_inclusive(|c: char| c.is_whitespace()).map(word).collect()
}

fn word(word: &str) -> String {
    let core = word.trim_matches(|c: char| !c.is_alphanumeric() && c != '#');
    let Some((before, after)) = word.split_once(core).filter(|_| !core.is_empty()) else {
        return word.to_owned();
    };
    let core = if core.starts_with("0x") {
        paint::address(core)
    } else if matches!(core, "#PF" | "#GP" | "#SS" | "NPF" | "refused" | "refuses" | "fault") {
        paint::bad(core)
    } else {
        return word.to_owned();
    };
    format!("{before}{core}{after}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_colours_are_added() {
        let ladder = "PML4E  at 0x1000: 0x2003,\n  `- #PF (refused)  \n\tend -- \n";
        let painted = coloured(ladder);
        assert!(painted.len() > ladder.len());
        let stripped = anstream::adapter::strip_str(&painted).to_string();
        assert_eq!(stripped, ladder.trim_end_matches('\n').replace('\t', r"\u{9}"));
    }
}
