//! A client for the pagewalk daemon: what does a guest virtual address mean right now, and if nothing, why not?
//!
//! [`Endpoint`] says where the daemon listens and how to speak to it, [`Client`] has one method per RPC of the contract
//! [`v1`], and [`Error`] says what kept an answer away and what to do about it. A fault of the guest is an answer, not an
//! error.
//!
//! ```no_run
//! # async fn example() -> Result<(), pagewalk_client::Error> {
//! use pagewalk_client::{Client, Endpoint, v1};
//!
//! let client = Client::connect(Endpoint::parse("127.0.0.1:50051")?).await?;
//! let answer = client
//!     .translate(v1::TranslateRequest {
//!         address: Some(v1::Address { value: Some(v1::address::Value::Number(0xffff_8000_0000_1234)) }),
//!         access: Some(v1::Access { kind: v1::AccessKind::Read.into(), ..Default::default() }),
//!         ..Default::default()
//!     })
//!     .await?;
//! # let _ = answer;
//! # Ok(())
//! # }
//! ```

mod answers;
pub mod cli;
mod client;
mod connection;
mod endpoint;
mod error;
mod image;
mod tls;
mod unix;

pub use answers::Answers;
pub use client::{Client, DEFAULT_DEADLINE};
pub use connection::{ConnectionError, Problem};
pub use endpoint::{DEFAULT_ADDRESS, Endpoint, EndpointError};
pub use error::{Error, Refusal};
pub use image::{SaveError, SavedImage};
pub use pagewalk_proto::{Column, v1};
pub use tls::{Identity, Tls};
pub use tonic::Code;
