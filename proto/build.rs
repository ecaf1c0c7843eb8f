//! Compiles the contract without protoc, and keeps its comments for reflection.

use std::{env, error::Error, fs, path::PathBuf};

use prost::Message as _;
use prost_types::{FileDescriptorProto, FileDescriptorSet};

const FILES: [&str; 7] = [
    "pagewalk/v1/types.proto",
    "pagewalk/v1/translation.proto",
    "pagewalk/v1/walker.proto",
    "pagewalk/v1/mapping.proto",
    "pagewalk/v1/vcpu.proto",
    "pagewalk/v1/machine.proto",
    "pagewalk/v1/memory.proto",
];

/// Messages with a column, and the column: that field is no part of the generated struct, which is called `...Head`.
/// `src/column.rs` has the message.
const COLUMNS: [(&str, &str); 2] =
    [("BatchTranslateRequest", "addresses"), ("BatchTranslateResponse", "words")];

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo::rerun-if-changed=pagewalk");
    let mut descriptors = protox::Compiler::new(["."])?
        .include_imports(true)
        .include_source_info(true)
        .open_files(FILES)?
        .file_descriptor_set();
    let out = PathBuf::from(env::var_os("OUT_DIR").ok_or("OUT_DIR is not set")?);
    fs::write(out.join("descriptors.bin"), descriptors.encode_to_vec())?;
    let mut config = tonic_prost_build::configure();
    for (message, column) in COLUMNS {
        let head = head(&descriptors, message, column).ok_or_else(|| format!("no {column} in {message}"))?;
        descriptors.file.push(head);
        config = config.extern_path(format!(".pagewalk.v1.{message}"), format!("crate::column::{message}"));
    }
    config.compile_fds(descriptors)?;
    Ok(())
}

/// A file with a copy of `message` that lacks `column`.
fn head(descriptors: &FileDescriptorSet, message: &str, column: &str) -> Option<FileDescriptorProto> {
    let declares = |file: &&FileDescriptorProto| file.message_type.iter().any(|m| m.name() == message);
    let file = descriptors.file.iter().find(declares)?;
    let mut head = file.message_type.iter().find(|m| m.name() == message)?.clone();
    let at = head.field.iter().position(|field| field.name() == column)?;
    head.field.remove(at);
    head.name = Some(format!("{message}Head"));
    Some(FileDescriptorProto {
        name: Some(format!("{message}Head.proto")),
        message_type: vec![head],
        enum_type: Vec::new(),
        service: Vec::new(),
        source_code_info: None,
        ..file.clone()
    })
}
