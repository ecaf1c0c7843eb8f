//! TCP.

use std::net::SocketAddr;

use tokio::net::TcpListener;

use super::ListenError;

/// Binds `address`, which must be loopback unless clients have to authenticate themselves.
pub(crate) async fn bind(address: SocketAddr, authenticated: bool) -> Result<TcpListener, ListenError> {
    if !authenticated && !address.ip().to_canonical().is_loopback() {
        return Err(ListenError::NeedsTls(address));
    }
    TcpListener::bind(address).await.map_err(|problem| ListenError::Bind { address, problem })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[tokio::test]
    async fn only_loopback_without_tls() {
        for address in ["0.0.0.0:0", "[::]:0", "192.0.2.1:0", "[::ffff:192.0.2.1]:0"] {
            let refused = bind(address.parse().unwrap(), false).await.unwrap_err();
            assert!(matches!(refused, ListenError::NeedsTls(_)), "{address}");
            assert!(refused.to_string().contains("--tls-cert"), "{refused}");
        }
        for address in ["127.0.0.1:0", "127.9.9.9:0"] {
            assert!(bind(address.parse().unwrap(), false).await.is_ok(), "{address}");
        }
    }
}
