//! Columns: fields `repeated fixed64` that hold tens of thousands of words.
//!
//! A packed column is plain little-endian words on the wire. Generated code would turn it into a `Vec<u64>`, word by word;
//! here it stays the bytes that arrived, and goes out as the bytes that it is. Every legal encoding is read: packed, packed
//! in several pieces, not packed at all.

use std::fmt;
use std::hash::{Hash, Hasher};

use prost::Message;
use prost::bytes::{Buf, BufMut, Bytes};
use prost::encoding::{
    self, DecodeContext, WireType, encode_key, encode_varint, encoded_len_varint, key_len,
};

use zerocopy::IntoBytes as _;

use crate::v1;

const WORD: usize = size_of::<u64>();

/// A batch of addresses, `pagewalk.v1.BatchTranslateRequest`: its fields, and the column `addresses`.
pub type BatchTranslateRequest = WithColumn<v1::BatchTranslateRequestHead, 6>;
/// What they mean, `pagewalk.v1.BatchTranslateResponse`: its fields, and the column `words`.
pub type BatchTranslateResponse = WithColumn<v1::BatchTranslateResponseHead, 4>;

/// Words, as they lie on the wire.
#[derive(Clone)]
pub struct Column(Pieces);

#[derive(Clone)]
enum Pieces {
    /// In one piece, shared with whoever received or made it.
    One(Bytes),
    /// Gathered from several.
    Gathered(Vec<u8>),
}

impl Column {
    /// The column's bytes: little-endian words.
    #[must_use]
    pub fn as_bytes(&self) -> &[u8] {
        match &self.0 {
            Pieces::One(bytes) => bytes,
            Pieces::Gathered(bytes) => bytes,
        }
    }

    /// How many words there are. `None` where the bytes are not made of whole words: then the message was none.
    #[must_use]
    pub fn len(&self) -> Option<usize> {
        let bytes = self.as_bytes().len();
        bytes.is_multiple_of(WORD).then_some(bytes / WORD)
    }

    /// Whether there is nothing in it.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.as_bytes().is_empty()
    }

    /// The words.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = u64> + '_ {
        self.as_bytes().as_chunks().0.iter().map(|word| u64::from_le_bytes(*word))
    }

    /// Copies the words from number `start` on into `words`; says how many there were.
    pub fn copy_to(&self, start: usize, words: &mut [u64]) -> usize {
        let bytes =
            start.checked_mul(WORD).and_then(|start| self.as_bytes().get(start..)).unwrap_or_default();
        let there = bytes.as_chunks().0;
        for (word, bytes) in words.iter_mut().zip(there) {
            *word = u64::from_le_bytes(*bytes);
        }
        there.len().min(words.len())
    }

    fn append(&mut self, piece: Bytes) {
        if self.is_empty() {
            self.0 = Pieces::One(piece);
        } else {
            self.gathered().extend_from_slice(&piece);
        }
    }

    fn gathered(&mut self) -> &mut Vec<u8> {
        if let Pieces::One(bytes) = &self.0 {
            self.0 = Pieces::Gathered(bytes.to_vec());
        }
        match &mut self.0 {
            Pieces::Gathered(bytes) => bytes,
            Pieces::One(_) => unreachable!("replaced above"),
        }
    }

    fn merge(
        &mut self,
        wire_type: WireType,
        buf: &mut impl Buf,
        context: DecodeContext,
    ) -> Result<(), prost::DecodeError> {
        if wire_type == WireType::LengthDelimited {
            let mut piece = Bytes::new();
            // The bytes of a buffer that can share them are shared.
            encoding::bytes::merge(wire_type, &mut piece, buf, context)?;
            self.append(piece);
        } else {
            let mut word = 0;
            encoding::fixed64::merge(wire_type, &mut word, buf, context)?;
            self.gathered().extend_from_slice(&word.to_le_bytes());
        }
        Ok(())
    }
}

impl Default for Column {
    fn default() -> Self {
        Self(Pieces::One(Bytes::new()))
    }
}

impl fmt::Debug for Column {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Column({} bytes)", self.as_bytes().len())
    }
}

impl PartialEq for Column {
    fn eq(&self, other: &Self) -> bool {
        self.as_bytes() == other.as_bytes()
    }
}

impl Eq for Column {}

impl Hash for Column {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.as_bytes().hash(state);
    }
}

/// Little-endian words, nothing copied.
impl From<Bytes> for Column {
    fn from(bytes: Bytes) -> Self {
        Self(Pieces::One(bytes))
    }
}

/// Words of this machine, nothing copied where its order is that of the wire.
impl From<Vec<u64>> for Column {
    fn from(mut words: Vec<u64>) -> Self {
        for word in &mut words {
            *word = word.to_le();
        }
        Self(Pieces::One(Bytes::from_owner(Owned(words))))
    }
}

/// Words, as the bytes that they are in memory.
struct Owned(Vec<u64>);

impl AsRef<[u8]> for Owned {
    fn as_ref(&self) -> &[u8] {
        self.0.as_bytes()
    }
}

impl From<&[u64]> for Column {
    fn from(words: &[u64]) -> Self {
        words.iter().copied().collect()
    }
}

impl FromIterator<u64> for Column {
    fn from_iter<I: IntoIterator<Item = u64>>(words: I) -> Self {
        let bytes: Vec<u8> = words.into_iter().flat_map(u64::to_le_bytes).collect();
        Self(Pieces::One(bytes.into()))
    }
}

/// A message with a column in its field `TAG`; its other fields are `head`, in generated code.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct WithColumn<H, const TAG: u32> {
    /// All fields but the column.
    pub head: H,
    /// The column.
    pub column: Column,
}

impl<H: Message, const TAG: u32> Message for WithColumn<H, TAG> {
    /// The column comes last: the buffer grows once, by all of it.
    fn encode_raw(&self, buf: &mut impl BufMut) {
        self.head.encode_raw(buf);
        let bytes = self.column.as_bytes();
        if !bytes.is_empty() {
            encode_key(TAG, WireType::LengthDelimited, buf);
            encode_varint(bytes.len() as u64, buf);
            buf.put_slice(bytes);
        }
    }

    fn merge_field(
        &mut self,
        tag: u32,
        wire_type: WireType,
        buf: &mut impl Buf,
        context: DecodeContext,
    ) -> Result<(), prost::DecodeError> {
        if tag == TAG {
            self.column.merge(wire_type, buf, context)
        } else {
            self.head.merge_field(tag, wire_type, buf, context)
        }
    }

    fn encoded_len(&self) -> usize {
        let bytes = self.column.as_bytes().len();
        let column = if bytes == 0 { 0 } else { key_len(TAG) + encoded_len_varint(bytes as u64) + bytes };
        self.head.encoded_len() + column
    }

    fn clear(&mut self) {
        self.head.clear();
        self.column = Column::default();
    }
}
