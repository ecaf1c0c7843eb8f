//! `pagewalk doctor`, of whose findings only those about the daemon are the same on every host.

#![allow(clippy::unwrap_used)]

#[allow(dead_code, reason = "each test uses its part")]
mod scripted;

use std::{collections::BTreeMap, process::Command};

use serde_json::Value;

/// The exit code, and the checks by subject.
fn examine(address: &str) -> (i32, BTreeMap<String, Value>) {
    let output = Command::new(env!("CARGO_BIN_EXE_pagewalk"))
        .args(["doctor", "--json", "--addr", address])
        .output()
        .unwrap();
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(report["clientVersion"], env!("CARGO_PKG_VERSION"));
    let checks: BTreeMap<String, Value> = report["checks"]
        .as_array()
        .unwrap()
        .iter()
        .map(|check| (check["subject"].as_str().unwrap().to_owned(), check.clone()))
        .collect();
    for (subject, check) in &checks {
        assert_eq!(
            check["standing"] != "ok",
            check.get("advice").is_some(),
            "{subject}: advice where it is needed"
        );
    }
    let failed = checks.values().any(|check| check["standing"] == "fail");
    assert_eq!(report["failed"], failed);
    assert_eq!(output.status.code(), Some(i32::from(failed)));
    (output.status.code().unwrap(), checks)
}

#[test]
fn without_a_daemon_the_host_is_examined_all_the_same() {
    let (code, checks) = examine("127.0.0.1:1");
    assert_eq!(code, 1);
    assert_eq!(checks["daemon"]["standing"], "fail");
    assert!(checks["daemon"]["advice"].as_str().unwrap().contains("cargo run --release -- demo"));
    for subject in ["/dev/kvm", "transparent huge pages", "reserved 2 MiB pages"] {
        assert!(checks.contains_key(subject), "{subject}");
    }
    if checks.get("KVM API").is_some_and(|check| check["standing"] == "ok") {
        for subject in ["KVM VM", "nested state", "sync regs", "immediate exit", "guest debug"] {
            assert!(checks.contains_key(subject), "{subject}");
        }
        for subject in ["1 GiB pages", "LA57", "SMEP", "SMAP", "PKU", "MAXPHYADDR"] {
            assert!(checks.contains_key(subject), "{subject}");
        }
    }
}

#[test]
fn a_daemon_of_another_version_is_a_warning() {
    let (_, checks) = examine(&scripted::start(None).to_string());
    assert_eq!(checks["daemon"]["standing"], "ok");
    assert_eq!(checks["health"]["standing"], "ok");
    assert_eq!(checks["version"]["standing"], "warn");
    assert!(checks["version"]["finding"].as_str().unwrap().contains("9.9.9"));
    assert!(checks["machine"]["finding"].as_str().unwrap().starts_with("script, source demo, 1 vCPU:"));
}
