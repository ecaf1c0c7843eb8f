//! A gRPC client without a timer of its own: tonic's would race the daemon's.

use std::net::SocketAddr;

use prost::Message;
use tokio::net::TcpStream;
use tonic::Status;

/// Calls `method` with `timeout` as its deadline, and gives the status of an answer that has nothing else.
pub(crate) async fn call(address: SocketAddr, method: &str, timeout: &str, request: &impl Message) -> Status {
    call_with(address, &format!("pagewalk.v1.{method}"), timeout, &request.encode_to_vec()).await
}

pub(crate) async fn call_with(address: SocketAddr, method: &str, timeout: &str, message: &[u8]) -> Status {
    let (mut client, connection) =
        h2::client::handshake(TcpStream::connect(address).await.unwrap()).await.unwrap();
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
    let answer = answer.await.unwrap();
    connection.abort();
    Status::from_header_map(answer.headers()).expect("a status in the headers")
}
