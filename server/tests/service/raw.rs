//! A gRPC client without a timer of its own: tonic's would race the daemon's.

use std::net::SocketAddr;

use prost::Message;
use prost::bytes::Bytes;
use tokio::net::TcpStream;
use tonic::Status;

/// Calls `method` with `timeout` as its deadline, and gives the status of an answer that has nothing else.
pub(crate) async fn call(address: SocketAddr, method: &str, timeout: &str, request: &impl Message) -> Status {
    call_with(address, &format!("pagewalk.v1.{method}"), timeout, &request.encode_to_vec()).await
}

pub(crate) async fn call_with(address: SocketAddr, method: &str, timeout: &str, message: &[u8]) -> Status {
    let (answer, _) = exchange(address, method, timeout, message).await;
    Status::from_header_map(&answer).expect("a status in the headers")
}

/// Calls `method` with an encoded message that a generated client would not send.
pub(crate) async fn answer<M: Message + Default>(
    address: SocketAddr,
    method: &str,
    message: &[u8],
) -> Result<M, Status> {
    let (headers, body) = exchange(address, &format!("pagewalk.v1.{method}"), "20S", message).await;
    match Status::from_header_map(&headers) {
        Some(status) => Err(status),
        None => Ok(M::decode(&body[5..]).expect("a message")),
    }
}

async fn exchange(
    address: SocketAddr,
    method: &str,
    timeout: &str,
    message: &[u8],
) -> (http::HeaderMap, Vec<u8>) {
    let mut builder = h2::client::Builder::new();
    builder.initial_window_size(16 << 20).initial_connection_window_size(16 << 20);
    let (mut client, connection) =
        builder.handshake::<_, Bytes>(TcpStream::connect(address).await.unwrap()).await.unwrap();
    let connection = tokio::spawn(connection);
    let head = http::Request::post(format!("http://{address}/{method}"))
        .header("content-type", "application/grpc")
        .header("te", "trailers")
        .header("grpc-timeout", timeout)
        .body(())
        .unwrap();
    let (answer, mut body) = client.send_request(head, false).unwrap();
    let length = u32::try_from(message.len()).unwrap().to_be_bytes();
    body.send_data([&[0], length.as_slice(), message].concat().into(), true).unwrap();
    let (head, mut body) = answer.await.unwrap().into_parts();
    let mut received = Vec::new();
    while let Some(data) = body.data().await {
        received.extend_from_slice(&data.unwrap());
    }
    connection.abort();
    (head.headers, received)
}
