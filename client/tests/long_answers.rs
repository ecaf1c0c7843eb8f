//! Answers that take long: they come as soon as they are there, and a terminal is told how far they are.

#![allow(clippy::unwrap_used)]

#[allow(dead_code, reason = "each test uses its part")]
mod scripted;

use std::{
    io::{BufRead as _, BufReader, Read as _, Write as _},
    process::{Command, Stdio},
    sync::mpsc,
    thread,
    time::Duration,
};

use serde_json::Value;

/// As many addresses as go in one request.
const MOST: usize = 1 << 18;

#[test]
fn a_document_comes_before_the_addresses_end() {
    let mut batch = Command::new(env!("CARGO_BIN_EXE_pagewalk"))
        .args(["--addr", &scripted::start(None).to_string(), "--json", "--timeout", "60s"])
        .args(["batch", "--file", "-", "--max-faults", "0"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let (mut addresses, answers) = (batch.stdin.take().unwrap(), batch.stdout.take().unwrap());
    let (send, lines) = mpsc::channel();
    thread::spawn(move || BufReader::new(answers).lines().for_each(|line| send.send(line.unwrap()).unwrap()));
    // Whether there is a second request decides if the first answer begins an array.
    addresses.write_all("0x2000\n".repeat(2 * MOST).as_bytes()).unwrap();
    let mut text = String::new();
    while !text.ends_with("\n  },\n") {
        let line =
            lines.recv_timeout(Duration::from_secs(60)).expect("the first document, while more may come");
        text += &line;
        text.push('\n');
    }
    addresses.write_all(b"0x1000\n").unwrap();
    drop(addresses);
    lines.iter().for_each(|line| text += &line);
    assert_eq!(batch.wait().unwrap().code(), Some(1));
    let documents: Vec<Value> = serde_json::from_str(&text).unwrap();
    let words: Vec<usize> = documents.iter().map(|it| it["words"].as_array().unwrap().len()).collect();
    assert_eq!(words, [MOST, MOST, 1]);
    assert_eq!(documents[2]["faultCount"], 1);
}

/// What was asked before it is answered, in a document that is whole.
#[test]
fn a_word_that_is_no_address_ends_the_documents() {
    for pieces in 1..=2 {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all("0x2000\n".repeat(pieces * MOST).as_bytes()).unwrap();
        file.write_all(b"nothing\n").unwrap();
        let batch = Command::new(env!("CARGO_BIN_EXE_pagewalk"))
            .args(["--addr", &scripted::start(None).to_string(), "--json", "--timeout", "60s"])
            .args(["batch", "--max-faults", "0", "--file"])
            .arg(file.path())
            .output()
            .unwrap();
        assert_eq!(batch.status.code(), Some(2));
        let problem = format!("line {}: nothing: ", pieces * MOST + 1);
        assert!(String::from_utf8_lossy(&batch.stderr).contains(&problem), "{batch:?}");
        let answers: Value = serde_json::from_slice(&batch.stdout).unwrap();
        assert_eq!(answers.as_array().map_or(1, Vec::len), pieces);
    }
}

/// What somebody sees who runs it at a terminal, and the exit code.
fn at_a_terminal(arguments: &str) -> (String, i32) {
    let pagewalk = env!("CARGO_BIN_EXE_pagewalk");
    let address = scripted::start(None);
    let command = format!("stty cols 100; {pagewalk} --addr {address} --machine slow {arguments}");
    let mut script = Command::new("script")
        .args(["--quiet", "--return", "--command", &command, "/dev/null"])
        .env("TERM", "xterm")
        .env("NO_COLOR", "1")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .expect("script, of util-linux, is needed for a terminal");
    let mut seen = String::new();
    script.stdout.take().unwrap().read_to_string(&mut seen).unwrap();
    (seen, script.wait().unwrap().code().unwrap())
}

/// What stays on the screen.
fn stays(seen: &str) -> Vec<String> {
    let shown = |line: &str| line.rsplit("\u{1b}[2K").next().unwrap().trim_matches(['\r', ' ']).to_owned();
    seen.lines().map(shown).filter(|line| !line.is_empty()).collect()
}

#[test]
fn a_terminal_is_told_how_far_a_map_is() {
    let (seen, code) = at_a_terminal("maps");
    assert_eq!(code, 0, "{seen}");
    assert!(seen.contains("at 0x0000000030000000: 0 extents, 2048 table entries read"), "{seen:?}");
    let stays = stays(&seen);
    assert_eq!(stays.len(), 4, "{seen:?}");
    for (line, begins) in
        stays.iter().zip(["ADDRESSES", "0x0000000000001000-", "0xffff800000000000-", "2 extents"])
    {
        assert!(line.starts_with(begins), "{seen:?}");
    }
}

#[test]
fn a_terminal_is_told_how_far_a_batch_is() {
    let folder = tempfile::tempdir().unwrap();
    let (file, words) = (folder.path().join("addresses"), folder.path().join("words"));
    std::fs::write(&file, vec![0; 8 * (3 * MOST + 1)]).unwrap();
    let batch = format!("batch --raw --file {} > {}", file.display(), words.display());
    let (seen, code) = at_a_terminal(&batch);
    assert_eq!(code, 0, "{seen}");
    assert!(seen.contains(&format!("{} addresses, 0 faults", 2 * MOST)), "{seen:?}");
    assert_eq!(stays(&seen), Vec::<String>::new(), "{seen:?}");
    assert_eq!(std::fs::metadata(words).unwrap().len(), 8 * (3 * MOST as u64 + 1));
}
