//! Bytes that are no gRPC: the connection ends, and nobody else notices.

use std::io::{ErrorKind, Read as _, Write as _};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use crate::bed::{Bed, SOON};

const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

fn dial(address: SocketAddr) -> TcpStream {
    let stream = TcpStream::connect(address).unwrap();
    stream.set_read_timeout(Some(SOON)).unwrap();
    stream.set_write_timeout(Some(SOON)).unwrap();
    stream
}

/// Sends `bytes` and reads until the daemon closes.
fn exchange(address: SocketAddr, bytes: &[u8]) -> Vec<u8> {
    let mut stream = dial(address);
    // The daemon may close before everything is sent.
    let _ = stream.write_all(bytes);
    let _ = stream.shutdown(Shutdown::Write);
    let mut answer = Vec::new();
    match stream.read_to_end(&mut answer) {
        Ok(_) => {}
        Err(error) => {
            assert!(matches!(error.kind(), ErrorKind::ConnectionReset | ErrorKind::BrokenPipe), "{error}");
        }
    }
    answer
}

/// xorshift: garbage that is the same in each run.
struct Garbage(u64);

impl Garbage {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn bytes(&mut self, count: usize) -> Vec<u8> {
        (0..count).map(|_| self.next() as u8).collect()
    }

    /// An HTTP/2 frame with a sound length, and nothing else that is sound.
    fn frame(&mut self) -> Vec<u8> {
        let length = (self.next() % 64) as usize;
        let mut frame = vec![0, 0, length as u8, (self.next() % 12) as u8, self.next() as u8];
        frame.extend((self.next() as u32 & 0x7fff_ffff).to_be_bytes());
        frame.extend(self.bytes(length));
        frame
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ten_thousand_garbage_frames() {
    let bed = Bed::plain().await;
    let address = bed.address;
    let connections = tokio::task::spawn_blocking(move || {
        let mut garbage = Garbage(0x9e37_79b9_7f4a_7c15);
        let (mut frames, mut connections) = (0, 0);
        let start = Instant::now();
        while frames < 10_000 {
            let mut bytes = PREFACE.to_vec();
            // A sound SETTINGS frame in half of the connections, so that frames get further.
            if connections % 2 == 0 {
                bytes.extend([0, 0, 0, 4, 0, 0, 0, 0, 0]);
            }
            let count = 1 + garbage.next() as usize % 50;
            (0..count).for_each(|_| bytes.extend(garbage.frame()));
            exchange(address, &bytes);
            frames += count;
            connections += 1;
            assert!(start.elapsed() < Duration::from_secs(60), "{frames} frames");
        }
        for length in [1, 9, 23, 24, 100, 10_000, 1 << 20] {
            exchange(address, &garbage.bytes(length));
            exchange(address, &[PREFACE, &garbage.bytes(length)].concat());
        }
        connections
    });
    assert!(connections.await.unwrap() > 100);
    bed.unharmed().await;
    bed.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn other_protocols() {
    let bed = Bed::plain().await;
    let address = bed.address;
    tokio::task::spawn_blocking(move || {
        for request in [
            b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n".as_slice(),
            b"POST /pagewalk.v1.TranslationService/Translate HTTP/1.1\r\nContent-Length: 0\r\n\r\n",
            // The beginning of a TLS ClientHello.
            b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
            b"SSH-2.0-OpenSSH_9.2\r\n",
            b"",
        ] {
            exchange(address, request);
        }
    })
    .await
    .unwrap();
    bed.unharmed().await;
    bed.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn connections_that_stay_silent() {
    let bed = Bed::plain().await;
    let half_open: Vec<TcpStream> = (0..100)
        .map(|number| {
            let mut stream = dial(bed.address);
            // Nothing at all, a part of the preface, the preface alone, and a frame that never ends.
            match number % 4 {
                0 => {}
                1 => stream.write_all(&PREFACE[..10]).unwrap(),
                2 => stream.write_all(PREFACE).unwrap(),
                _ => stream.write_all(&[PREFACE, &[0, 0, 6, 4, 0, 0, 0, 0, 0, 1]].concat()).unwrap(),
            }
            stream
        })
        .collect();
    bed.unharmed().await;
    drop(half_open);
    bed.unharmed().await;
    bed.stop().await;
}
