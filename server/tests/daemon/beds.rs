//! What a test may need of its machine. Where it is missing the test is skipped, and says so; where `PAGEWALK_REQUIRE`
//! names it, the test fails instead.

use std::fs::OpenOptions;
use std::process::{Command, ExitCode, Stdio};

use libtest_mimic::{Arguments, Failed, Trial};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Bed {
    Kvm,
    Netns,
    Grpcurl,
    Python,
    Openssl,
    Setpriv,
}

impl Bed {
    const ALL: [Self; 6] =
        [Self::Kvm, Self::Netns, Self::Grpcurl, Self::Python, Self::Openssl, Self::Setpriv];

    fn name(self) -> &'static str {
        match self {
            Self::Kvm => "kvm",
            Self::Netns => "netns",
            Self::Grpcurl => "grpcurl",
            Self::Python => "python",
            Self::Openssl => "openssl",
            Self::Setpriv => "setpriv",
        }
    }

    /// Why it is not here.
    fn missing(self) -> Option<String> {
        match self {
            Self::Kvm => {
                let open = OpenOptions::new().read(true).write(true).open("/dev/kvm");
                open.err().map(|error| format!("/dev/kvm: {error}"))
            }
            Self::Netns => {
                // Made and removed again: permission shows only in the doing.
                let name = format!("pagewalk-try-{}", std::process::id());
                let made = works("ip", &["netns", "add", &name]);
                works("ip", &["netns", "delete", &name]).and(made).err()
            }
            Self::Grpcurl => works("grpcurl", &["--version"]).err(),
            Self::Python => works("python3", &["-c", "import grpc, google.rpc.error_details_pb2"]).err(),
            Self::Openssl => works("openssl", &["version"]).err(),
            Self::Setpriv => {
                works("setpriv", &[&["--reuid=65534", "--clear-groups", "true"][..]].concat()).err()
            }
        }
    }
}

fn works(program: &str, arguments: &[&str]) -> Result<(), String> {
    let output = Command::new(program).args(arguments).stdin(Stdio::null()).output();
    let output = output.map_err(|error| format!("{program}: {error}"))?;
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr);
    Err(format!("{program} {}: {}", arguments.join(" "), said.lines().last().unwrap_or("no message")))
}

/// A test, and the beds that it needs.
pub(crate) type Test = (&'static str, &'static [Bed], fn() -> Result<(), Failed>);

pub(crate) fn main(tests: &[Test]) -> ExitCode {
    let mut arguments = Arguments::from_args();
    // One at a time: some measure time.
    arguments.test_threads.get_or_insert(1);
    let required = std::env::var("PAGEWALK_REQUIRE").unwrap_or_default();
    let required = |bed: Bed| required.split(',').any(|name| name.trim() == bed.name());
    let missing: Vec<(Bed, String)> = Bed::ALL
        .into_iter()
        .filter(|bed| tests.iter().any(|(_, needs, _)| needs.contains(bed)))
        .filter_map(|bed| Some((bed, bed.missing()?)))
        .collect();
    for (bed, reason) in missing.iter().filter(|(bed, _)| !required(*bed)) {
        println!("SKIPPED {}: {reason}", bed.name());
    }
    let mut trials: Vec<Trial> = tests
        .iter()
        .filter(|(_, needs, _)| missing.iter().all(|(bed, _)| !needs.contains(bed)))
        .map(|&(name, _, test)| Trial::test(name, test))
        .collect();
    trials.extend(missing.into_iter().filter(|(bed, _)| required(*bed)).map(|(bed, reason)| {
        let problem = format!("PAGEWALK_REQUIRE names {}: {reason}", bed.name());
        Trial::test(format!("bed_{}", bed.name()), move || Err(problem.into()))
    }));
    libtest_mimic::run(&arguments, trials).exit_code()
}
