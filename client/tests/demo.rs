//! The command against a real daemon with the demo machine, on /dev/kvm or served from plain memory.

#![allow(clippy::unwrap_used)]

mod daemon;

use std::{
    io::{BufRead as _, BufReader},
    process::Output,
};

use daemon::Daemon;
use serde_json::Value;

const VERBS: [&str; 17] = [
    "maps",
    "find",
    "translate",
    "range",
    "walker",
    "nested",
    "nested-gpa",
    "vcpus",
    "regs",
    "pause",
    "resume",
    "step",
    "machines",
    "read",
    "write",
    "explain-fault",
    "doctor",
];

fn json(output: &Output) -> Value {
    serde_json::from_slice(&output.stdout).unwrap_or_else(|error| panic!("{error}: {output:?}"))
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}

fn machine(daemon: &Daemon) -> Value {
    json(&daemon.pagewalk(&["--json", "machines"]))["machines"][0].clone()
}

#[test]
fn every_example_of_the_help_works() {
    let daemon = Daemon::start();
    let runs = machine(&daemon)["capabilities"]["live"] == true;
    let mut ran = 0;
    for verb in VERBS {
        let help = text(&daemon.pagewalk(&[verb, "--help"]).stdout);
        let examples: Vec<&str> = help.lines().filter_map(|line| line.strip_prefix("  pagewalk ")).collect();
        assert!(!examples.is_empty(), "{verb}: {help}");
        for example in examples {
            if example.contains("--watch") && !runs {
                // Nothing ever changes there.
                continue;
            }
            let output = daemon.pagewalk(&example.split_whitespace().collect::<Vec<_>>());
            let code = output.status.code().unwrap();
            let refused = text(&output.stderr);
            match verb {
                // Without /dev/kvm there is no vCPU to steer.
                "pause" | "resume" | "step" | "regs" if !runs => {
                    assert!(code == 0 || code == 3, "{example}: {refused}");
                }
                // This host may lack things.
                "doctor" => assert!(code == 0 || code == 1, "{example}: {refused}"),
                _ => assert_eq!(code, 0, "{example}: {refused}"),
            }
            if !example.contains("--watch") && code != 3 {
                let arguments: Vec<_> = ["--json"].into_iter().chain(example.split_whitespace()).collect();
                let again = daemon.pagewalk(&arguments);
                assert_eq!(again.status.code(), Some(code), "{example} with --json: {}", text(&again.stderr));
                assert!(json(&again).is_object() || json(&again).is_array(), "{example} with --json");
            }
            ran += 1;
        }
    }
    assert!(ran >= 16, "only {ran} examples");
}

/// Each file has a daemon to itself: nested mode changes what others would see.
fn golden(file: &str) {
    let daemon = Daemon::start();
    let cases = trycmd::TestCases::new();
    cases
        .env("PAGEWALK_ADDR", &daemon.address)
        .env("COLUMNS", "100")
        .env("NO_COLOR", "1")
        .case(format!("tests/golden/demo/{file}.trycmd"));
    cases.run();
}

#[test]
fn translations_and_faults() {
    golden("translate");
}

#[test]
fn faults_explained() {
    golden("explain-fault");
}

#[test]
fn walkers_and_nested_mode() {
    golden("walker");
}

#[test]
fn nested_physical_addresses() {
    golden("nested-gpa");
}

#[test]
fn maps_of_an_address_space() {
    golden("maps");
}

#[test]
fn machines_and_vcpus() {
    golden("machine");
}

#[test]
fn json_is_what_the_contract_says() {
    let daemon = Daemon::start();
    let arguments = ["--json", "translate", "0x401123", "--as", "user", "--cr3", "0x21000", "--trace"];
    let answer = json(&daemon.pagewalk(&arguments));
    assert_eq!(answer["translation"]["gpa"], 0x4_1123.to_string(), "64-bit integers are strings");
    assert_eq!(answer["translation"]["pageSize"], "PAGE_SIZE_4K");
    assert_eq!(answer["translation"]["effective"]["user"], true);
    assert_eq!(answer["steps"].as_array().unwrap().len(), 4);
    assert_eq!(answer["steps"][0]["entryGpa"], 0x2_1000.to_string());
    assert_eq!(answer["provenance"]["machine"], "demo");

    let arguments = ["--json", "translate", "0xffff800000015000", "0xffff800000010000", "--as", "supervisor"];
    let output = daemon.pagewalk(&arguments);
    assert_eq!(output.status.code(), Some(1));
    let answers = json(&output);
    assert_eq!(answers[0]["fault"]["errorCode"], 0);
    assert_eq!(answers[1]["translation"]["gpa"], 0x1_0000.to_string());

    let output = daemon.pagewalk(&["--json", "vcpus", "--machine", "nobody"]);
    assert_eq!(output.status.code(), Some(3));
    let error: Value = serde_json::from_slice(&output.stderr).unwrap();
    assert_eq!(error["error"]["code"], "NOT_FOUND");
    assert!(error["error"]["reason"].is_string(), "{error}");
}

#[test]
fn a_watch_sees_nested_mode_come_and_go() {
    let daemon = Daemon::start();
    let mut watch = daemon.spawn(&["--json", "walker", "--watch"]);
    let mut lines = BufReader::new(watch.stdout.take().unwrap()).lines();
    let mut next_with = |nested: &str| loop {
        let state: Value = serde_json::from_str(&lines.next().unwrap().unwrap()).unwrap();
        if state["nested"]["kind"] == nested {
            return state;
        }
    };
    next_with("NESTED_MODE_KIND_OFF");
    let on = ["nested", "npt", "--ncr3", "0x50000", "--l2-cr3", "0x1000", "--walker-only"];
    assert!(daemon.pagewalk(&on).status.success());
    let state = next_with("NESTED_MODE_KIND_WALKER_ONLY");
    assert_eq!(state["ngpaWalk"]["root"], 0x5_0000.to_string());
    assert!(daemon.pagewalk(&["nested", "off"]).status.success());
    next_with("NESTED_MODE_KIND_OFF");

    // The stream's end is told, not taken for an answer.
    drop(daemon);
    let ended = watch.wait_with_output().unwrap();
    assert_eq!(ended.status.code(), Some(3));
    assert!(!ended.stderr.is_empty());
}
