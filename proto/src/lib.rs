//! The gRPC contract of pagewalk: messages, clients and servers, generated from `pagewalk/v1/*.proto`.
//!
//! The comments of the proto files are the documentation, here and over server reflection.

mod column;
mod number;
mod readable;

pub use column::{Column, WithColumn};
pub use number::{NumberError, number};
pub use readable::{readable, readable_lines, readable_within, steers};

pub mod v1 {
    //! Package `pagewalk.v1`.
    #![allow(
        missing_docs,
        unreachable_pub,
        rust_2018_idioms,
        clippy::all,
        rustdoc::all,
        reason = "generated"
    )]

    pub use crate::column::{BatchTranslateRequest, BatchTranslateResponse};

    include!(concat!(env!("OUT_DIR"), "/pagewalk.v1.rs"));
}

/// The contract as an encoded `google.protobuf.FileDescriptorSet`, with imports and comments.
pub const FILE_DESCRIPTOR_SET: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/descriptors.bin"));
