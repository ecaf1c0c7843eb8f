//! The contract's shape, held against a committed file, so that a change of it is seen in review.

#![allow(clippy::unwrap_used, reason = "writing to a String cannot fail")]

use std::{env, fmt::Write as _, fs, path::Path};

use prost::Message as _;
use prost_types::{
    DescriptorProto, EnumDescriptorProto, FieldDescriptorProto, FileDescriptorProto, FileDescriptorSet,
    MethodDescriptorProto, ServiceDescriptorProto,
    field_descriptor_proto::{Label, Type},
};

const BLESS: &str = "PAGEWALK_BLESS";

#[test]
fn shape_is_the_committed_one() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("descriptor.golden");
    let set = FileDescriptorSet::decode(pagewalk_proto::FILE_DESCRIPTOR_SET).expect("own descriptors decode");
    let mut actual = String::new();
    for file in set.file.iter().filter(|file| file.package() == "pagewalk.v1") {
        render_file(&mut actual, file);
    }
    if env::var_os(BLESS).is_some() {
        fs::write(&path, &actual).expect("the golden file can be written");
        return;
    }
    let committed = fs::read_to_string(&path).expect("the golden file can be read");
    if let Some((line, (was, is))) = committed
        .lines()
        .map(Some)
        .chain(std::iter::repeat(None))
        .zip(actual.lines().map(Some).chain(std::iter::repeat(None)))
        .take_while(|pair| *pair != (None, None))
        .enumerate()
        .find(|(_, (was, is))| was != is)
    {
        panic!(
            "the contract's shape has changed, first in line {} of {}:\n  was {}\n  is  {}\n\
             If that is meant, run with {BLESS}=1 and commit the file.",
            line + 1,
            path.display(),
            was.unwrap_or("(end)"),
            is.unwrap_or("(end)"),
        );
    }
}

fn render_file(out: &mut String, file: &FileDescriptorProto) {
    writeln!(out, "file {}", file.name()).unwrap();
    file.service.iter().for_each(|service| render_service(out, service));
    file.message_type.iter().for_each(|message| render_message(out, message, ""));
    file.enum_type.iter().for_each(|declared| render_enum(out, declared, ""));
}

fn render_service(out: &mut String, service: &ServiceDescriptorProto) {
    writeln!(out, "service {}", service.name()).unwrap();
    for method in &service.method {
        writeln!(out, "  {}", method_line(method)).unwrap();
    }
}

fn method_line(method: &MethodDescriptorProto) -> String {
    let stream = |streams: bool| if streams { "stream " } else { "" };
    format!(
        "{}({}{}) -> {}{}",
        method.name(),
        stream(method.client_streaming()),
        short(method.input_type()),
        stream(method.server_streaming()),
        short(method.output_type()),
    )
}

fn render_message(out: &mut String, message: &DescriptorProto, scope: &str) {
    let name = format!("{scope}{}", message.name());
    writeln!(out, "message {name}").unwrap();
    for field in &message.field {
        writeln!(out, "  {}", field_line(message, field)).unwrap();
    }
    let scope = format!("{name}.");
    message.nested_type.iter().for_each(|nested| render_message(out, nested, &scope));
    message.enum_type.iter().for_each(|nested| render_enum(out, nested, &scope));
}

fn field_line(message: &DescriptorProto, field: &FieldDescriptorProto) -> String {
    let kind = match field.r#type() {
        Type::Message | Type::Enum => short(field.type_name()).to_owned(),
        scalar => scalar.as_str_name().trim_start_matches("TYPE_").to_lowercase(),
    };
    let prefix = if field.label() == Label::Repeated {
        "repeated "
    } else if field.proto3_optional() {
        "optional "
    } else {
        ""
    };
    // An optional field sits in a oneof of its own, which the source does not show.
    let oneof = match field.oneof_index {
        Some(index) if !field.proto3_optional() => {
            let index = usize::try_from(index).expect("oneof indices are positive");
            format!(" (oneof {})", message.oneof_decl[index].name())
        }
        _ => String::new(),
    };
    format!("{} = {prefix}{kind} {}{oneof}", field.number(), field.name())
}

fn render_enum(out: &mut String, declared: &EnumDescriptorProto, scope: &str) {
    writeln!(out, "enum {scope}{}", declared.name()).unwrap();
    for value in &declared.value {
        writeln!(out, "  {} = {}", value.number(), value.name()).unwrap();
    }
}

fn short(name: &str) -> &str {
    name.trim_start_matches(".pagewalk.v1.").trim_start_matches('.')
}
