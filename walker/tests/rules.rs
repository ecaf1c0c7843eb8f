//! `RULES.md` names tests, judges and mutants: each of them has to be there.

#![allow(clippy::unwrap_used, reason = "a test")]

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

/// The tests of a folder, all files below it as one text.
fn sources(folder: &Path) -> String {
    let mut text = String::new();
    let mut folders = vec![folder.to_path_buf()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|it| it == "rs") && !path.ends_with("tests/rules.rs") {
                text += &fs::read_to_string(path).unwrap();
            }
        }
    }
    text
}

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).to_path_buf()
}

/// What stands between backticks.
fn code(page: &str) -> Vec<&str> {
    page.split('`').skip(1).step_by(2).collect()
}

/// A judge is `name`, or inside a bed `bed-name`.
fn judge_exists(name: &str, all: &str) -> bool {
    let quoted = |name: &str| all.contains(&format!("\"{name}\""));
    quoted(name)
        || ["nested-amd-", "nested-intel-"].iter().any(|bed| name.strip_prefix(bed).is_some_and(quoted))
}

#[test]
fn what_the_page_names_is_there() {
    let page = fs::read_to_string(root().join("RULES.md")).unwrap();
    let folders =
        ["tests", "fuzz/fuzz_targets", "../server/tests/judge_daemon", "../server/tests/judge_validated"];
    let all = folders.map(|folder| sources(&root().join(folder))).concat();
    let mut missing = Vec::new();

    let tests: BTreeSet<_> = code(&page).into_iter().filter_map(|span| span.split_once("::")).collect();
    let mut tests_named = 0;
    for (file, function) in
        tests.iter().filter(|(file, _)| file.starts_with(char::is_lowercase) && *file != "file")
    {
        let here = ["tests", "src", "src/batch"]
            .iter()
            .filter_map(|folder| fs::read_to_string(root().join(folder).join(format!("{file}.rs"))).ok());
        tests_named += 1;
        if !here.into_iter().any(|source| source.contains(&format!("fn {function}("))) {
            missing.push(format!("test {file}::{function}"));
        }
    }

    // "judge `a`", "judges `a`, `b`".
    let mut judges = BTreeSet::new();
    for line in page.lines() {
        for part in line.split("judge").skip(1) {
            let list = part.trim_start_matches('s').trim_start();
            let list = list.split([';', '|']).next().unwrap();
            judges.extend(code(list).into_iter().filter(|span| {
                !span.contains("::")
                    && span.contains(|c: char| c.is_ascii_lowercase())
                    && !span.contains(' ')
                    && !span.contains('/')
            }));
        }
    }
    for judge in &judges {
        if !judge_exists(judge, &all) {
            missing.push(format!("judge {judge}"));
        }
    }

    let mut mutants = BTreeSet::new();
    for line in page.lines().filter(|line| line.starts_with('|')) {
        for part in line.split("mutant").skip(1) {
            let list = part.split([';', '|']).next().unwrap();
            mutants.extend(list.split('"').skip(1).step_by(2));
        }
    }
    for mutant in &mutants {
        if !all.contains(&format!("\"{mutant}\"")) {
            missing.push(format!("mutant {mutant}"));
        }
    }

    assert!(missing.is_empty(), "RULES.md names what is not there: {missing:#?}");
    // The page is read as it is meant to be.
    assert!(
        tests_named >= 55 && judges.len() >= 45 && mutants.len() >= 150,
        "{tests_named} {judges:?} {mutants:?}"
    );
}
