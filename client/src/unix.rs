//! Connections by Unix socket.

use std::io;
use std::path::PathBuf;

use hyper_util::rt::TokioIo;
use socket2::SockRef;
use tokio::net::UnixStream;
use tonic::transport::{Channel, Endpoint, Error};
use tower::service_fn;

/// What a socket holds that the daemon has not read: as much as anybody may ask for by default. The kernel takes it twice, for
/// what it needs itself; of its own accord it gives half, and the two ends of a batch would wait for one another twice as often.
const SEND_BUFFER: usize = 212_992;

/// Connects to the socket at `path`.
pub(crate) async fn connect(transport: &Endpoint, path: PathBuf) -> Result<Channel, Error> {
    let connector = service_fn(move |_| {
        let path = path.clone();
        async move {
            let stream = UnixStream::connect(path).await?;
            // With less, it is as it was.
            let _ = SockRef::from(&stream).set_send_buffer_size(SEND_BUFFER);
            Ok::<_, io::Error>(TokioIo::new(stream))
        }
    });
    transport.connect_with_connector(connector).await
}
