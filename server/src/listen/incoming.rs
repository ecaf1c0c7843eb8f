//! Accepted connections, bounded in number, in how long they may stay silent at first, and in how long they may leave an answer
//! unread.
//!
//! tonic accepts whatever comes, tries again at once when the process is out of file descriptors, and gives a client that
//! never says a word, or reads none, all the time in the world. The TLS handshake has a bound of its own.

use std::io::{self, IoSlice};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::{Sleep, sleep};
use tokio_stream::Stream;
use tonic::transport::server::Connected;

use crate::layer::{LOOK, Line, Peer};

/// Connections that one address or socket may have open. Each costs a file descriptor, of which processes commonly have
/// 1024.
const CONNECTIONS: usize = 400;
/// How long accepting rests after it failed: file descriptors do not come back at once.
const REST: Duration = Duration::from_millis(100);
/// What a client says first, HTTP/2's preface or a TLS ClientHello, is at least this long, and is there soon.
const HELLO: usize = 24;
const HELLO_BOUND: Duration = Duration::from_secs(10);

/// The connections to one address or socket.
pub(crate) struct Incoming<S> {
    accepted: S,
    places: Arc<Semaphore>,
    rest: Option<Pin<Box<Sleep>>>,
    hello_bound: Duration,
}

impl<S> Incoming<S> {
    pub(crate) fn new(accepted: S) -> Self {
        Self { accepted, places: Arc::new(Semaphore::new(CONNECTIONS)), rest: None, hello_bound: HELLO_BOUND }
    }
}

impl<S, IO> Stream for Incoming<S>
where
    S: Stream<Item = io::Result<IO>> + Unpin,
{
    type Item = io::Result<Connection<IO>>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        loop {
            if let Some(rest) = &mut self.rest {
                ready!(rest.as_mut().poll(context));
                self.rest = None;
            }
            match ready!(Pin::new(&mut self.accepted).poll_next(context)) {
                None => return Poll::Ready(None),
                Some(Err(error)) => {
                    tracing::debug!(%error, "cannot accept a connection");
                    self.rest = Some(Box::pin(sleep(REST)));
                }
                Some(Ok(io)) => match Arc::clone(&self.places).try_acquire_owned() {
                    Ok(place) => {
                        let hello = Hello { missing: HELLO, bound: Box::pin(sleep(self.hello_bound)) };
                        let connection = Connection {
                            io,
                            hello: Some(hello),
                            line: Line::new(),
                            look: Box::pin(sleep(LOOK)),
                            _place: place,
                        };
                        return Poll::Ready(Some(Ok(connection)));
                    }
                    // Dropped, and thus closed: the client is told at once.
                    Err(_) => tracing::debug!("too many connections: one is refused"),
                },
            }
        }
    }
}

/// A connection, with its place among those that there may be.
pub(crate) struct Connection<IO> {
    io: IO,
    /// Until the client has said enough.
    hello: Option<Hello>,
    line: Line,
    /// When it is looked next whether the client reads.
    look: Pin<Box<Sleep>>,
    _place: OwnedSemaphorePermit,
}

impl<IO> Connection<IO> {
    /// Fails once an answer has waited for the client for too long.
    fn look(&mut self, context: &mut Context<'_>) -> io::Result<()> {
        while self.look.as_mut().poll(context).is_ready() {
            if self.line.is_stalled() {
                tracing::debug!("a client does not read its answers: its connection ends");
                return Err(io::ErrorKind::TimedOut.into());
            }
            let next = self.look.deadline() + LOOK;
            self.look.as_mut().reset(next);
        }
        Ok(())
    }
}

struct Hello {
    missing: usize,
    bound: Pin<Box<Sleep>>,
}

impl<IO: Connected> Connected for Connection<IO> {
    type ConnectInfo = Peer<IO::ConnectInfo>;

    fn connect_info(&self) -> Self::ConnectInfo {
        Peer { info: self.io.connect_info(), line: self.line.clone() }
    }
}

impl<IO: AsyncRead + Unpin> AsyncRead for Connection<IO> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        self.look(context)?;
        let before = buffer.filled().len();
        let read = Pin::new(&mut self.io).poll_read(context, buffer);
        let Some(hello) = &mut self.hello else { return read };
        let count = buffer.filled().len() - before;
        if read.is_ready() && count >= hello.missing {
            self.hello = None;
            return read;
        }
        hello.missing = hello.missing.saturating_sub(count);
        if hello.bound.as_mut().poll(context).is_ready() {
            return Poll::Ready(Err(io::ErrorKind::TimedOut.into()));
        }
        read
    }
}

impl<IO: AsyncWrite + Unpin> AsyncWrite for Connection<IO> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.look(context)?;
        Pin::new(&mut self.io).poll_write(context, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.look(context)?;
        Pin::new(&mut self.io).poll_write_vectored(context, slices)
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(context)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::collections::VecDeque;

    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, DuplexStream, duplex};
    use tokio_stream::StreamExt as _;

    use super::*;

    fn incoming(
        accepted: impl IntoIterator<Item = io::Result<DuplexStream>>,
    ) -> Incoming<impl Stream<Item = io::Result<DuplexStream>> + Unpin> {
        Incoming::new(tokio_stream::iter(accepted.into_iter().collect::<VecDeque<_>>()))
    }

    #[tokio::test]
    async fn no_more_than_there_are_places() {
        let (clients, servers): (Vec<_>, Vec<_>) = (0..CONNECTIONS + 3).map(|_| duplex(64)).unzip();
        let mut incoming = incoming(servers.into_iter().map(Ok));
        let mut taken = Vec::new();
        while let Some(connection) = incoming.next().await {
            taken.push(connection.unwrap());
        }
        assert_eq!(taken.len(), CONNECTIONS);
        let mut refused = clients.into_iter().next_back().unwrap();
        assert_eq!(refused.read(&mut [0]).await.unwrap(), 0, "closed");
        drop(taken);
        assert_eq!(incoming.places.available_permits(), CONNECTIONS);
    }

    #[tokio::test]
    async fn rests_after_a_failure() {
        let (_client, server) = duplex(64);
        let mut incoming = incoming([Err(io::Error::from_raw_os_error(libc::EMFILE)), Ok(server)]);
        let start = tokio::time::Instant::now();
        assert!(incoming.next().await.unwrap().is_ok());
        assert!(start.elapsed() >= REST);
    }

    #[tokio::test]
    async fn silence_ends_it_and_words_do_not() {
        for (said, lives) in [(0, false), (HELLO - 1, false), (HELLO, true)] {
            let (mut client, server) = duplex(64);
            let mut incoming = incoming([Ok(server)]);
            incoming.hello_bound = Duration::from_millis(50);
            let mut connection = incoming.next().await.unwrap().unwrap();
            client.write_all(&vec![0; said]).await.unwrap();
            connection.read_exact(&mut vec![0; said]).await.unwrap();
            let patience = if lives { Duration::from_millis(200) } else { Duration::from_secs(20) };
            let more = tokio::time::timeout(patience, connection.read(&mut [0])).await;
            match more {
                Err(_) => assert!(lives, "{said}"),
                Ok(error) => {
                    assert_eq!((error.unwrap_err().kind(), lives), (io::ErrorKind::TimedOut, false));
                }
            }
        }
    }
}
