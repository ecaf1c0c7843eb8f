//! One line per check: what was looked at, how it stands, and what to do.

use pagewalk_proto::readable;
use serde_json::{Value, json};

use crate::cli::render::table::{Cell, Table};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Standing {
    Ok,
    Warn,
    Fail,
}

#[derive(Debug)]
struct Check {
    standing: Standing,
    subject: &'static str,
    finding: String,
    advice: Option<String>,
}

/// All checks, in order.
#[derive(Debug, Default)]
pub(super) struct Report {
    checks: Vec<Check>,
}

impl Report {
    pub(super) fn ok(&mut self, subject: &'static str, finding: impl Into<String>) {
        self.checks.push(Check { standing: Standing::Ok, subject, finding: finding.into(), advice: None });
    }

    /// Something is missing that some uses need.
    pub(super) fn warn(
        &mut self,
        subject: &'static str,
        finding: impl Into<String>,
        advice: impl Into<String>,
    ) {
        self.checks.push(Check {
            standing: Standing::Warn,
            subject,
            finding: finding.into(),
            advice: Some(advice.into()),
        });
    }

    /// Something does not work.
    pub(super) fn fail(
        &mut self,
        subject: &'static str,
        finding: impl Into<String>,
        advice: impl Into<String>,
    ) {
        self.checks.push(Check {
            standing: Standing::Fail,
            subject,
            finding: finding.into(),
            advice: Some(advice.into()),
        });
    }

    pub(super) fn has_failed(&self) -> bool {
        self.checks.iter().any(|check| check.standing == Standing::Fail)
    }

    pub(super) fn text(&self) -> String {
        let mut table = Table::default();
        for check in &self.checks {
            let finding = readable(&check.finding);
            let finding = match &check.advice {
                None => finding,
                Some(advice) => format!("{finding}: {}", readable(advice)),
            };
            table.row([
                match check.standing {
                    Standing::Ok => Cell::good("ok"),
                    Standing::Warn => Cell::warning("warn"),
                    Standing::Fail => Cell::bad("FAIL"),
                },
                check.subject.into(),
                finding.into(),
            ]);
        }
        table.render()
    }

    pub(super) fn json(&self) -> Value {
        let checks: Vec<Value> = self
            .checks
            .iter()
            .map(|check| {
                let standing = match check.standing {
                    Standing::Ok => "ok",
                    Standing::Warn => "warn",
                    Standing::Fail => "fail",
                };
                let mut value =
                    json!({ "standing": standing, "subject": check.subject, "finding": check.finding });
                if let Some(advice) = &check.advice {
                    value["advice"] = json!(advice);
                }
                value
            })
            .collect();
        json!({ "clientVersion": env!("CARGO_PKG_VERSION"), "failed": self.has_failed(), "checks": checks })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn advice_follows_the_finding_and_only_failures_fail() {
        let mut report = Report::default();
        report.ok("one", "is fine");
        report.warn("second", "is missing", "add it");
        assert!(!report.has_failed());
        report.fail("third", "is broken", "mend it");
        assert!(report.has_failed());
        assert_eq!(
            anstream::adapter::strip_str(&report.text()).to_string(),
            "ok    one     is fine\nwarn  second  is missing: add it\nFAIL  third   is broken: mend it"
        );
        let json = report.json();
        assert_eq!(json["failed"], true);
        assert_eq!(json["checks"][1]["advice"], "add it");
        assert_eq!(json["checks"][0].get("advice"), None);
    }
}
