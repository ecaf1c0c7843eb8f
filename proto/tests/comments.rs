//! Every element of the contract carries a comment: over server reflection they are the manual.

use std::collections::HashSet;

use prost::Message as _;
use prost_types::{DescriptorProto, EnumDescriptorProto, FileDescriptorProto, FileDescriptorSet};

// Field numbers in descriptor.proto, of which the paths in source information consist.
const FILE_MESSAGE: i32 = 4;
const FILE_ENUM: i32 = 5;
const FILE_SERVICE: i32 = 6;
const MESSAGE_FIELD: i32 = 2;
const MESSAGE_NESTED: i32 = 3;
const MESSAGE_ENUM: i32 = 4;
const MESSAGE_ONEOF: i32 = 8;
const ENUM_VALUE: i32 = 2;
const SERVICE_METHOD: i32 = 2;

/// An element's path in its file, with a name for people.
type Element = (Vec<i32>, String);

#[test]
fn every_element_has_a_comment() {
    let set = FileDescriptorSet::decode(pagewalk_proto::FILE_DESCRIPTOR_SET).expect("own descriptors decode");
    let mut seen = 0;
    let mut missing = Vec::new();
    for file in set.file.iter().filter(|file| file.package() == "pagewalk.v1") {
        let commented: HashSet<&[i32]> = file
            .source_code_info
            .iter()
            .flat_map(|info| &info.location)
            .filter(|location| !location.leading_comments().trim().is_empty())
            .map(|location| location.path.as_slice())
            .collect();
        for (path, name) in elements(file) {
            seen += 1;
            if !commented.contains(path.as_slice()) {
                missing.push(format!("{}: {name}", file.name()));
            }
        }
    }
    assert!(seen > 600, "only {seen} elements seen: the descriptors are not the contract's");
    assert!(missing.is_empty(), "no comment:\n{}", missing.join("\n"));
}

#[test]
fn every_rpc_names_its_role() {
    let set = FileDescriptorSet::decode(pagewalk_proto::FILE_DESCRIPTOR_SET).expect("own descriptors decode");
    let mut seen = 0;
    for file in set.file.iter().filter(|file| file.package() == "pagewalk.v1") {
        let locations = file.source_code_info.iter().flat_map(|info| &info.location);
        for location in
            locations.filter(|location| matches!(location.path[..], [FILE_SERVICE, _, SERVICE_METHOD, _]))
        {
            seen += 1;
            let comment = location.leading_comments();
            assert!(
                ["Role: `read`", "Role: `control`"].iter().any(|role| comment.contains(role)),
                "{}: an RPC without a role:\n{comment}",
                file.name(),
            );
        }
    }
    let services =
        set.file.iter().filter(|file| file.package() == "pagewalk.v1").flat_map(|file| &file.service);
    let rpcs: usize = services.map(|service| service.method.len()).sum();
    assert_eq!(seen, rpcs, "RPCs with a comment, and all of them");
}

fn elements(file: &FileDescriptorProto) -> Vec<Element> {
    let mut found = Vec::new();
    for (service, index) in file.service.iter().zip(0..) {
        found.push((vec![FILE_SERVICE, index], service.name().to_owned()));
        found.extend(service.method.iter().zip(0..).map(|(method, place)| {
            (
                vec![FILE_SERVICE, index, SERVICE_METHOD, place],
                format!("{}.{}", service.name(), method.name()),
            )
        }));
    }
    for (message, index) in file.message_type.iter().zip(0..) {
        add_message(&mut found, message, &[FILE_MESSAGE, index], "");
    }
    for (declared, index) in file.enum_type.iter().zip(0..) {
        add_enum(&mut found, declared, &[FILE_ENUM, index], "");
    }
    found
}

fn add_message(found: &mut Vec<Element>, message: &DescriptorProto, path: &[i32], scope: &str) {
    let name = format!("{scope}{}", message.name());
    found.push((path.to_vec(), name.clone()));
    for (field, index) in message.field.iter().zip(0..) {
        found.push((join(path, MESSAGE_FIELD, index), format!("{name}.{}", field.name())));
    }
    // An optional field sits in a oneof of its own, which the source does not show.
    let declared = |oneof: i32| {
        message.field.iter().any(|field| field.oneof_index == Some(oneof) && !field.proto3_optional())
    };
    for (oneof, index) in message.oneof_decl.iter().zip(0..).filter(|(_, index)| declared(*index)) {
        found.push((join(path, MESSAGE_ONEOF, index), format!("{name}.{}", oneof.name())));
    }
    let scope = format!("{name}.");
    for (nested, index) in message.nested_type.iter().zip(0..) {
        add_message(found, nested, &join(path, MESSAGE_NESTED, index), &scope);
    }
    for (nested, index) in message.enum_type.iter().zip(0..) {
        add_enum(found, nested, &join(path, MESSAGE_ENUM, index), &scope);
    }
}

fn add_enum(found: &mut Vec<Element>, declared: &EnumDescriptorProto, path: &[i32], scope: &str) {
    found.push((path.to_vec(), format!("{scope}{}", declared.name())));
    for (value, index) in declared.value.iter().zip(0..) {
        found.push((join(path, ENUM_VALUE, index), value.name().to_owned()));
    }
}

fn join(path: &[i32], field: i32, index: i32) -> Vec<i32> {
    [path, &[field, index]].concat()
}
