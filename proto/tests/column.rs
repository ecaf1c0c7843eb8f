//! Columns on the wire, held against what prost makes of the same field.

#![allow(clippy::unwrap_used)]

use pagewalk_proto::{Column, WithColumn};
use prost::Message;

type Columned = WithColumn<(), 3>;

#[derive(Clone, PartialEq, Message)]
struct Packed {
    #[prost(fixed64, repeated, tag = "3")]
    words: Vec<u64>,
}

#[derive(Clone, PartialEq, Message)]
struct Single {
    #[prost(fixed64, repeated, packed = "false", tag = "3")]
    words: Vec<u64>,
}

fn words(message: &Columned) -> Vec<u64> {
    assert_eq!(message.column.len(), Some(message.column.iter().len()));
    message.column.iter().collect()
}

#[test]
fn the_same_bytes_as_a_packed_field() {
    for count in [0, 1, 2, 15, 16, 17, 5000] {
        let column: Vec<u64> = (0..count).map(|at| at << 56 | at).collect();
        let ours = Columned { head: (), column: column.as_slice().into() }.encode_to_vec();
        let theirs = Packed { words: column.clone() }.encode_to_vec();
        assert_eq!(ours, theirs);
        assert_eq!(words(&Columned::decode(theirs.as_slice()).unwrap()), column);
    }
}

#[test]
fn every_legal_encoding_is_read() {
    let packed = |words: &[u64]| Packed { words: words.to_vec() }.encode_to_vec();
    let single = |words: &[u64]| Single { words: words.to_vec() }.encode_to_vec();
    let empty: &[u8] = &[3 << 3 | 2, 0];
    for pieces in [
        vec![single(&[1, 2, 3])],
        vec![packed(&[1]), packed(&[2, 3])],
        vec![packed(&[1, 2]), single(&[3])],
        vec![single(&[1]), packed(&[2, 3])],
        vec![empty.to_vec(), packed(&[1, 2]), empty.to_vec(), single(&[3]), empty.to_vec()],
    ] {
        let message = Columned::decode(pieces.concat().as_slice()).unwrap();
        assert_eq!(words(&message), [1, 2, 3], "{pieces:?}");
        assert_eq!(message.encode_to_vec(), packed(&[1, 2, 3]));
    }
}

#[test]
fn what_is_no_column() {
    // A varint, a group, a length beyond the end, a word cut short.
    for bad in [&b"\x18\x01"[..], b"\x1b", b"\x1a\x10abc", b"\x19abc"] {
        assert!(Columned::decode(bad).is_err(), "{bad:?}");
    }
    let odd = Columned::decode(&b"\x1a\x03abc"[..]).unwrap();
    assert_eq!((odd.column.len(), odd.column.is_empty(), odd.column.iter().len()), (None, false, 0));
}

#[test]
fn parts_are_copied() {
    let column: Column = (0..10).collect();
    let mut part = [99; 4];
    assert_eq!((column.copy_to(0, &mut part), part), (4, [0, 1, 2, 3]));
    assert_eq!((column.copy_to(7, &mut part), part), (3, [7, 8, 9, 3]));
    for beyond in [10, 11, usize::MAX] {
        assert_eq!(column.copy_to(beyond, &mut part), 0);
    }
}
