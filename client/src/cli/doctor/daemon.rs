//! The daemon: whether it can be reached, says that it serves, is of our version, and has machines.

use super::check::Report;
use crate::{
    Code, Endpoint, Error,
    cli::{connection::ConnectionArgs, render},
    v1::{ListMachinesRequest, ListMachinesResponse, MachineState},
};

const OURS: &str = env!("CARGO_PKG_VERSION");

pub(super) async fn examine(report: &mut Report, endpoint: Endpoint, connection: &ConnectionArgs) {
    let at = endpoint.to_string();
    let client = match connection.connect().await {
        Ok(client) => client,
        Err(error) => return unreachable(report, &error),
    };
    match client.is_serving().await {
        Ok(serving) => {
            let how = if endpoint.is_tls() { "over TLS" } else { "in plain text" };
            report.ok("daemon", format!("reached at {at}, {how}"));
            if serving {
                report.ok("health", "serving");
            } else {
                report.fail(
                    "health",
                    "not serving",
                    "the daemon starts or stops; ask again, and see its log",
                );
            }
        }
        Err(Error::Refused(refusal)) if refusal.code == Code::Unimplemented => {
            report.fail(
                "daemon",
                format!("what listens at {at} speaks gRPC and knows no health service"),
                "check the address: it may be another service",
            );
            return;
        }
        Err(error) => return unreachable(report, &error),
    }
    match client.list_machines(ListMachinesRequest {}).await {
        Ok(answer) => serves(report, &answer),
        Err(error) => report.fail(
            "machines",
            error.to_string(),
            "check that it is a pagewalk daemon, of a version near this client's",
        ),
    }
}

fn unreachable(report: &mut Report, error: &Error) {
    match error {
        Error::Connection(connection) => report.fail(
            "daemon",
            format!("not reached at {} ({})", connection.endpoint, connection.cause),
            connection.problem.advice(),
        ),
        other => report.fail("daemon", other.to_string(), "see the daemon's log"),
    }
}

fn serves(report: &mut Report, answer: &ListMachinesResponse) {
    match answer.daemon_version.as_str() {
        OURS => report.ok("version", format!("{OURS}, client and daemon")),
        "" => report.warn(
            "version",
            format!("the daemon tells none, the client is {OURS}"),
            "update the daemon",
        ),
        theirs => report.warn(
            "version",
            format!("the daemon is {theirs}, the client {OURS}"),
            "use both of one release where something does not fit",
        ),
    }
    if answer.machines.is_empty() {
        report.warn("machines", "none", "start the daemon with one: pagewalkd serve --machine demo");
    }
    for machine in &answer.machines {
        if machine.state() == MachineState::Lost {
            report.fail(
                "machine",
                format!("{} is LOST: {}", machine.id, machine.state_reason),
                "detach it, and attach it again once it is back",
            );
            continue;
        }
        report.ok(
            "machine",
            format!(
                "{}, source {}, {}: {}",
                machine.id,
                machine.source,
                render::machine::vcpus(machine.vcpus),
                machine.description
            ),
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::v1::Machine;

    #[test]
    fn a_lost_machine_is_a_failure() {
        let lost = Machine {
            id: "vm".into(),
            state: MachineState::Lost.into(),
            state_reason: "QEMU has ended".into(),
            ..Machine::default()
        };
        let mut report = Report::default();
        let answer = ListMachinesResponse {
            machines: vec![lost],
            daemon_version: OURS.into(),
            ..ListMachinesResponse::default()
        };
        serves(&mut report, &answer);
        assert!(report.has_failed());
        assert!(report.text().contains("vm is LOST: QEMU has ended: detach it"), "{}", report.text());
    }
}
