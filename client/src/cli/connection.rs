//! Options that say where the daemon is and how to reach it.

use std::{path::PathBuf, time::Duration};

use clap::Args;

use crate::{Client, DEFAULT_ADDRESS, Endpoint, Error, Tls, endpoint::EndpointError};

#[derive(Debug, Args)]
#[command(next_help_heading = "Daemon")]
pub(super) struct ConnectionArgs {
    /// Where the daemon listens: HOST:PORT, http://HOST:PORT, https://HOST:PORT or unix:/PATH
    #[arg(
        long,
        global = true,
        value_name = "ADDRESS",
        env = "PAGEWALK_ADDR",
        hide_env_values = true,
        default_value = DEFAULT_ADDRESS
    )]
    addr: String,
    /// Speak TLS, and trust daemons certified by this authority (PEM)
    #[arg(long, global = true, value_name = "FILE", env = "PAGEWALK_TLS_CA", hide_env_values = true)]
    tls_ca: Option<PathBuf>,
    /// Client certificate for mutual TLS (PEM)
    #[arg(long, global = true, value_name = "FILE", env = "PAGEWALK_TLS_CERT", hide_env_values = true)]
    tls_cert: Option<PathBuf>,
    /// Private key of the client certificate (PEM)
    #[arg(long, global = true, value_name = "FILE", env = "PAGEWALK_TLS_KEY", hide_env_values = true)]
    tls_key: Option<PathBuf>,
    /// How long connecting may take, and then a call: 10s, 500ms, 2m, or seconds
    #[arg(long, global = true, value_name = "TIME", default_value = "10s", value_parser = duration)]
    timeout: Duration,
}

impl ConnectionArgs {
    pub(super) async fn connect(&self) -> Result<Client, Error> {
        Ok(Client::connect(self.endpoint()?).await?.with_deadline(self.timeout))
    }

    pub(super) fn endpoint(&self) -> Result<Endpoint, EndpointError> {
        let endpoint = Endpoint::parse(&self.addr)?.with_connect_timeout(self.timeout);
        let identity = match (&self.tls_cert, &self.tls_key) {
            (Some(certificate), Some(key)) => Some((certificate.as_path(), key.as_path())),
            (None, None) => None,
            (Some(_), None) => {
                return Err(missing("--tls-cert is given without --tls-key; they go together"));
            }
            (None, Some(_)) => {
                return Err(missing("--tls-key is given without --tls-cert; they go together"));
            }
        };
        match (&self.tls_ca, identity) {
            (None, None) => Ok(endpoint),
            (None, Some(_)) => Err(missing(
                "--tls-cert and --tls-key are given without --tls-ca: name the authority that certified the daemon",
            )),
            (Some(authority), identity) => Ok(endpoint.with_tls(Tls::from_files(authority, identity)?)),
        }
    }
}

fn missing(what: &str) -> EndpointError {
    EndpointError::Contradiction(what.into())
}

/// A span of time above 0 and up to a day.
pub(super) fn duration(text: &str) -> Result<Duration, String> {
    let unit_at = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (number, unit) = text.split_at(unit_at);
    let number: u64 = number.parse().map_err(|_| "write 10s, 500ms, 2m, or seconds".to_owned())?;
    let milliseconds = match unit {
        "ms" => Some(number),
        "" | "s" => number.checked_mul(1000),
        "m" => number.checked_mul(60_000),
        _ => return Err(format!("`{unit}` is no unit of time; write ms, s or m")),
    };
    match milliseconds {
        Some(0) => Err("it must be above 0".into()),
        Some(milliseconds @ ..=86_400_000) => Ok(Duration::from_millis(milliseconds)),
        _ => Err("it must not be above a day".into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spans_of_time() {
        for (text, milliseconds) in [("10", 10_000), ("10s", 10_000), ("500ms", 500), ("2m", 120_000)] {
            assert_eq!(duration(text), Ok(Duration::from_millis(milliseconds)), "{text}");
        }
        for (text, reason) in [
            ("", "write 10s"),
            ("s", "write 10s"),
            ("-1", "write 10s"),
            ("1h", "no unit"),
            ("0", "above 0"),
            ("2000m", "above a day"),
            ("18446744073709551615m", "above a day"),
            ("99999999999999999999", "write 10s"),
        ] {
            assert!(duration(text).is_err_and(|error| error.contains(reason)), "{text}");
        }
    }
}
