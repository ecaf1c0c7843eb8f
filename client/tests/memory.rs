//! `read`: pieces, where they end, and why.

#![allow(clippy::unwrap_used)]

#[allow(dead_code, reason = "each test uses its part")]
mod scripted;

use std::process::{Command, Output};

fn pagewalk(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_pagewalk"))
        .args(["--addr", &scripted::start(None).to_string()])
        .args(arguments)
        .output()
        .unwrap()
}

fn complaint(output: &Output) -> String {
    String::from_utf8(output.stderr.clone()).unwrap()
}

#[test]
fn addresses_end_with_64_bits() {
    let whole = pagewalk(&["read", "0xffff_ffff_ffe0_0000", "0x20_0000", "--raw"]);
    assert_eq!(whole.status.code(), Some(0), "{}", complaint(&whole));
    assert_eq!(whole.stdout, vec![7; 0x20_0000]);
    for address in ["0xffff_ffff_fff0_0000", "symbol"] {
        let beyond = pagewalk(&["read", address, "0x20_0000", "--raw"]);
        assert_eq!(beyond.status.code(), Some(2), "{}", complaint(&beyond));
        assert_eq!(complaint(&beyond), "error: 0xfffffffffff00000 and 2097152 bytes reach beyond 64 bits\n");
        assert!(beyond.stdout.is_empty(), "{} bytes", beyond.stdout.len());
    }
}

#[test]
fn the_reason_to_stop_has_colours_of_our_own_only() {
    let plain = "stopped at 0x0000000000001010: GPA 0x0000000000005000: \\u{1b}[2Jno memory\n";
    let coloured = plain.replace("stopped", "\u{1b}[1m\u{1b}[31mstopped\u{1b}[0m");
    for (color, expected) in [("auto", plain), ("never", plain), ("always", &coloured)] {
        let short = pagewalk(&["--machine", "short", "--color", color, "read", "0x1000", "32", "--raw"]);
        assert_eq!(short.status.code(), Some(1));
        assert_eq!(short.stdout, [7; 16]);
        assert_eq!(complaint(&short), *expected, "{color}");
    }
}
