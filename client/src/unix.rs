//! Connections by Unix socket.

use std::io;
use std::path::PathBuf;

use hyper_util::rt::TokioIo;
use socket2::SockRef;
use tokio::net::UnixStream;
use tonic::transport::{Channel, Endpoint, Error};
use tower::service_fn;

/// What a socket holds that the daemon has not read, which the kernel doubles for what it needs itself: as much as Linux lets
/// anybody ask for where nobody has set another bound. Of its own accord it gives half, and the two ends of a batch would wait
/// for one another twice as often.
const SEND_BUFFER: usize = 212_992;

/// Connects to the socket at `path`.
pub(crate) async fn connect(transport: &Endpoint, path: PathBuf) -> Result<Channel, Error> {
    let connector = service_fn(move |_| {
        let path = path.clone();
        async move {
            let stream = UnixStream::connect(path).await?;
            widen(&stream);
            Ok::<_, io::Error>(TokioIo::new(stream))
        }
    });
    transport.connect_with_connector(connector).await
}

/// Has the socket hold more, if it holds less.
fn widen(stream: &UnixStream) {
    let socket = SockRef::from(stream);
    // Where it cannot be had, it is as it was.
    if socket.send_buffer_size().is_ok_and(|size| size < 2 * SEND_BUFFER) {
        let _ = socket.set_send_buffer_size(SEND_BUFFER);
    }
}
