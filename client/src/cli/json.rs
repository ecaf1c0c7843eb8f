//! Messages as canonical protobuf JSON: what grpcurl prints. 64-bit integers are strings there, in decimal; fields at
//! their default are left out.

use std::io;
use std::sync::OnceLock;

use pagewalk_proto::{FILE_DESCRIPTOR_SET, steers as steers_terminals};
use prost::Message;
use prost_reflect::{DescriptorPool, DynamicMessage};

const PACKAGE: &str = "pagewalk.v1";

/// A message that knows its fields' names.
pub(super) fn document<M: Message>(name: &str, message: &M) -> io::Result<DynamicMessage> {
    let descriptor = contract()?
        .get_message_by_name(&format!("{PACKAGE}.{name}"))
        .ok_or_else(|| io::Error::other(format!("the contract has no message {name}")))?;
    DynamicMessage::decode(descriptor, message.encode_to_vec().as_slice()).map_err(io::Error::other)
}

/// The contract, read once: there may be millions of documents.
fn contract() -> io::Result<&'static DescriptorPool> {
    static CONTRACT: OnceLock<DescriptorPool> = OnceLock::new();
    match CONTRACT.get() {
        Some(contract) => Ok(contract),
        None => {
            let read = DescriptorPool::decode(FILE_DESCRIPTOR_SET).map_err(io::Error::other)?;
            Ok(CONTRACT.get_or_init(|| read))
        }
    }
}

/// The document with those characters escaped that JSON does not ask to be, and that steer terminals all the same. They occur
/// in strings alone.
pub(super) fn escaped(document: String) -> String {
    let steers = |c: char| steers_terminals(c) && (!c.is_ascii() || c == '\x7f');
    if !document.contains(steers) {
        return document;
    }
    let escape = |c: char| if steers(c) { format!("\\u{:04x}", u32::from(c)) } else { c.to_string() };
    document.chars().map(escape).collect()
}

/// One document, indented.
pub(super) fn pretty(document: &impl serde::Serialize) -> io::Result<String> {
    serde_json::to_string_pretty(document).map(escaped).map_err(io::Error::other)
}

/// One document of those that a verb answers with, as they come: several are an array.
pub(super) fn element(document: &impl serde::Serialize, first: bool, last: bool) -> io::Result<String> {
    let text = pretty(document)?;
    if first && last {
        return Ok(text);
    }
    let (opening, closing) = (if first { "[\n" } else { "" }, if last { "\n]" } else { "," });
    // Newlines in strings are written as escapes.
    Ok(format!("{opening}  {}{closing}", text.replace('\n', "\n  ")))
}

/// One document on one line.
pub(super) fn line(document: &impl serde::Serialize) -> io::Result<String> {
    serde_json::to_string(document).map(escaped).map_err(io::Error::other)
}

#[cfg(test)]
mod tests {
    use super::line;

    #[test]
    fn nothing_in_a_document_steers_a_terminal() -> std::io::Result<()> {
        assert_eq!(line(&"a\u{1b}[2J\u{9b}1m\u{7f}ß")?, r#""a\u001b[2J\u009b1m\u007fß""#);
        Ok(())
    }
}
