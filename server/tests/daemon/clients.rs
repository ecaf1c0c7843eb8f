//! Clients that share no code with the daemon's own: grpcurl, which knows the contract by reflection alone, and Python.

use std::process::Command;

use libtest_mimic::Failed;
use serde_json::{Value, json};

use crate::beds::{Bed, Test};
use crate::process::{Daemon, output, pagewalk, run};

pub(crate) const TESTS: &[Test] = &[
    ("clients_grpcurl_lists_and_describes", &[Bed::Grpcurl], grpcurl_lists_and_describes),
    ("clients_give_equal_answers", &[Bed::Grpcurl, Bed::Python], give_equal_answers),
    ("clients_give_equal_nested_answers", &[Bed::Grpcurl, Bed::Python], give_equal_nested_answers),
];

fn grpcurl(daemon: &Daemon, arguments: &[&str]) -> Command {
    let mut command = Command::new("grpcurl");
    let (options, rest) = match arguments {
        ["-d", request, rest @ ..] => (vec!["-d", *request], rest),
        rest => (vec![], rest),
    };
    command.arg("-plaintext").args(options).arg(&daemon.address).args(rest);
    command
}

fn grpcurl_lists_and_describes() -> Result<(), Failed> {
    let daemon = Daemon::serve(&["--machine", "demo:plain"]);
    let listed = output(&mut grpcurl(&daemon, &["list"]));
    let listed: Vec<&str> = listed.lines().collect();
    for service in [
        "grpc.health.v1.Health",
        "pagewalk.v1.MachineService",
        "pagewalk.v1.MappingService",
        "pagewalk.v1.TranslationService",
        "pagewalk.v1.VcpuService",
        "pagewalk.v1.WalkerService",
    ] {
        assert!(listed.contains(&service), "{service}: {listed:?}");
        let described = output(&mut grpcurl(&daemon, &["describe", service]));
        assert!(described.contains(&format!("{service} is a service")), "{described}");
    }
    let methods = output(&mut grpcurl(&daemon, &["list", "pagewalk.v1.TranslationService"]));
    assert_eq!(
        methods.lines().collect::<Vec<_>>(),
        [
            "pagewalk.v1.TranslationService.BatchTranslate",
            "pagewalk.v1.TranslationService.ExplainFault",
            "pagewalk.v1.TranslationService.StreamTranslate",
            "pagewalk.v1.TranslationService.Translate",
            "pagewalk.v1.TranslationService.TranslateAcross",
            "pagewalk.v1.TranslationService.TranslateNestedGpa",
            "pagewalk.v1.TranslationService.TranslateRange",
        ]
    );
    let request = output(&mut grpcurl(&daemon, &["describe", "pagewalk.v1.TranslateRequest"]));
    assert!(request.contains("What to translate, and how.") && request.contains("ad_policy"), "{request}");
    let health = output(&mut grpcurl(&daemon, &["grpc.health.v1.Health/Check"]));
    assert!(health.contains("SERVING"), "{health}");

    let request = json!({
        "address": {"text": "0xffff800000010000"},
        "access": {"kind": "ACCESS_KIND_READ"},
        "explain": true,
    });
    let method = "pagewalk.v1.TranslationService/Translate";
    let answer = output(&mut grpcurl(&daemon, &["-d", &request.to_string(), method]));
    let answer: Value = serde_json::from_str(&answer)?;
    let ladder = answer["explanation"].as_str().unwrap();
    assert!(ladder.contains("0xffff800000010000") && ladder.contains("PML4E"), "{ladder}");

    let refused = run(&mut grpcurl(&daemon, &["-d", r#"{"address": {"text": "here"}}"#, method]));
    assert_ne!(refused.code, Some(0));
    assert!(refused.err.contains("InvalidArgument") && refused.err.contains("here"), "{}", refused.err);
    Ok(())
}

/// What Python makes of an answer, in the names of the contract's JSON.
const PYTHON: &str = r#"
import json, sys
import pagewalk

SIZES = {0: "UNPAGED", 1 << 12: "4K", 1 << 21: "2M", 1 << 30: "1G"}

def rights(of):
    return {name: True for name in ("read", "write", "user", "execute") if getattr(of, name)}

def document(found):
    if found.ok:
        answer = {
            "gpa": str(found.gpa),
            "pageSize": "PAGE_SIZE_" + SIZES[found.page_size],
            "effective": rights(found.rights),
            "backing": "BACKING_" + found.backing.upper(),
            "patType": "MEMORY_TYPE_" + found.pat_type.upper(),
        }
        if found.nested_gpa is not None:
            answer["nestedGpa"] = str(found.nested_gpa)
            answer["nestedPageSize"] = "PAGE_SIZE_" + SIZES[found.nested_page_size]
        flags = {"accessed": found.accessed, "dirty": found.dirty, "adSkipped": found.ad_skipped,
                 "global": found.global_page}
        answer |= {name: True for name, on in flags.items() if on}
        answer |= {"protectionKey": found.protection_key} if found.protection_key else {}
        return {"translation": answer}
    answer = {"kind": "FAULT_KIND_" + found.kind.upper(), "address": str(found.address), "reason": found.reason,
              "dimension": {"guest": "DIMENSION_GUEST", "nested": "DIMENSION_NESTED"}[found.dimension]}
    numbers = {"entryGpa": found.entry_gpa, "entry": found.entry, "nestedGpa": found.nested_gpa, "bits": found.bits}
    answer |= {name: str(value) for name, value in numbers.items() if value}
    answer |= {"level": found.level} if found.level else {}
    answer |= {} if found.error_code is None else {"errorCode": found.error_code}
    answer |= {} if found.exit_info_1 is None else {"exitInfo1": str(found.exit_info_1)}
    return {"fault": answer}

with pagewalk.connect(sys.argv[1]) as client:
    for question in json.load(sys.stdin):
        found = client.translate(question["address"], question["access"], explain=True)
        address = {"address": str(found.gva if found.ok else found.address)}
        print(json.dumps(document(found) | address | {"explanation": found.explanation}))
"#;

fn give_equal_answers() -> Result<(), Failed> {
    let pagewalk = pagewalk();
    let daemon = Daemon::serve(&["--machine", "demo:plain"]);
    let questions = [
        (0xffff_8000_0001_0000_u64, "fetch"), // kernel-text
        (0xffff_8000_0001_1ff8, "write"),     // kernel-data
        (0xffff_8000_0001_3000, "write"),     // read-only
        (0xffff_8000_0020_1234, "read"),      // huge-2m
        (0xffff_8000_4001_0000, "fetch"),     // huge-1g, no-execute
        (0xffff_8000_0040_0000, "read"),      // reserved-bit
        (0xffff_8000_0001_9000, "read"),      // mmio
        (0xffff_8000_0060_0000, "write"),     // unbacked-table
        (0x40_1000, "write"),                 // user-data
        (u64::MAX >> 1, "read"),              // not canonical
    ];

    let asked: Vec<Value> =
        questions.iter().map(|(gva, access)| json!({"address": gva, "access": access})).collect();
    let folder = tempfile::tempdir()?;
    let input = folder.path().join("questions");
    std::fs::write(&input, serde_json::to_string(&asked)?)?;
    let mut python = Command::new("python3");
    python.args(["-c", PYTHON, &daemon.address]).stdin(std::fs::File::open(input)?);
    python.env("PYTHONPATH", concat!(env!("CARGO_MANIFEST_DIR"), "/../client/python/src"));
    let by_python = output(&mut python);
    assert_eq!(by_python.lines().count(), questions.len());

    let (mut mapped, mut faults) = (0, 0);
    for ((gva, access), by_python) in questions.iter().zip(by_python.lines()) {
        let request = json!({
            "address": {"text": format!("{gva:#x}")},
            "access": {"kind": format!("ACCESS_KIND_{}", access.to_uppercase())},
            "explain": true,
        });
        let method = "pagewalk.v1.TranslationService/Translate";
        let by_grpcurl = output(&mut grpcurl(&daemon, &["-d", &request.to_string(), method]));
        let mut by_command = Command::new(&pagewalk);
        by_command.args(["--addr", &daemon.address, "--json", "translate", "--explain", "--access", access]);
        let by_command = run(by_command.arg(format!("{gva:#x}")));
        let answers = [&by_grpcurl, &by_command.out, by_python].map(|text| -> Value {
            let mut answer: Value = serde_json::from_str(text)
                .unwrap_or_else(|error| panic!("{error}: {text} {}", by_command.err));
            // Ages differ, and nothing else: Python's answer was made without it.
            answer.as_object_mut().unwrap().remove("provenance");
            answer
        });
        assert_eq!(answers[0], answers[1], "grpcurl and the command: {gva:#x} {access}");
        assert_eq!(answers[0], answers[2], "grpcurl and Python: {gva:#x} {access}");
        *(if answers[0]["translation"].is_object() { &mut mapped } else { &mut faults }) += 1;
    }
    assert_eq!((mapped, faults), (5, 5));
    println!(
        "grpcurl, pagewalk and Python: {} equal answers, {mapped} translations, {faults} faults",
        questions.len()
    );
    Ok(())
}

/// What Python makes of an nGPA, in the names of the contract's JSON.
const PYTHON_NESTED: &str = r#"
import json, sys
import pagewalk

SIZES = {1 << 12: "4K", 1 << 21: "2M", 1 << 30: "1G"}

def rights(of):
    return {name: True for name in ("read", "write", "user", "execute") if getattr(of, name)}

def document(found):
    if found.ok:
        answer = {"gpa": str(found.gpa), "pageSize": "PAGE_SIZE_UNPAGED", "effective": rights(found.rights),
                  "backing": "BACKING_" + found.backing.upper()}
        if found.page_size is not None:
            answer |= {"nestedGpa": str(found.address), "nestedPageSize": "PAGE_SIZE_" + SIZES[found.page_size]}
        if found.ept_type is not None:
            said = {"memoryType": "MEMORY_TYPE_" + found.ept_type.memory_type.upper()}
            answer["eptType"] = said | ({"ignorePat": True} if found.ept_type.ignore_pat else {})
        return {"translation": answer} | ({"identity": True} if found.identity else {})
    answer = {"kind": "FAULT_KIND_" + found.kind.upper(), "dimension": "DIMENSION_NESTED", "reason": found.reason}
    numbers = {"entryGpa": found.entry_gpa, "entry": found.entry, "nestedGpa": found.nested_gpa, "bits": found.bits}
    answer |= {name: str(value) for name, value in numbers.items() if value}
    answer |= {"level": found.level} if found.level else {}
    answer |= {} if found.exit_qualification is None else {"exitQualification": str(found.exit_qualification)}
    answer |= {} if found.exit_info_1 is None else {"exitInfo1": str(found.exit_info_1)}
    return {"fault": answer}

SECONDS = {"npt": pagewalk.Npt(ncr3=0x50000), "ept": pagewalk.Ept(eptp=0x5001e), "none": "none"}

with pagewalk.connect(sys.argv[1]) as client:
    for question in json.load(sys.stdin):
        state = pagewalk.WalkerOverride(second_dimension=SECONDS[question["second"]])
        found = client.translate_nested_gpa(
            question["address"], question["access"], phase=question["phase"], override=state, explain=True)
        print(json.dumps(document(found) | {"explanation": found.explanation}))
"#;

fn give_equal_nested_answers() -> Result<(), Failed> {
    let pagewalk = pagewalk();
    let daemon = Daemon::serve(&["--machine", "demo:plain"]);
    let mut questions = Vec::new();
    for second in ["npt", "ept", "none"] {
        for (ngpa, access, phase) in [
            (0x1_1000_u64, "write", "final"),
            (0x1_2000, "read", "final"),  // a hole
            (0x1_3000, "fetch", "final"), // read-only
            (0x1_3000, "write", "final"),
            (0x1_3000, "read", "table"),
            (0x20_0000, "read", "final"),          // huge
            (0x1_0000_0000_0000, "read", "final"), // too wide
        ] {
            questions.push((second, ngpa, access, phase));
        }
    }
    let asked: Vec<Value> = questions
        .iter()
        .map(|(second, ngpa, access, phase)| {
            json!({"second": second, "address": ngpa, "access": access, "phase": phase})
        })
        .collect();
    let folder = tempfile::tempdir()?;
    let input = folder.path().join("questions");
    std::fs::write(&input, serde_json::to_string(&asked)?)?;
    let mut python = Command::new("python3");
    python.args(["-c", PYTHON_NESTED, &daemon.address]).stdin(std::fs::File::open(input)?);
    python.env("PYTHONPATH", concat!(env!("CARGO_MANIFEST_DIR"), "/../client/python/src"));
    let by_python = output(&mut python);
    assert_eq!(by_python.lines().count(), questions.len());

    let (mut mapped, mut faults, mut identities) = (0, 0, 0);
    for ((second, ngpa, access, phase), by_python) in questions.iter().zip(by_python.lines()) {
        let (state, options): (Value, &[&str]) = match *second {
            "npt" => (json!({"npt": {"ncr3": "327680"}}), &["--ncr3", "0x50000"]),
            "ept" => (json!({"ept": {"eptp": "327710"}}), &["--eptp", "0x5001e"]),
            _ => (json!({"none": true}), &["--one-dimension"]),
        };
        let request = json!({
            "address": {"text": format!("{ngpa:#x}")},
            "access": {"kind": format!("ACCESS_KIND_{}", access.to_uppercase())},
            "phase": format!("NESTED_PHASE_{}", phase.to_uppercase()),
            "override": state,
            "explain": true,
        });
        let method = "pagewalk.v1.TranslationService/TranslateNestedGpa";
        let by_grpcurl = output(&mut grpcurl(&daemon, &["-d", &request.to_string(), method]));
        let mut by_command = Command::new(&pagewalk);
        by_command.args(["--addr", &daemon.address, "--json", "nested-gpa", "--explain", "--access", access]);
        let by_command = run(by_command.args(["--phase", phase]).args(options).arg(format!("{ngpa:#x}")));
        let answers = [&by_grpcurl, &by_command.out, by_python].map(|text| -> Value {
            let mut answer: Value = serde_json::from_str(text)
                .unwrap_or_else(|error| panic!("{error}: {text} {}", by_command.err));
            answer.as_object_mut().unwrap().remove("provenance");
            answer
        });
        assert_eq!(answers[0], answers[1], "grpcurl and the command: {second} {ngpa:#x} {access} {phase}");
        assert_eq!(answers[0], answers[2], "grpcurl and Python: {second} {ngpa:#x} {access} {phase}");
        match (answers[0]["identity"].is_boolean(), answers[0]["fault"].is_object()) {
            (true, _) => identities += 1,
            (_, true) => faults += 1,
            (..) => mapped += 1,
        }
    }
    // EPT without accessed and dirty bits reads a guest's tables, and NPT writes them.
    assert_eq!((mapped, faults, identities), (7, 7, 7));
    println!("grpcurl, pagewalk and Python: {} equal nested answers", questions.len());
    Ok(())
}
