//! Huge pages for guest memory: transparent ones and reserved ones (the kernel's documents "Transparent Hugepage Support"
//! and "HugeTLB Pages").

use std::{fs, path::Path};

use super::check::Report;

const TRANSPARENT: &str = "/sys/kernel/mm/transparent_hugepage";
const RESERVED: &str = "/sys/kernel/mm/hugepages";

pub(super) fn examine(report: &mut Report) {
    let subject = "transparent huge pages";
    match fs::read_to_string(Path::new(TRANSPARENT).join("enabled")).ok().as_deref().and_then(selected) {
        Some("never") => report.warn(
            subject,
            "never",
            format!(
                "guest memory is mapped by 4 KiB pages; `echo madvise > {TRANSPARENT}/enabled` allows them"
            ),
        ),
        Some(choice) => report.ok(subject, choice),
        None => report.warn(subject, "unknown to this kernel", "guest memory is mapped by 4 KiB pages"),
    }
    for (subject, directory, size) in [
        ("reserved 2 MiB pages", "hugepages-2048kB", "2M"),
        ("reserved 1 GiB pages", "hugepages-1048576kB", "1G"),
    ] {
        let count = |file: &str| {
            fs::read_to_string(Path::new(RESERVED).join(directory).join(file))
                .ok()?
                .trim()
                .parse::<u64>()
                .ok()
        };
        match (count("nr_hugepages"), count("free_hugepages")) {
            // Nothing here needs them; a guest that wants them would.
            (Some(0), _) => {
                report.ok(subject, format!("none (a machine with hugepages={size} needs some)"));
            }
            (Some(all), Some(free)) => report.ok(subject, format!("{free} of {all} free")),
            _ => report.ok(subject, "not offered by this host"),
        }
    }
}

/// The choice in brackets: `always [madvise] never`.
fn selected(choices: &str) -> Option<&str> {
    let (_, rest) = choices.split_once('[')?;
    Some(rest.split_once(']')?.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_choice_in_brackets() {
        assert_eq!(selected("always [madvise] never\n"), Some("madvise"));
        assert_eq!(selected("[always] madvise never"), Some("always"));
        assert_eq!(selected("always madvise never"), None);
        assert_eq!(selected(""), None);
        assert_eq!(selected("["), None);
    }
}
