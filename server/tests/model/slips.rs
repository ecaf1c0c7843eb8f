//! The slips that the model has to notice, each built into a copy of the files that it is about.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::Instant;

use libtest_mimic::Failed;

pub(crate) struct Slip {
    what: &'static str,
    file: &'static str,
    from: &'static str,
    to: &'static str,
}

pub(crate) const SLIPS: &[Slip] = &[
    Slip {
        what: "a ticket is announced before its snapshot is stored",
        file: "publication.rs",
        from: "        published.latest.store(snapshot);\n",
        to: "        self.served.send_if_modified(|served| std::mem::replace(served, ticket) != ticket);
        published.latest.store(snapshot);\n",
    },
    Slip {
        what: "a generation is announced before its snapshot is stored",
        file: "publication.rs",
        from: "        published.latest.store(snapshot);\n",
        to: "        if let Some(generation) = generation { self.generation.send_replace(generation); }
        published.latest.store(snapshot);\n",
    },
    Slip {
        what: "the thread is kicked before the ticket is drawn",
        file: "publication.rs",
        from: "        let ticket = self.draw_ticket();\n        kicker.kick();\n",
        to: "        kicker.kick();\n        let ticket = self.draw_ticket();\n",
    },
    Slip {
        what: "kicks are acknowledged after the tickets are read",
        file: "publication.rs",
        from: "        (!stopped).then(|| self.tickets.load(Ordering::Acquire))\n",
        to: "        let ticket = self.tickets.load(Ordering::Acquire);
        on_thread.acknowledge();
        let stopped = stopped || self.stop.load(Ordering::Acquire);
        (!stopped).then_some(ticket)\n",
    },
    Slip {
        what: "kicks are acknowledged after the order to stop was looked for",
        file: "publication.rs",
        from: "        on_thread.acknowledge();\n        let stopped = self.stop.load(Ordering::Acquire);\n",
        to: "        let stopped = self.stop.load(Ordering::Acquire);\n        on_thread.acknowledge();\n",
    },
    Slip {
        what: "a kick that joins another publishes nothing",
        file: "kick.rs",
        from: "self.pending.swap(true, Ordering::AcqRel)",
        to: "self.pending.swap(true, Ordering::Relaxed)",
    },
    Slip {
        what: "an acknowledged kick shows nothing of what came before it",
        file: "kick.rs",
        from: "self.kicker.pending.swap(false, Ordering::AcqRel)",
        to: "self.kicker.pending.swap(false, Ordering::Relaxed)",
    },
    Slip {
        what: "a kick stays pending",
        file: "kick.rs",
        from: "        self.kicker.pending.swap(false, Ordering::AcqRel);\n",
        to: "",
    },
    Slip {
        what: "a kick reaches nobody",
        file: "kick.rs",
        from: "            target.reach();\n",
        to: "            let _ = target;\n",
    },
];

pub(crate) fn judge() -> Result<(), Failed> {
    let started = Instant::now();
    let copy = Copy::new()?;
    let unchanged = copy.run()?;
    if !unchanged.status.success() {
        return Err(format!("the protocol itself does not pass: {}", text(&unchanged)).into());
    }
    let mut missed = 0;
    for slip in SLIPS {
        copy.change(slip)?;
        let run = copy.run()?;
        copy.restore(slip)?;
        let output = text(&run);
        // Loom's own words for a deadlock, or the assertion's.
        let said = output.lines().find(|line| {
            ["deadlock", "is older than", "were read before", "announced that is not", "Model exceeded"]
                .iter()
                .any(|words| line.contains(words))
        });
        let caught = !run.status.success() && said.is_some();
        missed += u32::from(!caught);
        println!(
            "  {:<64} {}",
            slip.what,
            if caught { said.unwrap_or_default().trim() } else { "NOT NOTICED" }
        );
        if run.status.success() != caught && !caught {
            println!("{output}");
        }
    }
    let seconds = started.elapsed().as_secs_f64();
    println!("judge loom-slips: {} cases, {missed} disagreements, {seconds:.1} s", SLIPS.len());
    if missed > 0 { Err(format!("{missed} slips were not noticed").into()) } else { Ok(()) }
}

fn text(output: &Output) -> String {
    String::from_utf8_lossy(&[&output.stdout[..], &output.stderr[..]].concat()).into_owned()
}

/// The model and the files it is about, in a workspace of their own.
struct Copy(PathBuf);

impl Copy {
    fn new() -> Result<Copy, Failed> {
        let copy = Copy(Path::new(env!("CARGO_TARGET_TMPDIR")).join("model-slips"));
        let server = Path::new(env!("CARGO_MANIFEST_DIR"));
        for folder in ["src/vcpu", "tests/model"] {
            fs::create_dir_all(copy.0.join(folder))?;
        }
        for file in fs::read_dir(server.join("tests/model"))? {
            let file = file?;
            fs::copy(file.path(), copy.0.join("tests/model").join(file.file_name()))?;
        }
        for file in ["kick.rs", "publication.rs"] {
            fs::copy(server.join("src/vcpu").join(file), copy.0.join("src/vcpu").join(file))?;
        }
        fs::write(copy.0.join("src/lib.rs"), "")?;
        fs::write(copy.0.join("Cargo.toml"), MANIFEST)?;
        // The lock file has the versions.
        fs::copy(server.join("../Cargo.lock"), copy.0.join("Cargo.lock"))?;
        Ok(copy)
    }

    fn change(&self, slip: &Slip) -> Result<(), Failed> {
        let path = self.0.join("src/vcpu").join(slip.file);
        let source = fs::read_to_string(&path)?;
        let occurrences = source.matches(slip.from).count();
        if occurrences != 1 {
            return Err(format!(
                "slip \"{}\": {} has {occurrences} of `{}`; say in tests/model/slips.rs how it is written now",
                slip.what, slip.file, slip.from
            )
            .into());
        }
        Ok(fs::write(path, source.replace(slip.from, slip.to))?)
    }

    fn restore(&self, slip: &Slip) -> Result<(), Failed> {
        let original = fs::read(Path::new(env!("CARGO_MANIFEST_DIR")).join("src/vcpu").join(slip.file))?;
        Ok(fs::write(self.0.join("src/vcpu").join(slip.file), original)?)
    }

    /// Builds the copy, which must succeed, and runs the model on it.
    fn run(&self) -> Result<Output, Failed> {
        let cargo = |arguments: &[&str]| {
            let mut command = Command::new(env!("CARGO"));
            command.args(["test", "--quiet", "--offline", "--test", "model"]).args(arguments);
            command.current_dir(&self.0).env("CARGO_TARGET_DIR", self.0.join("target")).output()
        };
        let built = cargo(&["--no-run"])?;
        if !built.status.success() {
            return Err(format!("the model does not build: {}", text(&built)).into());
        }
        Ok(cargo(&["--", "the_protocol_holds"])?)
    }
}

const MANIFEST: &str = r#"
[workspace]

[package]
name = "pagewalk-model"
version = "0.0.0"
edition = "2024"

[dev-dependencies]
libtest-mimic = "0.8"
loom = "0.7"

[[test]]
name = "model"
harness = false

[profile.dev]
debug = false
opt-level = 2
"#;
